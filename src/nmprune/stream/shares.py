"""Which calibration sequences are whose, and in which order what the processes add up is put together.

The batches of a run are cut into segments of equal numbers of batches, in order. In each turn every process takes one
segment: with n processes, turn t has segments t n to t n + n - 1. Sums are closed segment by segment, so they do not depend
on how many processes there are, to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nmprune.distributed import Processes
from nmprune.errors import InputError
from nmprune.stats import SegmentSum
from nmprune.stream.hidden_states import batches


@dataclass(frozen=True)
class Turn:
    """One segment for every process, as far as there are enough.

    Attributes:
        batches: of this process's segment, as slices of the process's own sequences; none where it has no segment.
        holders: the processes that have a segment, in the order of the segments.
    """

    batches: tuple[slice, ...]
    holders: tuple[int, ...]


@dataclass(frozen=True)
class Share:
    """The sequences of one process.

    Attributes:
        sequences: int64 (n_own,), numbers of the sequences in the run, in the order of the process's store.
        n_held_out: the last so many of them are held out.
        turns: in this order.
        n_sequences: of the run.
    """

    sequences: Tensor
    n_held_out: int
    turns: tuple[Turn, ...]
    n_sequences: int

    @property
    def batches(self) -> list[slice]:
        """All of the process's batches, as slices of its own sequences."""
        return [batch for turn in self.turns for batch in turn.batches]

    def local(self, sequences: Tensor) -> Tensor:
        """Where in the process's store those of the given sequences lie that are its own, int64, in the given order."""
        place = torch.full((self.n_sequences,), -1)
        place[self.sequences] = torch.arange(len(self.sequences))
        found = place[sequences]
        return found[found >= 0]


def share_of(n_sequences: int, batch_size: int, n_apart: int, n_segments: int, processes: Processes) -> Share:
    """What one of the processes works on.

    Args:
        n_sequences: of the run.
        batch_size: sequences per forward.
        n_apart: the last so many sequences have batches of their own; 0 = none.
        n_segments: into how many segments the batches are cut; never more than there are batches, so that every process has
            some.
        processes: those of the run.

    Raises:
        InputError: there are more processes than batches or segments.
    """
    everything = batches(n_sequences, batch_size, n_apart)
    n_processes = processes.world_size
    if n_processes > min(n_segments, len(everything)):
        raise InputError(
            f"{n_processes} processes cannot share {len(everything)} batches of at most {batch_size} sequences in "
            f"{n_segments} segments. Start fewer, or have more of both: --set stream.sum_segments={n_processes}, a smaller "
            "--set stream.batch_size, or a larger --n-sequences."
        )
    n_segments = min(n_segments, len(everything))
    bounds = [len(everything) * segment // n_segments for segment in range(n_segments + 1)]
    own: list[int] = []
    turns = []
    for first in range(0, n_segments, n_processes):
        cut = [
            everything[bounds[segment] : bounds[segment + 1]]
            for segment in range(first, min(first + n_processes, n_segments))
        ]
        mine = cut[processes.rank] if processes.rank < len(cut) else []
        start = len(own)
        own += [number for batch in mine for number in range(batch.start, batch.stop)]
        turns.append(Turn(_laid(mine, start), tuple(rank for rank, segment in enumerate(cut) if segment)))
    held_out = sum(number >= n_sequences - n_apart for number in own)
    return Share(torch.tensor(own, dtype=torch.int64), held_out, tuple(turns), n_sequences)


def _laid(mine: Sequence[slice], start: int) -> tuple[slice, ...]:
    """Batches of the run as slices of the process's own sequences, from `start` on."""
    found = []
    for batch in mine:
        found.append(slice(start, start + batch.stop - batch.start))
        start = found[-1].stop
    return tuple(found)


def close_turn(sums: Sequence[tuple[SegmentSum, Sequence[int]]], turn: Turn, processes: Processes) -> None:
    """Put one turn's segments together, in order.

    Args:
        sums: every sum, and the processes that get its total.
        turn: which processes have added up a segment.
        processes: those of the run.
    """
    if processes.alone:
        for one, _ in sums:
            one.close_segment()
        return
    counts = processes.gather_counts([one.n_segment for one, _ in sums])
    for number, (one, targets) in enumerate(sums):
        for holder in turn.holders:
            if counts[holder][number]:
                _close(one, holder, targets, counts[holder][number], processes)
        if processes.rank in turn.holders and processes.rank not in targets:
            one.forget_segment()


def _close(one: SegmentSum, holder: int, targets: Sequence[int], count: int, processes: Processes) -> None:
    """Add the segment of process `holder` to the total in each of `targets`."""
    if processes.rank == holder:
        for tensor in one.segment():
            processes.pass_(tensor, holder, targets)
        if holder in targets:
            one.close_segment()
    elif processes.rank in targets:
        for total in one.total():
            part = torch.empty_like(total)
            processes.pass_(part, holder, targets)
            total += part
        one.n_total += count
