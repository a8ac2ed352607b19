"""A whole run whose model is spread over processes: one is killed, and the run goes on, in two processes or in one."""

from __future__ import annotations

import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import nmprune
import process_groups
import sharded_runs
import tiny_models
from nmprune import InputError
from nmprune.checkpoint import read_masks
from nmprune.run.learning_files import metrics_of
from nmprune.run.machine import Machine

TRAIN: dict[str, Any] = {"steps": 4, "batch_size": 1, "accumulation": 2, "eval_every": 2, "guard": False}
SETTINGS: dict[str, Any] = {
    "method": sharded_runs.GENTLE,
    "calibration": tiny_models.windows(13),
    "stream": {"batch_size": 2},
    "machine": Machine(checkpoint_minutes=0.0),
}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def spread(model: Path, out: Path, dies: tuple[int, int] | None) -> list[int | None]:
    """Exit codes of two processes."""
    settings = {**SETTINGS, "train": {**TRAIN, "shard": True}}
    return process_groups.end(process_groups.start(2, sharded_runs.prune, str(model), str(out), settings, dies), 600.0)


def test_a_killed_run_goes_on_spread_or_whole(tmp_path):
    model = tiny_models.save("llama", tmp_path / "base")
    nmprune.prune(model, pattern="2:4", out=tmp_path / "one", train=TRAIN, **SETTINGS)
    out = tmp_path / "spread"
    codes = spread(model, out, (1, 3))
    assert codes == [2, -signal.SIGKILL]
    # the other process may die while process 0 still writes what both had at step 3
    assert re.fullmatch(
        r"process 1 of 2 was lost \(killed, out of memory, or its host is gone\)\. Run the same command again: it goes on after "
        r"step [23] of 4\.",
        Path(f"{out}.error_0").read_text(),
    )
    shutil.copytree(out, tmp_path / "whole")
    assert spread(model, out, None) == [0, 0]
    nmprune.prune(model, pattern="2:4", out=tmp_path / "whole", train=TRAIN, **SETTINGS)
    expected = read_masks(tmp_path / "one" / "masks.safetensors")
    for name in ("spread", "whole"):
        found = read_masks(tmp_path / name / "masks.safetensors")
        assert found.masks.keys() == expected.masks.keys()
        differ = [
            (found.mask(key) != expected.mask(key)).unflatten(-1, (-1, 4)).any(-1).flatten() for key in found.masks
        ]
        assert torch.cat(differ).float().mean() <= 0.01, name
        lines = metrics_of(tmp_path / name)
        assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
        for line, other in zip(lines, metrics_of(tmp_path / "one"), strict=True):
            assert line.keys() == other.keys()
            for key in {"loss", "held_out_loss"} & line.keys():
                assert line[key] == pytest.approx(other[key], rel=1e-5)


def test_one_process_cannot_share(tmp_path):
    model = tiny_models.save("llama", tmp_path / "base")
    settings = {**SETTINGS, "train": {**TRAIN, "shard": True}}
    for given, out in ((model, tmp_path / "run"), (tiny_models.build("llama"), None)):
        with pytest.raises(
            InputError, match=r"train\.shard spreads the model over several processes, and there is one"
        ):
            nmprune.prune(given, pattern="2:4", out=out, **settings)
    assert not (tmp_path / "run").exists()
