"""Kill a run that follows the dense model beside the pruned one; run it again: the same bits."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

import tiny_models
from nmprune.refine import Reconstruct
from runs import output, prune
from slow_runs import N_LAYERS, start, wait_for

STEPS = {"polish": True, "reconstruct": True}


def n_finished(out: Path) -> int:
    return len(list((out / "progress").glob("layer_*.safetensors")))


MOMENTS: dict[str, tuple[Callable[[Path], bool], bool]] = {
    "two layers": (lambda out: n_finished(out) >= 2, False),
    "five layers, hidden states kept": (lambda out: n_finished(out) >= 5, True),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("llama", tmp_path_factory.mktemp("model") / "base", num_hidden_layers=N_LAYERS)


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_run_again(moment, model, tmp_path, monkeypatch):
    prune(model, tmp_path / "undisturbed", "wanda", **STEPS)
    out = tmp_path / "run"
    come, keep_hidden = MOMENTS[moment]
    process = start(model, out, {"layers": 0.01}, keep_hidden=keep_hidden, method="wanda", **STEPS)
    wait_for(lambda: come(out), process)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    finished, kept = n_finished(out), out / "progress" / "hidden.safetensors"
    assert finished < N_LAYERS and kept.exists() == keep_hidden
    if keep_hidden:
        with safe_open(kept, framework="pt") as file:
            assert set(file.keys()) == {"hidden", "dense"}
    solved: list[int] = []
    refine = Reconstruct.refine

    def counting(self, *args):
        solved.append(1)
        return refine(self, *args)

    monkeypatch.setattr(Reconstruct, "refine", counting)
    results = prune(model, out, "wanda", **STEPS).results
    assert output(out) == output(tmp_path / "undisturbed")
    assert len(solved) == 7 * (N_LAYERS - finished)
    assert results.method["name"] == "wanda+polish+reconstruct" and results.updates_weights
    assert any(one.notes["reconstruct_taken"] for one in results.linears)
