import torch

from nmprune.methods.magnitude import Magnitude
from nmprune.pattern import Pattern
from nmprune.stats import InputStats


def test_known_answer_with_signs_and_ties():
    weight = torch.tensor([[-3.0, 1.0, 2.0, -2.0, 0.0, 0.0, -0.0, 1.0]])
    pruned = Magnitude().prune(weight, InputStats(0), Pattern(2, 4))
    assert pruned.mask.tolist() == [[True, False, True, False, True, False, False, True]]
    assert pruned.weight is None and Magnitude.needs == frozenset()
