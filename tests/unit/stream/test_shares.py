"""Whatever the number of processes: each batch is somebody's, once, and segments are closed in their order."""

import itertools

import pytest
import torch

from nmprune.distributed import ALONE, Processes
from nmprune.errors import InputError
from nmprune.stats import SegmentSum
from nmprune.stream.hidden_states import batches
from nmprune.stream.shares import Turn, close_turn, share_of

SIZES = [(13, 2, 1), (6, 1, 0), (32, 4, 2), (9, 4, 4), (8, 3, 0)]


def shares(n_sequences, batch_size, n_apart, n_segments, n_processes):
    return [
        share_of(n_sequences, batch_size, n_apart, n_segments, Processes(rank, n_processes))
        for rank in range(n_processes)
    ]


@pytest.mark.parametrize(("n_sequences", "batch_size", "n_apart"), SIZES)
@pytest.mark.parametrize(("n_segments", "n_processes"), [(1, 1), (8, 1), (4, 2), (8, 3), (3, 3), (8, 2)])
def test_every_batch_is_run_once_and_in_the_order_of_one_process(
    n_sequences, batch_size, n_apart, n_segments, n_processes
):
    expected = [list(range(one.start, one.stop)) for one in batches(n_sequences, batch_size, n_apart)]
    if n_processes > len(expected):
        pytest.skip("more processes than batches")
    found = shares(n_sequences, batch_size, n_apart, n_segments, n_processes)
    assert len({len(one.turns) for one in found}) == 1
    in_order = []
    for turns in zip(*(one.turns for one in found), strict=True):
        assert len({turn.holders for turn in turns}) == 1
        assert turns[0].holders == tuple(rank for rank, turn in enumerate(turns) if turn.batches)
        for share, turn in zip(found, turns, strict=True):
            in_order += [share.sequences[batch].tolist() for batch in turn.batches]
    assert in_order == expected
    for share in found:
        assert share.batches == batches(len(share.sequences), batch_size, share.n_held_out)
        held_out = share.sequences >= n_sequences - n_apart
        assert held_out.sum() == share.n_held_out and held_out.sort().values.equal(held_out)


def test_a_segments_batches_do_not_depend_on_how_many_processes_there_are():
    def segments(n_processes):
        found = shares(13, 1, 1, 6, n_processes)
        return [
            one.sequences[torch.tensor([batch.start for batch in turn.batches])].tolist()
            for turns in zip(*(share.turns for share in found), strict=True)
            for one, turn in zip(found, turns, strict=True)
            if turn.batches
        ]

    assert segments(1) == segments(2) == segments(3) == segments(5)
    assert [len(one) for one in segments(1)] == [2, 2, 2, 2, 2, 3]


def test_local_numbers():
    own = shares(13, 2, 1, 4, 2)
    for share in own:
        assert share.local(share.sequences).tolist() == list(range(len(share.sequences)))
    asked = torch.tensor([12, 3, 0, 7])
    places = [[int(share.sequences[at]) for at in share.local(asked)] for share in own]
    assert sorted(itertools.chain(*places)) == [0, 3, 7, 12]
    assert all(one == [number for number in asked.tolist() if number in one] for one in places)
    assert share_of(5, 2, 0, 8, ALONE).local(torch.tensor([4, 1])).tolist() == [4, 1]


def test_with_fewer_batches_than_segments_every_process_has_sequences():
    found = shares(8, batch_size=2, n_apart=0, n_segments=8, n_processes=2)
    assert [one.sequences.tolist() for one in found] == [[0, 1, 4, 5], [2, 3, 6, 7]]


@pytest.mark.parametrize(("n_segments", "batch_size"), [(2, 1), (8, 4)])
def test_more_processes_than_pieces(n_segments, batch_size):
    with pytest.raises(InputError, match=r"3 processes cannot share .*Start fewer, or .*stream.sum_segments=3"):
        share_of(8, batch_size, 0, n_segments, Processes(0, 3))


def test_segments_are_summed_and_their_sums_added_in_order():
    def zeros():
        return [torch.zeros(3)]

    values = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1e3, 1e6])
    by_segment, all_at_once = SegmentSum(zeros), SegmentSum(zeros)
    for segment in values:
        for value in segment:
            by_segment.segment()[0] += value
            all_at_once.segment()[0] += value
            by_segment.n_segment += 5
        close_turn([(by_segment, (0,))], Turn((), (0,)), ALONE)
    assert (by_segment.n_total, by_segment.n_segment) == (40, 0)
    first, second, third, fourth = (one + other for one, other in values)
    found = by_segment.take()[0]
    assert torch.equal(found, ((first + second) + third) + fourth)
    assert not torch.equal(found, all_at_once.take()[0]), "the order of fp32 additions matters"
    assert by_segment.take()[0].tolist() == [0, 0, 0]
