"""Several processes share a run: the same files as one process writes, bit for bit; one that is lost ends it, and it goes on."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import process_groups
import tiny_models
from nmprune.checkpoint import read_masks
from nmprune.methods import create
from runs import output

N_LAYERS = 4
# 13 windows in batches of 2, and what is held out apart: segments of 0 or 1 batch, the last process with less
SETTINGS: dict[str, Any] = {"calibration": tiny_models.windows(13), "stream": {"batch_size": 2}}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("llama", tmp_path_factory.mktemp("llama") / "base", num_hidden_layers=N_LAYERS)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("mixtral", tmp_path_factory.mktemp("mixtral") / "base")


def run(n_processes: int, jobs: list[tuple[Path, Path, str, dict[str, Any]]], dies: Any = None) -> list[int | None]:
    """Exit codes of the processes that do the jobs together."""
    plain = [(str(model), str(out), method, {**SETTINGS, **settings}) for model, out, method, settings in jobs]
    return process_groups.end(process_groups.start(n_processes, process_groups.prune, plain, dies))


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "wanda": ("llama", "wanda", {}),
    "sparsegpt": ("llama", "sparsegpt", {}),
    "descent + reconstruct": ("llama", "descent", {"reconstruct": True}),
    "experts, true sequential": (
        "mixtral",
        "sparsegpt",
        {"stream": {"batch_size": 1, "true_sequential": True, "sum_segments": 5, "min_expert_tokens": 8}},
    ),
    "gradients": ("llama", "gblm", {"stream": {"batch_size": 3, "propagate": "dense"}}),
    "tokens weighted": ("llama", "sparsegpt", {"loss_aware": True}),
    "dense model first": ("llama", "wanda", {"permute": "ffn", "allocate": {"patterns": ["2:4", "1:4", "3:4"]}}),
}


@pytest.fixture(scope="module")
def by_one(llama: Path, mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What one process writes."""
    place = tmp_path_factory.mktemp("by_one")
    models = {"llama": llama, "mixtral": mixtral}
    jobs = [(models[family], place / case, method, settings) for case, (family, method, settings) in CASES.items()]
    assert run(1, jobs) == [0]
    return {case: output(place / case) for case in CASES}


@pytest.mark.parametrize("n_processes", [2, 3])
def test_the_same_files_as_one_process(n_processes, by_one, llama, mixtral, tmp_path):
    models = {"llama": llama, "mixtral": mixtral}
    cases = list(CASES) if n_processes == 2 else ["sparsegpt"]
    jobs = [(models[CASES[case][0]], tmp_path / case, *CASES[case][1:]) for case in cases]
    assert run(n_processes, jobs) == [0] * n_processes
    for case in cases:
        assert output(tmp_path / case) == by_one[case], case


@pytest.mark.parametrize(("dies", "resumed_by"), [(0, 2), (1, 2), (1, 1)])
def test_a_process_is_killed_and_the_run_goes_on(dies, resumed_by, by_one, llama, tmp_path):
    out = tmp_path / "run"
    job = (llama, out, "sparsegpt", {})
    codes = run(2, [job], (dies, "progress/layer_00001.safetensors"))
    assert codes[dies] == -signal.SIGKILL and codes[1 - dies] == 2
    assert Path(f"{out}.error_{1 - dies}").read_text() == (
        f"process {dies} of 2 was lost (killed, out of memory, or its host is gone). Run the same command again: it goes on "
        f"after decoder layer 2 of {N_LAYERS}."
    )
    assert not (out / "results.json").exists()
    kept = sorted((out / "progress").glob("hidden*"))
    assert [file.name for file in kept] == ["hidden_0_of_2.safetensors", "hidden_1_of_2.safetensors"]
    assert run(resumed_by, [job]) == [0] * resumed_by
    assert output(out) == by_one["sparsegpt"]
    assert json.loads((out / "results.json").read_text())["sessions"] == 2


def test_more_processes_than_segments(llama, tmp_path):
    assert run(2, [(llama, tmp_path / "run", "wanda", {"stream": {"sum_segments": 1}})]) == [2, 2]
    texts = [Path(f"{tmp_path / 'run'}.error_{rank}").read_text() for rank in range(2)]
    assert any("2 processes cannot share" in text and "--set stream.sum_segments=2" in text for text in texts)


def test_gradients_of_two_processes_are_those_of_one(tmp_path):
    places = []
    for n_processes in (1, 2):
        places.append(tmp_path / str(n_processes))
        places[-1].mkdir()
        group = process_groups.start(n_processes, process_groups.in_each, "learner_gradients", places[-1])
        assert process_groups.end(group) == [0] * n_processes
    one, first, second = (
        load_file(place / f"gradients_{rank}.safetensors")
        for place, rank in ((places[0], 0), *((places[1], r) for r in (0, 1)))
    )
    assert one.keys() == first.keys() == second.keys() and len(one) == 8
    for name, expected in one.items():
        assert torch.equal(first[name], second[name]), "the same bits in every process"
        assert (first[name] - expected).norm() <= 1e-5 * expected.norm() and expected.norm() > 0, name


LEARNERS: dict[str, dict[str, Any]] = {
    "hyperprune": {},
    "maskllm": {"train": {"steps": 4, "batch_size": 1, "accumulation": 4, "guard": False}},
    "maskpro": {"train": {"steps": 4, "batch_size": 1, "accumulation": 3, "guard": False}},
    "global_descent": {"train": {"steps": 2, "batch_size": 1, "accumulation": 4}},
}


def test_learners_of_two_processes_agree_with_one(llama, tmp_path):
    for n_processes in (1, 2):
        jobs = []
        for name, settings in LEARNERS.items():
            method: Any = create(name, {"steps": 6}) if name == "hyperprune" else name
            jobs.append((llama, tmp_path / f"{name}_{n_processes}", method, settings))
        assert run(n_processes, jobs) == [0] * n_processes
    for name in LEARNERS:
        one, two = (read_masks(tmp_path / f"{name}_{n}" / "masks.safetensors") for n in (1, 2))
        assert one.masks.keys() == two.masks.keys() and one.masks
        differ = [
            (one.mask(linear) != two.mask(linear)).unflatten(-1, (-1, 4)).any(-1).flatten() for linear in one.masks
        ]
        assert torch.cat(differ).float().mean() <= 0.01, name
        lines = [(tmp_path / f"{name}_{n}" / "metrics.jsonl").read_text().splitlines() for n in (1, 2)]
        assert len(lines[0]) == len(lines[1]) > 0, "process 0 alone writes"
