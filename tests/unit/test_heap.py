import platform
import resource

import pytest
import torch

from nmprune.heap import keep_freed

ENTRIES = 20_000_000  # 76 MiB: past every threshold of glibc


def faults_of(turns: int) -> int:
    """Pages that the system had to bring for as many tensors, one after the other."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(turns):
        torch.ones(ENTRIES)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library: nothing happens there")
def test_a_loop_gets_its_memory_once_and_after_it_all_is_as_it_was():
    usual = faults_of(8)
    with keep_freed():
        faults_of(16)  # small blocks settle in what was freed: a few turns need more room
        assert faults_of(8) < usual / 3
    assert faults_of(8) > usual / 2


def test_it_ends_as_it_should_when_the_loop_fails():
    with pytest.raises(ValueError, match="the loop's own"), keep_freed():
        raise ValueError("the loop's own")
