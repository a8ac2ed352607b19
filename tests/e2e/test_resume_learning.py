"""Kill a run that learns its layers, inside a layer and between two; run it again: the same bits."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny_models
from nmprune.methods import create
from runs import output, prune
from slow_runs import start, wait_for

N_LAYERS = 5
METHOD = create("hyperprune", {"steps": 6, "check_every": 3})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("llama", tmp_path_factory.mktemp("model") / "base", num_hidden_layers=N_LAYERS)


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    prune(model, out, METHOD)
    return out


def last_step(out: Path) -> tuple[int, int]:
    """(layer, step) of the last whole line of metrics."""
    if not (out / "metrics.jsonl").is_file():
        return -1, 0
    *lines, _ = (out / "metrics.jsonl").read_text().split("\n")
    found = json.loads(lines[-1]) if lines else {"layer": -1, "step": 0}
    return found["layer"], found["step"]


@pytest.mark.parametrize("snapshots", [True, False], ids=["with snapshots", "without"])
@pytest.mark.parametrize("moment", [(0, 2), (3, 4)])
def test_killed_and_run_again(moment, snapshots, model, undisturbed, tmp_path):
    out = tmp_path / "run"
    process = start(model, out, {"layers": 0.005}, keep_hidden=snapshots, method=METHOD)
    wait_for(lambda: last_step(out) >= moment, process)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (out / "progress" / "learning.safetensors").exists() == snapshots
    learned: list[str] = []
    results = prune(model, out, METHOD, report=lambda sign: learned.extend([sign.live] if sign.live else [])).results
    assert output(out) == output(undisturbed)
    assert (out / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()
    state, expected = (load_file(place / "learned.safetensors") for place in (out, undisturbed))
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)
    layer, step = moment
    least = 6 * layer + (step if snapshots else 0)
    assert 0 < len(learned) <= 6 * N_LAYERS - least + (1 if snapshots else 0)
    assert [one.layer for one in results.learned_layers] == list(range(N_LAYERS))
