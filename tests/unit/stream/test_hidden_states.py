from __future__ import annotations

import errno
import os

import pytest
import torch

from nmprune.errors import InputError
from nmprune.stream.hidden_states import HiddenStates

SHAPE = (5, 4, 8)
N_BYTES = 5 * 4 * 8 * 2


def filled(budget: int, folder=None) -> HiddenStates:
    hidden = HiddenStates(SHAPE, torch.bfloat16, torch.device("cpu"), budget, folder)
    generator = torch.Generator().manual_seed(0)
    for batch in hidden.batches(2):
        hidden.put(batch, torch.randn(batch.stop - batch.start, 4, 8, generator=generator))
    return hidden


def test_the_budget_decides_between_memory_and_file(tmp_path):
    assert not HiddenStates(SHAPE, torch.bfloat16, torch.device("cpu"), N_BYTES, tmp_path).on_disk
    assert HiddenStates(SHAPE, torch.bfloat16, torch.device("cpu"), N_BYTES - 1, tmp_path).on_disk


def test_memory_and_file_hold_equal_bits(tmp_path):
    in_memory, in_file = filled(N_BYTES), filled(0, tmp_path)
    assert torch.equal(in_memory.all.view(torch.int16), in_file.all.view(torch.int16))
    for batch in in_memory.batches(3):
        assert torch.equal(in_memory.get(batch), in_file.get(batch))


def test_batches_cover_every_sequence_once_and_the_last_may_be_smaller():
    hidden = filled(N_BYTES)
    assert hidden.batches(2) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert hidden.batches(9) == [slice(0, 5)]


def test_the_file_has_no_name_so_that_a_killed_run_leaves_none(tmp_path):
    hidden = filled(0, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert hidden.all.float().norm() > 0
    hidden.close()
    assert hidden.all.numel() == 0


def test_a_full_disk_is_an_input_error_before_anything_runs(tmp_path, monkeypatch):
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match=rf"budget .*{tmp_path}: No space left on device.*--hidden-budget"):
        filled(0, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_scratch_folder_is_named(tmp_path):
    with pytest.raises(InputError, match=r"absent: No such file or directory"):
        filled(0, tmp_path / "absent")
