"""Our own masks must not change by accident. Inputs are small whole numbers, so scores are exact on any machine."""

import hashlib

import pytest
import torch

from nmprune import masks, methods
from nmprune.pattern import Pattern
from nmprune.stats import InputStats

GOLDEN = {
    ("magnitude", "2:4"): "e091eb77de138118",
    ("magnitude", "1:4"): "75da74a2547b8569",
    ("magnitude", "4:8"): "7eed6875b57f68c9",
    ("magnitude", "8:16"): "b361abb5fa46ca7c",
    ("wanda", "2:4"): "8c2283d248ceee57",
    ("wanda", "1:4"): "a19f9a6a64e75ca5",
    ("wanda", "4:8"): "bb4cb42de4e0885c",
    ("wanda", "8:16"): "3d82b3890ab4f270",
}


def whole_numbers(count, modulus, seed):
    """A linear congruential sequence, the same on every machine."""
    values, state = [], seed
    for _ in range(count):
        state = (1103515245 * state + 12345) % 2**31
        values.append((state >> 16) % modulus)
    return torch.tensor(values, dtype=torch.float32)


def checksum(name, pattern):
    weight = whole_numbers(32 * 96, 41, seed=1).reshape(32, 96) - 20  # many ties, zeros and both signs
    norms = whole_numbers(96, 9, seed=2)  # roots of the statistic; some inputs are dead
    stats = InputStats(7, input_sq_norm=norms.double().square())
    mask = methods.create(name).prune(weight, stats, Pattern.parse(pattern)).mask
    return hashlib.sha256(bytes(masks.pack(mask).tolist())).hexdigest()[:16]


@pytest.mark.parametrize(("name", "pattern"), GOLDEN)
def test_mask_checksum(name, pattern):
    assert checksum(name, pattern) == GOLDEN[name, pattern]
