"""Two processes learn the layers of one run together: the masks of one process, but for rounding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import process_groups
import tiny_models
from nmprune import masks
from nmprune.checkpoint import read_masks
from nmprune.methods import create

METHOD = create("hyperprune", {"steps": 5, "check_every": 5, "sequences": 4})
SETTINGS: dict[str, Any] = {"calibration": tiny_models.windows(13), "stream": {"batch_size": 2, "min_expert_tokens": 8}}


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_learn_what_one_learns(tmp_path):
    model = tiny_models.save("mixtral", tmp_path / "base")
    for n_processes in (1, 2):
        job = (str(model), str(tmp_path / f"by_{n_processes}"), METHOD, SETTINGS)
        codes = process_groups.end(process_groups.start(n_processes, process_groups.prune, [job], None))
        assert codes == [0] * n_processes
    one, two = (tmp_path / f"by_{n}" for n in (1, 2))
    first, second = metrics(one), metrics(two)
    assert [(a["layer"], a["step"]) for a in first] == [(b["layer"], b["step"]) for b in second]
    assert first[0]["loss"] == pytest.approx(second[0]["loss"], rel=1e-5), "before any step the masks are the same"
    found, other = (read_masks(place / "masks.safetensors").masks for place in (one, two))
    assert found.keys() == other.keys()
    differ, total = 0, 0
    for name, entry in found.items():
        mask, again = entry.unpack(), other[name].unpack()
        assert masks.n_wrong_groups(again, entry.pattern) == 0
        groups = (mask != again).unflatten(-1, (-1, entry.pattern.group)).any(-1)
        differ, total = differ + int(groups.sum()), total + groups.numel()
    assert differ <= 0.01 * total
    for a, b in zip(*(json.loads((p / "results.json").read_text())["learned_layers"] for p in (one, two)), strict=True):
        assert a["prior_loss"] == pytest.approx(b["prior_loss"], rel=1e-4) and a["steps"] == b["steps"]
