from __future__ import annotations

import dataclasses

import pytest
import torch

from nmprune import masks
from nmprune.errors import InputError
from nmprune.methods import Magnitude, SparseGPT
from nmprune.methods.descent import Descent
from nmprune.methods.wanda import Wanda
from nmprune.pattern import Pattern
from nmprune.refine import Polish
from nmprune.stats import InputStats, StatsAccumulator

PATTERNS = [Pattern.parse(text) for text in ("2:4", "1:4", "4:8", "8:16")]
NEEDS = Polish().needs
each_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


def tokens(width=32, n=200):
    generator = torch.Generator().manual_seed(0)
    mix = torch.eye(width) + torch.randn(width, width, generator=generator) / width**0.5
    dense = torch.randn(n, width, generator=generator) @ mix
    return dense + 0.5 * torch.randn(n, width, generator=generator), dense


def statistics(needs=NEEDS):
    sums = StatsAccumulator(32, needs)
    sums.add(*tokens())
    return sums.result()


def linear(pattern, rows=10):
    weight = torch.randn(rows, 32, generator=torch.Generator().manual_seed(5))
    return weight, Magnitude().prune(weight, InputStats(0), pattern)


def objective(weight, mask, target, shrinkage):
    """||X w - T w0||^2 and the loading, in fp64."""
    own, dense = (x.double() for x in tokens())
    goal = (target * dense + (1 - target) * own) @ weight.double().T
    new = (weight * mask).double()
    loading = shrinkage * ((weight.double() - new).square() @ own.square().sum(0)).sum()
    return ((own @ new.T - goal).square().sum() + loading).item()


@each_pattern
@pytest.mark.parametrize("target", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shrinkage", [0.0, 0.5])
def test_the_objective_falls_and_the_mask_stays_legal(pattern, target, shrinkage):
    weight, pruned = linear(pattern)
    before = (weight.clone(), pruned.mask.clone())
    step = Polish(shrinkage=shrinkage, target=target)
    done = step.refine(weight, pruned, statistics(step.needs), pattern)
    assert masks.n_wrong_groups(done.mask, pattern) == 0 and done.weight is None
    was, now = (objective(weight, mask, target, shrinkage) for mask in (pruned.mask, done.mask))
    assert now < 0.99 * was
    assert 0 < done.notes["polish_changed_groups"] <= 1
    output = (tokens()[0] @ weight.T).square().sum().item()
    assert done.notes["polish_objective_fall"] * output == pytest.approx(was - now, rel=1e-3)
    assert torch.equal(weight, before[0]) and torch.equal(pruned.mask, before[1])


@each_pattern
def test_each_sweep_at_most_lowers_it(pattern):
    weight, pruned = linear(pattern)
    values = [objective(weight, pruned.mask, 0.5, 0.5)]
    for sweeps in (1, 2, 12):
        done = Polish(sweeps=sweeps).refine(weight, pruned, statistics(), pattern)
        values.append(objective(weight, done.mask, 0.5, 0.5))
        assert values[-1] <= values[-2] * (1 + 1e-6)
    again = Polish().refine(weight, done, statistics(), pattern)
    assert torch.equal(again.mask, done.mask)
    assert (again.notes["polish_sweeps"], again.notes["polish_changed_groups"]) == (1, 0.0)


def test_from_wandas_mask_it_is_descent():
    weight, _ = linear(PATTERNS[0])
    stats = statistics()
    start = Wanda().prune(weight, stats, PATTERNS[0])
    one, other = Polish().refine(weight, start, stats, PATTERNS[0]), Descent().prune(weight, stats, PATTERNS[0])
    assert torch.equal(one.mask, other.mask)
    assert not torch.equal(one.mask, start.mask)
    assert one.notes == {f"polish_{key}": value for key, value in other.notes.items()}


def test_the_mask_that_came_is_where_it_starts():
    weight, pruned = linear(PATTERNS[0])
    stats = statistics()
    found = [
        Polish(sweeps=1).refine(weight, start, stats, PATTERNS[0]).mask
        for start in (pruned, Wanda().prune(weight, stats, PATTERNS[0]))
    ]
    assert not torch.equal(*found)


def test_moved_weights_go_back_to_the_dense_ones():
    weight, _ = linear(PATTERNS[0])
    stats = statistics()
    moved = SparseGPT().prune(weight, stats, PATTERNS[0])
    done = Polish().refine(weight, moved, stats, PATTERNS[0])
    assert moved.weight is not None and done.weight is None
    assert moved.notes.items() <= done.notes.items()


def test_without_the_dense_models_inputs_the_target_is_the_own_output_and_the_notes_say_so():
    weight, pruned = linear(PATTERNS[0])
    own_only = statistics(Polish(target=0).needs)
    done = Polish(target=1.0).refine(weight, pruned, own_only, PATTERNS[0])
    plain = Polish(target=0).refine(weight, pruned, own_only, PATTERNS[0])
    assert torch.equal(done.mask, plain.mask)
    assert done.notes == {**plain.notes, "polish_target": "own inputs"}


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("shrinkage", -1.0, r"polish\.shrinkage is -1\.0; expected a number >= 0"),
        ("shrinkage", float("inf"), r"polish\.shrinkage is inf"),
        ("target", 2.0, r"polish\.target is 2\.0; expected a number from 0 to 1"),
        ("sweeps", 0, r"polish\.sweeps is 0; expected a whole number >= 1"),
    ],
)
def test_settings_out_of_range(key, value, expected):
    with pytest.raises(InputError, match=expected):
        Polish(**{key: value})


def test_statistics_that_cannot_be_used():
    weight, pruned = linear(PATTERNS[0])
    stats = statistics()
    with pytest.raises(InputError, match="saw no calibration token"):
        Polish().refine(weight, pruned, dataclasses.replace(stats, n_tokens=0), PATTERNS[0])
    with pytest.raises(InputError, match="the statistics belong to another linear"):
        Polish().refine(weight[:, :16], pruned, stats, PATTERNS[0])
    assert Polish().needs == {"input_gram", "cross_gram"} and Polish(target=0).needs == {"input_gram"}
