"""Kill a run while its gradients are computed, or after; run it again: the same bits, and nothing twice."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny_models
from nmprune.run.gradients import GradientFiles
from nmprune.run.loss_aware import LossAware
from runs import output, prune
from slow_runs import N_LAYERS, start, wait_for


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_models.save("llama", tmp_path / "base", num_hidden_layers=N_LAYERS, max_shard_size="100KB")


def n_layers(folder: Path) -> int:
    return len(list(folder.glob("layer_*.safetensors")))


MOMENTS: dict[str, tuple[Callable[[Path], bool], dict[str, float], bool]] = {
    "forward": (lambda out: (out / "calibration.safetensors").exists(), {"gradients": 0.02, "layers": 9}, False),
    "two layers": (lambda out: n_layers(out / "progress/gradients") >= 2, {"gradients": 0.01, "layers": 9}, False),
    "five layers, hidden gradient kept": (
        lambda out: n_layers(out / "progress/gradients") >= 5,
        {"gradients": 0.01, "layers": 9},
        True,
    ),
    "pruning": (lambda out: n_layers(out / "progress") >= 3, {"layers": 0.02, "masks": 9}, False),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_run_again(moment, model, tmp_path, monkeypatch):
    prune(model, tmp_path / "undisturbed", "pruner_zero")
    out = tmp_path / "run"
    come, pause, keep_hidden = MOMENTS[moment]
    process = start(model, out, pause, keep_hidden=keep_hidden, method="pruner_zero")
    wait_for(lambda: come(out), process)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    kept = n_layers(out / "progress/gradients")
    assert kept == N_LAYERS if moment == "pruning" else kept < N_LAYERS
    assert (out / "progress/gradients/hidden.safetensors").exists() == keep_hidden
    again: list[int] = []
    save = GradientFiles.save

    def counting(self, done):
        again.append(done.index)
        save(self, done)

    monkeypatch.setattr(GradientFiles, "save", counting)
    results = prune(model, out, "pruner_zero").results
    assert again == list(range(N_LAYERS - kept - 1, -1, -1))
    assert output(out) == output(tmp_path / "undisturbed")
    assert results.seconds["gradients"] > 0
    assert not (out / "progress").exists()


@pytest.mark.parametrize("moment", ["two layers", "five layers, hidden gradient kept", "pruning"])
def test_a_loss_aware_run_killed_and_run_again(moment, model, tmp_path):
    settings = {"loss_aware": LossAware(blocks=2)}
    prune(model, tmp_path / "undisturbed", "sparsegpt", **settings)
    prune(model, tmp_path / "plain", "sparsegpt")
    out = tmp_path / "run"
    come, pause, keep_hidden = MOMENTS[moment]
    process = start(model, out, pause, keep_hidden=keep_hidden, method="sparsegpt", **settings)
    wait_for(lambda: come(out), process)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    kept = n_layers(out / "progress/gradients")
    assert kept == N_LAYERS if moment == "pruning" else kept < N_LAYERS
    results = prune(model, out, "sparsegpt", **settings).results
    assert output(out) == output(tmp_path / "undisturbed") != output(tmp_path / "plain")
    assert results.seconds["gradients"] > 0 and not (out / "progress").exists()
