"""A model spread over two processes learns what it learns in one, and each process holds half of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import process_groups
import sharded_runs
from nmprune import masks
from nmprune.distributed import Processes, ProcessLost
from sharded_runs import CASES, KEPT, RESUMED, STEPS, STOP, Found

EXACT = [name for name in CASES if name != "proxsparse in bfloat16"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case as two processes learned it."""
    here = tmp_path_factory.mktemp("sharded")
    for case in CASES.values():
        case.save(here)
    group = process_groups.start(2, sharded_runs.learn_in_each, str(here), list(CASES), None)
    assert process_groups.end(group, 900.0) == [0, 0]
    return here


@pytest.fixture(scope="module")
def by_one(place: Path) -> dict[str, Found]:
    """The same in one process that holds the whole model."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {name: sharded_runs.run(case, place) for name, case in CASES.items()}
    torch.set_num_threads(before)
    return found


def written(place: Path, name: str, rank: int = 0) -> tuple[list[dict[str, float]], Any, dict[str, Tensor]]:
    """(values of each step, what was held, masks)."""
    told = json.loads((place / f"{name}_{rank}.json").read_text())
    return told["values"], told["held"], load_file(place / f"{name}_{rank}.bits")


def share_of_equal_groups(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Of packed 2:4 masks."""
    assert one.keys() == other.keys()
    same = []
    for name, bits in one.items():
        first, second = (masks.unpack(found, (bits.numel() * 2, 4)) for found in (bits, other[name]))
        assert bool((second.sum(-1) == 2).all()), f"{name} is no 2:4 mask"
        same.append((first == second).all(-1))
    return torch.cat(same).double().mean().item()


def assert_close(found: list[dict[str, float]], expected: list[dict[str, float]], tolerance: float) -> None:
    """The same numbers at every step; differences of losses are as exact as the losses are."""
    assert [sorted(one) for one in found] == [sorted(one) for one in expected]
    for one, other in zip(found, expected, strict=True):
        for key, value in one.items():
            absolute = 10 * tolerance if key in ("advantage", "tracker", "soft_hard_gap", "flips") else 1e-9
            assert value == pytest.approx(other[key], rel=tolerance, abs=absolute), (one["step"], key)


@pytest.mark.parametrize("name", EXACT)
def test_every_step_is_that_of_one_process(name, place, by_one):
    values, _, bits = written(place, name)
    assert [one["step"] for one in values] == list(range(STEPS + 1))
    assert_close(values, by_one[name].values, 1e-5)
    assert share_of_equal_groups(bits, by_one[name].bits) >= 0.99
    assert values[-1]["flips"] > 0, "nothing was learned: the comparison says nothing"


def test_state_beside_bfloat16_weights(place, by_one):
    """Its norms stay whole in every process: torch reduces the gradients of one dtype."""
    values, _, bits = written(place, "proxsparse in bfloat16")
    assert_close(values, by_one["proxsparse in bfloat16"].values, 2e-3)
    assert share_of_equal_groups(bits, by_one["proxsparse in bfloat16"].bits) >= 0.99


@pytest.mark.parametrize("name", CASES)
def test_all_processes_come_to_the_same(name, place):
    (first, _, bits), (second, _, others) = (written(place, name, rank) for rank in range(2))
    assert first == second
    assert bits.keys() == others.keys() and all(torch.equal(bits[key], others[key]) for key in bits)


@pytest.mark.parametrize("name", CASES)
def test_each_process_holds_half(name, place):
    held = [written(place, name, rank)[1] for rank in range(2)]
    assert held[0]["all parameters"] == held[1]["all parameters"] > 0
    assert (held[0]["all moments"] > 0) == (name != "maskpro")
    for part in ("parameters", "moments"):
        for one in held:
            assert one[part] <= 0.52 * one[f"all {part}"], part
        assert held[0][part] + held[1][part] >= held[0][f"all {part}"], "something is in no process"


@pytest.mark.parametrize("name", RESUMED)
def test_an_interrupted_run_is_the_uninterrupted_one_bit_for_bit(name, place):
    values, _, bits = written(place, name)
    again, _, others = written(place, f"{name} resumed")
    assert again == values[STOP + 1 :]
    assert all(torch.equal(bits[key], others[key]) for key in bits)


@pytest.mark.parametrize("name", KEPT)
def test_a_snapshot_is_whole(name, place, by_one):
    """It is what one process would have kept, and one process goes on from it."""
    kept, expected = load_file(place / f"{name}.kept"), by_one[name].kept
    assert kept.keys() == expected.keys()
    for key, value in kept.items():
        assert value.shape == expected[key].shape, key
        if key.startswith(("learned:", "adam:")):
            assert (value - expected[key]).norm() <= 1e-4 * expected[key].norm() + 1e-9, key
    found = sharded_runs.run(CASES[name], place, snapshot=kept)
    assert_close(found.values, by_one[name].values[STOP + 1 :], 1e-5)


def test_another_number_of_processes_goes_on(place, by_one, tmp_path):
    """Of three processes two hold 11 of 32 rows and one 10; of 4 experts two hold 2 and one none."""
    names = ["proxsparse", "experts"]
    for name in names:
        CASES[name].save(tmp_path)
    group = process_groups.start(3, sharded_runs.learn_in_each, str(tmp_path), names, str(place))
    assert process_groups.end(group, 900.0) == [0, 0, 0]
    for name in names:
        values, _, bits = written(tmp_path, name)
        assert_close(values, by_one[name].values[STOP + 1 :], 1e-5)
        assert share_of_equal_groups(bits, by_one[name].bits) >= 0.99


class _Knows:
    """A lifeline that knows, or does not, that a process was lost."""

    def __init__(self, verdict: str | None) -> None:
        self._verdict, self.told = verdict, False

    def verdict(self, seconds: float) -> str | None:
        return self._verdict


@pytest.mark.parametrize("lost", ["process 1 of 2 was lost", None])
def test_an_error_of_a_library_is_ours_only_where_a_process_was_lost(lost):
    processes = Processes(0, 2, resume_hint="it goes on after step 3 of 4", _lifeline=_Knows(lost))
    with pytest.raises(ProcessLost if lost else RuntimeError) as error, processes.in_a_library():
        raise RuntimeError("Connection reset by peer")
    words = "process 1 of 2 was lost. Run the same command again: it goes on after step 3 of 4."
    assert str(error.value) == (words if lost else "Connection reset by peer")
