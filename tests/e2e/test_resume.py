"""Kill a run at any moment, run it again: the same bits as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tiny_models
from nmprune.errors import InputError
from nmprune.methods import SparseGPT
from runs import hashes, looks_whole, mtimes, output, prune
from slow_runs import N_LAYERS, start, wait_for

LINEARS_PER_LAYER = 7


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "base"
    tiny_models.build("llama", num_hidden_layers=N_LAYERS).save_pretrained(folder, max_shard_size="100KB")
    return folder


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    prune(model, out, "sparsegpt")
    return output(out)


@pytest.fixture
def pruned_again(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every linear that is pruned in this process."""
    calls: list[int] = []
    real = SparseGPT.prune

    def counting(self, *args, **kwargs):
        calls.append(1)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(SparseGPT, "prune", counting)
    return calls


def n_finished(out: Path) -> int:
    return len(list((out / "progress").glob("layer_*.safetensors")))


MOMENTS: dict[str, tuple[Callable[[Path], bool], dict[str, float], bool]] = {
    "recipe written": (lambda out: (out / "recipe.yaml").exists(), {"layers": 0.05}, False),
    "one layer": (lambda out: n_finished(out) >= 1, {"layers": 0.01}, False),
    "five layers": (lambda out: n_finished(out) >= 5, {"layers": 0.01}, False),
    "five layers, hidden states kept": (lambda out: n_finished(out) >= 5, {"layers": 0.01}, True),
    "all layers": (lambda out: n_finished(out) == N_LAYERS, {"layers": 0.01, "masks": 9}, False),
    "model half written": (lambda out: (out / "model.partial").exists(), {"model": 0.05}, False),
    "model written": (lambda out: (out / "model").exists(), {"card": 9}, False),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_run_again(moment, model, undisturbed, pruned_again, tmp_path):
    out = tmp_path / "run"
    come, pause, keep_hidden = MOMENTS[moment]
    process = start(model, out, pause, keep_hidden=keep_hidden)
    wait_for(lambda: come(out), process)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (out / "results.json").exists()
    finished = n_finished(out)
    if keep_hidden:
        assert (out / "progress/hidden.safetensors").exists()

    results = prune(model, out, "sparsegpt").results
    assert output(out) == undisturbed
    assert len(pruned_again) == LINEARS_PER_LAYER * (N_LAYERS - finished)
    assert results.sessions in (1, 2)  # 1: killed before the first session was counted
    assert sorted(file.name for file in out.iterdir()) == [
        "README.md",
        "calibration.safetensors",
        "masks.safetensors",
        "model",
        "recipe.yaml",
        "results.json",
    ]


def test_interrupted_and_run_again(model, undisturbed, tmp_path):
    out = tmp_path / "run"
    process = start(model, out, {"layers": 0.02})
    wait_for(lambda: n_finished(out) >= 2, process)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode not in (0, -signal.SIGKILL)
    assert not looks_whole(out)
    prune(model, out, "sparsegpt")
    assert output(out) == undisturbed


def test_interrupted_while_the_model_is_written(model, undisturbed, tmp_path):
    out = tmp_path / "run"
    process = start(model, out, {"model": 0.05})
    wait_for(lambda: (out / "model.partial").exists(), process)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert not (out / "model").exists() and not (out / "model.partial").exists()
    prune(model, out, "sparsegpt")
    assert output(out) == undisturbed


def test_a_finished_run_repeated_changes_no_file(model, tmp_path):
    out = tmp_path / "run"
    prune(model, out, "sparsegpt")
    before, written = hashes(out), mtimes(out)
    process = start(model, out)
    process.join()
    assert process.exitcode == 0
    assert (hashes(out), mtimes(out)) == (before, written)


def test_two_processes_on_one_folder(model, undisturbed, tmp_path):
    out = tmp_path / "run"
    processes = [start(model, out, {"layers": 0.01}) for _ in range(2)]
    for process in processes:
        process.join()
    assert sorted(process.exitcode for process in processes) == [0, 2]
    assert f"another process is working on {out}" in Path(f"{out}.error").read_text()
    assert output(out) == undisturbed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes, and later changes the size of, a file system of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = False

    def sized(size: str) -> Path:
        nonlocal mounted
        options = f"{'remount,' if mounted else ''}size={size}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
        mounted = True
        return place

    yield sized
    if mounted:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize(
    ("size", "expected"), [("200k", r"cannot write .*layer_0000\d"), ("460k", "model: needs .* bytes")]
)
def test_a_full_disk_is_told_and_with_more_room_the_run_goes_on(size, expected, model, undisturbed, small_disk):
    out = small_disk(size) / "run"
    with pytest.raises(InputError, match=expected):
        prune(model, out, "sparsegpt")
    assert not (out / "results.json").exists() and not (out / "model").exists()
    finished = n_finished(out)
    assert finished > 0
    small_disk("4m")
    results = prune(model, out, "sparsegpt").results
    assert output(out) == undisturbed
    assert results.sessions == 2
