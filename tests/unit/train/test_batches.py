import torch

from nmprune.train.batches import Batches
from nmprune.train.seeds import generator_of, seed_of


def test_each_sequence_comes_once_before_any_comes_again():
    batches = Batches(n_sequences=7, batch_size=2, accumulation=1, seed=3)
    seen = torch.cat([one for step in range(14) for one in batches.of(step)]).tolist()
    assert len(seen) == 28
    for epoch in range(4):
        assert sorted(seen[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert seen[:7] != seen[7:14]


def test_a_step_is_known_without_those_before_it_and_by_the_seed_alone():
    one, other = Batches(10, 3, 2, 0), Batches(10, 3, 2, 1)
    assert [part.tolist() for part in one.of(5)] == [part.tolist() for part in Batches(10, 3, 2, 0).of(5)]
    assert [part.tolist() for part in one.of(5)] != [part.tolist() for part in other.of(5)]
    assert [len(part) for part in one.of(5)] == [3, 3]


def test_a_step_larger_than_the_text_repeats_it():
    (batch,) = Batches(n_sequences=2, batch_size=5, accumulation=1, seed=0).of(0)
    assert sorted(batch.tolist()) in ([0, 0, 0, 1, 1], [0, 0, 1, 1, 1])


def test_epochs():
    assert Batches(10, 2, 2, 0).epochs(5) == 2.0


def test_seeds_are_a_function_of_all_that_is_said():
    assert seed_of(0, "noise", 1, 2) == seed_of(0, "noise", 1, 2)
    assert (
        len({seed_of(0, "noise", 1, 2), seed_of(0, "noise", 12), seed_of(0, "begin", 1, 2), seed_of(1, "noise", 1, 2)})
        == 4
    )
    assert 0 <= seed_of("x") < 2**63
    assert torch.equal(torch.rand(3, generator=generator_of(5)), torch.rand(3, generator=generator_of(5)))
