from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from nmprune import masks
from nmprune.errors import InputError
from nmprune.methods import METHODS, Magnitude, SparseGPT, Wanda
from nmprune.methods.base import PerLinear
from nmprune.pattern import Pattern
from nmprune.refine import Chain, Polish, Reconstruct
from nmprune.refine.reconstruct import RIDGES
from nmprune.stats import GRADIENTS, StatsAccumulator

PATTERN = Pattern(2, 4)
WITHOUT_GRADIENTS = [
    name for name, method in METHODS.items() if issubclass(method, PerLinear) and not method.needs & GRADIENTS
]
STEPS = {
    "polish": {"polish": Polish()},
    "reconstruct": {"reconstruct": Reconstruct()},
    "both": {"polish": Polish(), "reconstruct": Reconstruct()},
}


def problem(needs):
    generator = torch.Generator().manual_seed(0)
    sums = StatsAccumulator(32, needs)
    mix = torch.eye(32) + torch.randn(32, 32, generator=generator) / 32**0.5
    for n, held_out in ((150, False), (50, True)):
        dense = torch.randn(n, 32, generator=generator) @ mix
        sums.add(dense + 0.3 * torch.randn(n, 32, generator=generator), dense, held_out)
    return torch.randn(12, 32, generator=generator), sums.result()


@pytest.mark.parametrize("name", WITHOUT_GRADIENTS)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_after_every_method_the_result_is_legal(name, steps, pattern):
    method, wanted = METHODS[name](), Pattern.parse(pattern)
    if steps == "polish" and method.updates_weights:
        with pytest.raises(InputError, match=rf"the weights that {name} moved belong to its own\. Add reconstruct"):
            Chain(method, **STEPS[steps])
        return
    chain = Chain(method, **STEPS[steps])
    weight, stats = problem(chain.needs)
    before = weight.clone()
    done = chain.prune(weight, stats, wanted)
    assert masks.n_wrong_groups(done.mask, wanted) == 0
    assert chain.updates_weights or done.weight is None
    if done.weight is not None:
        assert done.weight.dtype == torch.float32 and torch.isfinite(done.weight).all()
        assert not done.weight.view(torch.int32)[~done.mask].any(), "not +0.0 off the mask"
    assert torch.equal(weight, before)
    again = chain.prune(weight, problem(chain.needs)[1], wanted)
    assert torch.equal(done.mask, again.mask)
    json.dumps(done.notes, allow_nan=False)
    if "reconstruct" in STEPS[steps] and "polish" not in STEPS[steps]:
        assert torch.equal(done.mask, method.prune(weight, stats, wanted).mask), "reconstruct changes no mask"
    if chain.updates_weights and not method.updates_weights:  # a method that moves weights has seen the held-out tokens
        assert done.notes["reconstruct_taken"] == 1, "the test does not show what reconstruct gives"


def test_the_parts_run_one_after_the_other():
    chain = Chain(Magnitude(), Polish(), Reconstruct(ridge=0.1))
    weight, stats = problem(chain.needs)
    step = Magnitude().prune(weight, stats, PATTERN)
    polished = Polish().refine(weight, step, stats, PATTERN)
    expected = Reconstruct(ridge=0.1).refine(weight, polished, stats, PATTERN)
    done = chain.prune(weight, stats, PATTERN)
    assert torch.equal(done.mask, expected.mask) and torch.equal(done.weight, expected.weight)
    assert done.notes == expected.notes
    assert not torch.equal(done.mask, step.mask)


@pytest.mark.parametrize(
    ("method", "polish", "reconstruct", "name", "needs", "moves"),
    [
        (Wanda(), None, None, "wanda", {"input_sq_norm"}, False),
        (SparseGPT(), None, None, "sparsegpt", {"input_gram"}, True),
        (Wanda(), Polish(), None, "wanda+polish", {"input_sq_norm", "input_gram", "cross_gram"}, False),
        (Wanda(), Polish(target=0), None, "wanda+polish", {"input_sq_norm", "input_gram"}, False),
        (
            Magnitude(),
            None,
            Reconstruct(),
            "magnitude+reconstruct",
            {"input_gram", "cross_gram", "held_out_gram"},
            True,
        ),
        (
            SparseGPT(),
            Polish(target=0),
            Reconstruct(target=0),
            "sparsegpt+polish+reconstruct",
            {"input_gram", "held_out_gram"},
            True,
        ),
    ],
)
def test_what_it_declares(method, polish, reconstruct, name, needs, moves):
    chain = Chain(method, polish, reconstruct)
    assert (chain.name, chain.needs, chain.updates_weights) == (name, needs, moves)


def test_declaring_is_the_chains_own():
    Chain(SparseGPT(), None, Reconstruct())
    assert (Chain.name, Wanda.needs, Wanda.updates_weights) == ("chain", {"input_sq_norm"}, False)
    assert Chain(Wanda(), Polish()) == Chain(Wanda(), Polish()) != Chain(Wanda(), Polish(sweeps=2))
    moved = dataclasses.replace(Chain(Wanda(), Polish()), reconstruct=Reconstruct())
    assert moved.name == "wanda+polish+reconstruct" and moved.updates_weights


def test_hyper_parameters_are_plain_and_under_their_steps():
    chain = Chain(SparseGPT(damping=0.1), Polish(0.25, 0.1, 3), Reconstruct(0.3, 0.2, 9))
    assert chain.hyper_parameters() == {
        "damping": 0.1,
        "block_size": 128,
        "polish": {"shrinkage": 0.25, "target": 0.1, "sweeps": 3},
        "reconstruct": {"ridge": 0.3, "target": 0.2, "iterations": 9},
    }
    assert Chain(Magnitude()).hyper_parameters() == {}


def test_plans_take_the_largest_memory_and_all_the_work():
    parts = (SparseGPT(), Polish(), Reconstruct())
    chain = Chain(*parts)
    assert chain.solver_bytes(64, 128) == max(part.solver_bytes(64, 128) for part in parts)
    assert chain.solver_flops(64, 128) == sum(part.solver_flops(64, 128) for part in parts)
    chosen, given = (Reconstruct(ridge=ridge).solver_flops(64, 128) for ridge in (0.0, 0.1))
    assert chosen == 5 * given, "four ridges on 64 rows, then all 64"


def test_what_the_method_cannot_do_the_chain_cannot():
    class OnlyTwoFour(Wanda):
        def why_not(self, pattern: Pattern) -> str | None:
            return None if pattern == PATTERN else "its formula is for 2:4"

    method: PerLinear = Chain(OnlyTwoFour(), None, Reconstruct())
    assert method.why_not(PATTERN) is None
    assert method.why_not(Pattern(1, 4)) == "its formula is for 2:4"


def test_settings_of_every_step_are_on_the_page():
    page = (Path(__file__).resolve().parents[3] / "docs" / "refine.md").read_text()
    for step in (Polish, Reconstruct):
        part = page.partition(f"\n## {step.name.capitalize()}\n")[2].partition("\n## ")[0]
        for field in dataclasses.fields(step):
            help_text = field.metadata.get("help", "")
            assert len(help_text) > 10, f"{step.name}.{field.name} has no help"
            assert f"| `{field.name}` | {field.default} | {help_text} |" in part, f"{step.name}.{field.name}"
    assert str(list(RIDGES)) == "[0.03, 0.1, 0.3, 1.0]" and "0.03, 0.1, 0.3 and 1 is taken" in page
