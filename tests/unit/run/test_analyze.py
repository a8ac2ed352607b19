from __future__ import annotations

import json

import pytest
import torch

import tiny_runs
from nmprune.calibration import consecutive_windows, load_text
from nmprune.checkpoint import Checkpoint
from nmprune.errors import InputError
from nmprune.evaluate.analysis import LinearFacts, MaskFacts
from nmprune.evaluate.layer_error import layer_errors
from nmprune.pattern import Pattern
from nmprune.run import Recipe, prune_run
from nmprune.run.analyze import Question, analyze, correlations
from nmprune.run.tokens import load_tokenizer
from nmprune.stream import DecoderModel, select

QUESTION = Question("builtin", 4, 16)


def pruned(place, name="llama", **settings):
    """A finished run, calibrated on builtin text."""
    base = tiny_runs.model(place / "model", name)
    raw = {"model": str(base), "calibration": {"source": "builtin", "n_sequences": 4, "seq_len": 16}, **settings}
    prune_run(Recipe.from_dict({"method": "wanda", **raw}), place / "run")
    return base, place / "run"


def test_errors_are_those_of_the_pruned_model_on_the_text(tmp_path):
    base, run = pruned(tmp_path, method="descent")
    found, file = analyze(run, QUESTION)
    model = DecoderModel.open(run / "model", allow_sparse=True)
    windows = consecutive_windows(load_text("builtin", "evaluation"), load_tokenizer(base), 16, 4)
    expected = layer_errors(Checkpoint.open(base), model, select(model, Pattern(2, 4)), windows)
    assert {one.name: one.masks[0].error for one in found.linears} == pytest.approx(expected, rel=1e-5)
    calibration = {
        one["name"]: one["output_error"] for one in json.loads((run / "results.json").read_text())["linears"]
    }
    assert found.calibration_errors == calibration and None not in calibration.values()
    assert json.loads(file.read_text())["linears"][0]["name"] == found.linears[0].name
    again, _ = analyze(run, QUESTION)
    assert again.linears == found.linears and again.windows_checksum == found.windows_checksum


def test_masks_lie_between_wandas_and_a_random_one(tmp_path):
    _, run = pruned(tmp_path)
    found, _ = analyze(run, Question("builtin", 8, 16, n_mixed=3))
    for one in found.linears:
        errors = {mask.mask: mask.error for mask in one.masks}
        assert list(errors)[3:] == ["wanda, 33% random", "wanda, 67% random", "wanda, 100% random"]
        assert errors["wanda"] < errors["wanda, 33% random"] < errors["wanda, 100% random"]
        assert one.kept > 0.5 and one.mean_term > 0 and one.variance_term > 0


def test_moved_weights_are_also_looked_at_on_the_dense_ones(tmp_path):
    _, run = pruned(tmp_path, method="sparsegpt")
    for one in analyze(run, QUESTION)[0].linears:
        errors = {mask.mask: mask.error for mask in one.masks}
        assert errors["run's mask, dense weights"] != errors["run"] < errors["wanda, 100% random"]


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "phi3", "gpt_oss"])
def test_other_families(tmp_path, name):
    _, run = pruned(tmp_path, name)
    found, _ = analyze(run, QUESTION)
    n_pruned = len(found.calibration_errors)
    assert len(found.linears) + len(found.left_out) == n_pruned and len(found.linears) >= 8
    for one in found.linears:
        # the run's mask is Wanda's on other text: nearer to Wanda's on this text than a random one is
        errors = {mask.mask: mask.error for mask in one.masks}
        assert errors["run"] < errors["wanda, 100% random"] or one.n_tokens < 10


def test_reordered_channels_and_mixed_patterns(tmp_path):
    (tmp_path / "permuted").mkdir()
    (tmp_path / "mixed").mkdir()
    _, run = pruned(tmp_path / "permuted", permute="all")
    for one in analyze(run, QUESTION)[0].linears:
        assert one.masks[0].error < 0.4  # another order of channels would give about 2
    _, run = pruned(tmp_path / "mixed", allocate={"patterns": ["1:4", "3:4"], "density": "0.5"})
    densities = {one["name"]: one["density"] for one in json.loads((run / "results.json").read_text())["linears"]}
    found, _ = analyze(run, QUESTION)
    worst = {
        density: max(o.masks[-1].error for o in found.linears if densities[o.name] == density)
        for density in (0.25, 0.75)
    }
    assert worst[0.75] < 0.4 < worst[0.25]  # the random masks have the linear's own pattern


def test_experts_without_tokens_are_named(tmp_path):
    _, run = pruned(tmp_path, "mixtral")
    found, _ = analyze(run, Question("builtin", 1, 2))
    assert found.left_out and all("tokens of this text" in why for why in found.left_out.values())
    assert not found.left_out.keys() & {one.name for one in found.linears}


def test_what_cannot_be_analyzed(tmp_path):
    _, run = pruned(tmp_path)
    other = tiny_runs.model(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="is not the model that was pruned"):
        analyze(run, QUESTION, base=str(other))
    with pytest.raises(InputError, match="n_sequences is 0; expected at least 1"):
        Question(n_sequences=0)
    (run / "results.json").unlink()
    with pytest.raises(InputError, match="is not finished"):
        analyze(run, QUESTION)


def fact(error, nats, determines=False, others=()):
    masks = [
        MaskFacts("run", error, (nats,) * 3),
        *(MaskFacts(f"m{i}", e, (n,) * 3) for i, (e, n) in enumerate(others)),
    ]
    return LinearFacts("n", 0, "r", (2, 4), 8, 4, determines, 1.0, 1.0, 0.5, tuple(masks))


def test_correlations():
    falling = [(0.2, 3.0), (0.3, 2.0)]
    linears = [
        fact(0.1, 4.0, others=falling),
        fact(0.2, 3.0, others=[(0.3, 4.0), (0.4, 5.0)]),
        fact(0.3, 9.0, determines=True, others=falling),
        fact(0.4, 1.0),
    ]
    found = {(one.over, one.open_only): one for one in correlations(linears) if one.noise_share == 1e-3}
    assert len(correlations(linears)) == 12
    assert found["linears", True].nats == pytest.approx(-1) and found["linears", True].n == 3
    assert -1 < found["linears", False].nats < 0 and found["linears", False].n == 4
    over_masks = found["masks", False]
    assert (over_masks.n, over_masks.least, over_masks.most) == (3, pytest.approx(-1), pytest.approx(1))
    assert found["masks", True].nats == pytest.approx(0)
    assert correlations([])[0].nats is None


def test_the_pass_leaves_no_trace_in_the_random_state(tmp_path):
    _, run = pruned(tmp_path)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    analyze(run, QUESTION)
    assert torch.equal(before, torch.get_rng_state())
