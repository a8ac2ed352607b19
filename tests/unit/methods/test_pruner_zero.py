import pytest
import torch

from nmprune.errors import InputError
from nmprune.methods.pruner_zero import PrunerZero
from nmprune.pattern import Pattern
from nmprune.stats import InputStats

PATTERN = Pattern(2, 4)


def stats(gradients, n=3):
    """From g, the root of the sum of squares."""
    return InputStats(0, weight_grad_sq=torch.tensor(gradients).square(), n_grad_sequences=n)


def kept(weight, gradients):
    return PrunerZero().prune(torch.tensor(weight), stats(gradients), PATTERN).mask.int().tolist()


def test_known_answer():
    # over the matrix: min 1, max 5; shares 1/4 1/2 3/4 0 and 1 0 1/2 1/4; times w^2: 4 .5 3 0 and 1 0 8 1
    weight = [[-4.0, 1.0, 2.0, 9.0], [1.0, 9.0, -4.0, 2.0]]
    gradients = [[2.0, 3.0, 4.0, 1.0], [5.0, 1.0, 3.0, 2.0]]
    assert kept(weight, gradients) == [[1, 0, 1, 0], [1, 0, 1, 0]], "1 and 1 in the second row: the lower index"


def test_shares_are_of_gradients_and_not_of_their_squares():
    # shares 1/2 1 0 1, times w^2: 1.125 1 0 9; of squares they would be 1/4 1 0 1
    assert kept([[1.5, 1.0, 9.0, 3.0]], [[1.0, 2.0, 0.0, 2.0]]) == [[1, 0, 0, 1]]


def test_minimum_and_maximum_are_of_the_whole_matrix():
    weight, gradients = [[2.0, 1.9, 1.0, 1.0]], [[2.0, 3.0, 2.1, 2.2]]
    # alone: shares 0 1 .1 .2; beside a row from 0 to 3 they are 2/3 1 .7 .73
    assert kept(weight, gradients) == [[0, 1, 0, 1]]
    assert kept([*weight, [1.0] * 4], [*gradients, [0.0, 1.0, 2.0, 3.0]])[0] == [1, 1, 0, 0]


def test_equal_gradients_tell_nothing_and_the_weights_decide():
    weight = [[1.0, -3.0, 2.0, 0.5]]
    assert kept(weight, [[0.0] * 4]) == kept(weight, [[7.0] * 4]) == [[0, 1, 1, 0]]


def test_a_factor_on_the_gradients_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    weight, gradients = torch.randn(8, 16, generator=generator), torch.rand(8, 16, generator=generator)
    masks = [
        PrunerZero().prune(weight, InputStats(0, weight_grad_sq=gradients * factor, n_grad_sequences=1), PATTERN).mask
        for factor in (1.0, 2.0**20, 2.0**-20)
    ]
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])


def test_gradients_that_cannot_be_used():
    weight = torch.ones(1, 4)
    with pytest.raises(
        InputError, match=r"weight_grad_sq has shape \(1, 2\).*\(1, 4\): the gradients belong to another"
    ):
        PrunerZero().prune(weight, stats([[1.0, 2.0]]), PATTERN)
    with pytest.raises(InputError, match=r"gradients of this linear saw no calibration token"):
        PrunerZero().prune(weight, stats([[1.0] * 4], n=0), PATTERN)
    with pytest.raises(InputError, match=r"weight_grad_sq holds NaN or infinity.*--dtype float32"):
        PrunerZero().prune(weight, stats([[1.0, 2.0, 3.0, float("nan")]]), PATTERN)
