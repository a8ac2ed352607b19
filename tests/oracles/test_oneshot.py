"""Masks and weights of the authors' own code (../shared/oracles, section A), within the tolerances of its README."""

import json
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

from nmprune import masks, methods
from nmprune.pattern import Pattern
from nmprune.stats import StatsAccumulator
from shared_data import shared


@dataclass(frozen=True)
class Tolerance:
    """How far from the authors' result is still the same result.

    Attributes:
        groups: share of groups whose mask may differ.
        weights: absolute, on rows whose masks are equal; None for frozen weights.
        of_largest: whether `weights` is a share of the largest dense weight instead.
    """

    groups: float
    weights: float | None = None
    of_largest: bool = False


# key in the oracle files -> (method, hyper-parameters, tolerance)
METHODS = {
    "magnitude": ("magnitude", {}, Tolerance(groups=0)),
    "wanda": ("wanda", {}, Tolerance(groups=0)),
    "ria_a0.5": ("ria", {"activation_power": 0.5}, Tolerance(groups=0)),
    "ri": ("ria", {"activation_power": 0.0}, Tolerance(groups=0)),
    "sparsegpt": ("sparsegpt", {"damping": 0.01, "block_size": 128}, Tolerance(groups=0.005, weights=1e-5)),
    "alps": ("alps", {"damping": 0.01, "rho": 0.1}, Tolerance(groups=0.01, weights=1e-3, of_largest=True)),
}
LINEARS = ["A_L0_q_proj", "A_L0_o_proj", "A_L0_down_proj", "A_L3_up_proj", "A_synthetic"]
PATTERNS = ["2:4", "4:8", "1:4"]
TIES = ["magnitude", "wanda"]


def tensors(name):
    return load_file(shared(f"oracles/{name}.safetensors"))


def pruned_by_us(key, oracle, pattern):
    name, settings, _ = METHODS[key]
    method = methods.create(name, settings)
    accumulator = StatsAccumulator(oracle["weight"].shape[1], method.needs)
    for sequence in oracle["inputs"]:
        accumulator.add(sequence)
    return method.prune(oracle["weight"], accumulator.result(), pattern)


def relative_output_error(weight, dense, inputs):
    x = inputs.flatten(0, 1).double()
    return ((x @ (weight - dense).double().T).square().sum() / (x @ dense.double().T).square().sum()).item()


@pytest.mark.parametrize("key", METHODS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("linear", LINEARS)
def test_one_linear(linear, pattern, key):
    oracle = tensors(linear)
    prefix = f"{pattern.replace(':', 'of')}.{key}"
    if oracle["weight"].shape[1] % Pattern.parse(pattern).group:
        assert f"{prefix}.mask" not in oracle
        return
    theirs = oracle[f"{prefix}.mask"]
    pruned, tolerance = pruned_by_us(key, oracle, Pattern.parse(pattern)), METHODS[key][2]
    differs = pruned.mask != theirs
    n_groups = theirs.numel() // Pattern.parse(pattern).group
    n_differ = int(differs.unflatten(-1, (-1, Pattern.parse(pattern).group)).any(-1).sum())
    assert n_differ <= tolerance.groups * n_groups, f"{n_differ} of {n_groups} groups differ"
    weight = oracle["weight"] * pruned.mask if pruned.weight is None else pruned.weight
    if tolerance.weights is not None:
        same_rows = ~differs.any(1)
        assert same_rows.float().mean() > 0.9
        their_weight = oracle[f"{prefix}.weight"]
        atol = tolerance.weights * (oracle["weight"].abs().max().item() if tolerance.of_largest else 1)
        torch.testing.assert_close(weight[same_rows], their_weight[same_rows], rtol=0, atol=atol)
    recorded = json.loads(shared(f"oracles/{linear}.json").read_text())["cases"][pattern][key]
    if key == "alps":
        assert pruned.notes["iterations"] == recorded["iterations"]
        assert pruned.notes["rho"] == pytest.approx(recorded["final_rho"], rel=1e-6)
    error = relative_output_error(weight, oracle["weight"], oracle["inputs"])
    assert error == pytest.approx(recorded["rel_output_sqerr"], rel=0.01)


@pytest.mark.parametrize("key", TIES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_ties_keep_as_much_as_the_authors_code(pattern, key):
    oracle, parsed = tensors("A_ties"), Pattern.parse(pattern)
    pruned = pruned_by_us(key, oracle, parsed)
    norms = oracle["inputs"].flatten(0, 1).double().square().sum(0).sqrt() if key == "wanda" else torch.ones(32)
    scores = oracle["weight"].abs().double() * norms
    theirs = oracle[f"{pattern.replace(':', 'of')}.{key}.mask"]
    kept = [(scores * mask).unflatten(-1, (-1, parsed.group)).sum(-1) for mask in (pruned.mask, theirs)]
    torch.testing.assert_close(kept[0], kept[1], rtol=1e-9, atol=1e-9)
    assert masks.n_wrong_groups(pruned.mask, parsed) == 0


@pytest.mark.parametrize("linear", LINEARS)
def test_our_statistics_are_theirs(linear):
    oracle = tensors(linear)
    accumulator = StatsAccumulator(oracle["weight"].shape[1], frozenset({"input_sq_norm", "input_gram"}))
    for sequence in oracle["inputs"]:
        accumulator.add(sequence)
    stats = accumulator.result()
    torch.testing.assert_close(stats.squared_norms(), oracle["col_sqnorm_fp64"], rtol=1e-6, atol=0)
    scale = oracle["gram_fp64"].diagonal().max().item()
    torch.testing.assert_close(stats.gram().double(), oracle["gram_fp64"], rtol=0, atol=1e-6 * scale)
