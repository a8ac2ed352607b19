import pytest
import torch

from nmprune.errors import InputError
from nmprune.methods.wanda import Wanda
from nmprune.pattern import Pattern
from nmprune.stats import InputStats

PATTERN = Pattern(2, 4)


def stats(*sq_norms, n_tokens=3):
    return InputStats(n_tokens, input_sq_norm=torch.tensor(sq_norms, dtype=torch.float64))


def test_known_answer_the_norm_is_the_root():
    weight = torch.tensor([[4.0, -3.0, 2.0, 1.0]])
    # |w| * sqrt(s) = 4, 3, 4, 5: the tie goes to index 0; without the root, 4, 3, 8, 25 would keep 2 and 3
    assert Wanda().prune(weight, stats(1, 1, 4, 25), PATTERN).mask.tolist() == [[True, False, False, True]]


def test_dead_inputs_are_dropped_first_and_tie_to_the_lower_index():
    weight = torch.tensor([[9.0, 9.0, 0.1, 0.1], [1.0, 2.0, 3.0, 4.0]])
    assert Wanda().prune(weight, stats(0, 0, 1, 1), PATTERN).mask.tolist() == [[False, False, True, True]] * 2
    assert Wanda().prune(weight, stats(0, 0, 0, 1), PATTERN).mask.tolist() == [[True, False, False, True]] * 2
    assert Wanda().prune(weight, stats(0, 0, 0, 0), PATTERN).mask.tolist() == [[True, True, False, False]] * 2


def test_the_gram_matrix_serves_as_well():
    weight = torch.tensor([[4.0, -3.0, 2.0, 1.0]])
    gram = InputStats(3, input_gram=torch.diag(torch.tensor([1.0, 1.0, 4.0, 25.0])))
    assert torch.equal(
        Wanda().prune(weight, gram, PATTERN).mask, Wanda().prune(weight, stats(1, 1, 4, 25), PATTERN).mask
    )


def test_statistics_of_another_linear():
    with pytest.raises(InputError, match=r"input_sq_norm has shape \(2,\), but the weight \(1, 4\) has 4 input"):
        Wanda().prune(torch.ones(1, 4), stats(1, 1), PATTERN)
