"""proxsparse, maskpro and global_descent from the command line, on a 2-layer model."""

from __future__ import annotations

import json

import pytest
import torch

from nmprune import masks
from nmprune.checkpoint import read_masks
from nmprune.pattern import Pattern

SMALL = ("--calibration", "builtin", "--n-sequences", 6, "--seq-len", 16)
LOOP = ("--set", "train.steps=4", "--set", "train.batch_size=2", "--set", "train.eval_every=2")
UNGUARDED = ("--set", "train.guard=false")
METHODS = {
    "proxsparse": ("--set", "method.lr=0.01", "--set", "method.train_rest=false"),
    "maskpro": ("--set", "method.flip_share=0.2", "--set", "method.lr=20", "--set", "method.score=ordered"),
    "global_descent": ("--set", "method.prior=wanda", "--set", "train.accumulation=2"),
}


def flat(text: str) -> str:
    """Words on one line, however they were wrapped."""
    return " ".join(text.split())


@pytest.fixture(scope="module")
def unguarded(made, tmp_path_factory):
    """Method -> the command's words; the guard is off, so that what is learned is what is taken."""
    place = tmp_path_factory.mktemp("learned")
    return {
        name: ("prune", made[0], "--method", name, *settings, *SMALL, *LOOP, *UNGUARDED, "--out", place / name)
        for name, settings in METHODS.items()
    }


@pytest.mark.parametrize("name", METHODS)
def test_a_run_is_whole_and_verifies(call, document, base, unguarded, name):
    words = unguarded[name]
    result = document(*words)["results"]
    out = words[-1]
    assert result["method"]["name"] == name and result["updates_weights"] is False
    stored = read_masks(out / "masks.safetensors")
    learned = {key: stored.mask(key) for key in stored.masks}
    assert len(learned) == 14
    assert all(masks.n_wrong_groups(mask, Pattern(2, 4)) == 0 for mask in learned.values())
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [one["step"] for one in steps] == [0, 1, 2, 3, 4]
    assert {"held_out_loss", "flips", "soft_hard_gap"} <= set(steps[2])
    assert ("advantage" in steps[1]) == (name == "maskpro") and ("gradient_norm" in steps[1]) == (name == "proxsparse")
    assert call("verify", out).exit_code == 0

    # a run beside it: the same seed makes the same masks
    again = (*words[:-1], out.with_name(f"{name}-again"))
    assert call(*again).exit_code == 0
    second = read_masks(again[-1] / "masks.safetensors")
    assert all(torch.equal(second.mask(key), mask) for key, mask in learned.items())


def test_proxsparse_says_what_it_cannot_do(call, base, tmp_path):
    result = call("prune", base, "--method", "proxsparse", "--pattern", "1:4", "--out", tmp_path / "run", *SMALL)
    assert result.exit_code == 2
    assert "its penalty is that of 2:4" in flat(result.output) and "maskpro" in flat(result.output)
    assert not (tmp_path / "run").exists()


def test_maskpro_learns_other_patterns(call, base, tmp_path):
    words = ("prune", base, "--method", "maskpro", "--pattern", "4:8", "--out", tmp_path / "run", *SMALL, *LOOP)
    result = call(*words, "--set", "method.flip_share=0.1")
    assert result.exit_code == 0, result.output
    stored = read_masks(tmp_path / "run" / "masks.safetensors")
    assert all(masks.n_wrong_groups(stored.mask(key), Pattern(4, 8)) == 0 for key in stored.masks)


@pytest.mark.parametrize(
    ("method", "setting", "words"),
    [
        ("maskpro", "tracker=2", "maskpro.tracker is 2"),
        ("proxsparse", "lr=0", "proxsparse.lr is 0"),
        ("global_descent", "damping=0", "global_descent.damping is 0"),
        ("global_descent", "shrinkage=-1", "global_descent.shrinkage is -1"),
        ("global_descent", "sweeps=0", "global_descent.sweeps is 0"),
    ],
)
def test_a_setting_out_of_range(call, base, tmp_path, method, setting, words):
    out = ("--out", tmp_path / "run")
    result = call("prune", base, "--method", method, "--set", f"method.{setting}", *out, *SMALL)
    assert result.exit_code == 2 and words in flat(result.output)


def test_global_descent_is_not_spread(call, base, tmp_path):
    words = ("prune", base, "--method", "global_descent", "--out", tmp_path / "run", *SMALL, *LOOP)
    result = call(*words, "--set", "train.shard=true")
    assert result.exit_code == 2 and "needs whole linears" in flat(result.output)
