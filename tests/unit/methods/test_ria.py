import pytest
import torch

from nmprune.errors import InputError
from nmprune.methods.ria import Ria
from nmprune.pattern import Pattern
from nmprune.stats import InputStats

PATTERN = Pattern(2, 4)


def stats(*sq_norms, n_tokens=3):
    return InputStats(n_tokens, input_sq_norm=torch.tensor(sq_norms, dtype=torch.float64))


def kept(weight, norms, **settings):
    return Ria(**settings).prune(torch.tensor(weight), stats(*norms), PATTERN).mask.int().tolist()


def test_known_answer_relative_to_row_and_column():
    weight = [[4.0, -3.0, 2.0, 1.0], [12.0, 9.0, 0.0, 1.0]]
    # |w|/column: 1/4 1/4 1 1/2, 3/4 3/4 0 1/2; |w|/row: .4 .3 .2 .1, 12/22 9/22 0 1/22
    assert kept(weight, (1, 1, 1, 1)) == [[1, 0, 1, 0], [1, 1, 0, 0]]
    # row 0 scores .65 .55 1.2 .6; a fourth root of 16 makes .6 into 1.2, and .65 is out
    assert kept(weight, (1, 1, 1, 16)) == [[0, 0, 1, 1], [1, 1, 0, 0]]
    assert kept(weight, (1, 1, 1, 16), activation_power=0.0) == [[1, 0, 1, 0], [1, 1, 0, 0]]


def test_the_power_is_of_the_norm_and_not_of_its_square():
    weight = [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]
    # doubling a weight in the first row: its score grows from 1/2 + 1/4 to 2/3 + 2/5, by 1.42
    doubled = [[1.0, 1.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0]]
    assert kept(weight, (16, 16, 16, 1))[0] == [1, 1, 0, 0]
    # the others weigh (s^0.25) 1.3 or 1.6 times more; their own scores sank to 1/2 + 1/5
    assert kept(doubled, (3.0, 3.0, 3.0, 1.0))[0] == [1, 0, 0, 1]
    assert kept(doubled, (6.0, 6.0, 6.0, 1.0))[0] == [1, 1, 0, 0]


def test_rows_and_columns_of_zeros_score_zero():
    weight = [[0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 2.0, 0.0], [0.0, 2.0, 1.0, 0.0]]
    assert kept(weight, (1, 1, 1, 1)) == [[1, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0]]
    assert kept([[0.0] * 4], (0, 0, 0, 0)) == [[1, 1, 0, 0]]


def test_dead_inputs_are_dropped_first_unless_the_activations_are_left_out():
    weight = [[9.0, 9.0, 0.1, 0.1], [1.0, 2.0, 3.0, 4.0]]
    assert kept(weight, (0, 0, 1, 1)) == [[0, 0, 1, 1]] * 2
    assert kept(weight, (0, 0, 0, 1)) == [[1, 0, 0, 1]] * 2
    assert kept(weight, (0, 0, 1, 1), activation_power=0.0)[0] == [1, 1, 0, 0]


def test_nothing_overflows():
    huge = (1e300, 2e300, 1e280, 3e300)
    assert kept([[3e38, -3e38, 3e38, 1e38], [1e-40, 1e-40, 2e-40, 3e-40]], huge, activation_power=50.0) == [
        [0, 1, 0, 1],
        [0, 1, 0, 1],
    ]


def test_statistics_of_another_linear():
    with pytest.raises(InputError, match=r"input_sq_norm has shape \(2,\), but the weight \(1, 4\) has 4 input"):
        Ria().prune(torch.ones(1, 4), stats(1, 1), PATTERN)


@pytest.mark.parametrize("power", [-0.5, float("nan"), float("inf")])
def test_impossible_power(power):
    with pytest.raises(InputError, match=r"ria\.activation_power is .*; expected a number >= 0"):
        Ria(activation_power=power)
