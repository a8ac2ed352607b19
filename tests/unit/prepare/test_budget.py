from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmprune.prepare.budget import choose, lower_bound

PROBLEMS = st.lists(
    st.lists(st.tuples(st.floats(0, 10), st.integers(0, 40)), min_size=1, max_size=4), min_size=1, max_size=5
)


def brute_force(costs, kept, budget):
    """(largest total within the budget, least cost at that total, least cost within the budget)."""
    within = []
    for picked in itertools.product(*(range(len(row)) for row in costs)):
        taken = sum(row[k] for row, k in zip(kept, picked, strict=True))
        if taken <= budget:
            within.append((taken, sum(row[k] for row, k in zip(costs, picked, strict=True))))
    most = max(taken for taken, _ in within)
    return most, min(cost for taken, cost in within if taken == most), min(cost for _, cost in within)


@settings(max_examples=300, deadline=None)
@given(PROBLEMS, st.floats(0, 1))
def test_exact_against_brute_force(items, share):
    costs, kept = [[c for c, _ in row] for row in items], [[k for _, k in row] for row in items]
    low, high = sum(map(min, kept)), sum(map(max, kept))
    budget = low + int(share * (high - low))
    found = choose(costs, kept, budget)
    most, cost, least = brute_force(costs, kept, budget)
    assert found.exact
    assert found.kept == most == sum(row[k] for row, k in zip(kept, found.choices, strict=True))
    assert found.cost == pytest.approx(cost, abs=1e-9)
    assert found.least_cost == pytest.approx(least, abs=1e-9)
    assert lower_bound(costs, kept, budget) <= least + 1e-6


@settings(max_examples=200, deadline=None)
@given(PROBLEMS, st.floats(0, 1), st.integers(1, 40))
def test_a_table_that_is_too_small_never_passes_the_budget_and_says_that_it_is_not_exact(items, share, max_cells):
    costs, kept = [[c for c, _ in row] for row in items], [[k for _, k in row] for row in items]
    low, high = sum(map(min, kept)), sum(map(max, kept))
    budget = low + int(share * (high - low))
    found = choose(costs, kept, budget, max_cells)
    most, _, least = brute_force(costs, kept, budget)
    assert found.kept <= most
    assert found.kept == most if found.exact else True
    assert found.least_cost <= least + 1e-6 and found.least_cost <= found.cost
    steps = [row[k] - row[now] for row, now in zip(kept, found.choices, strict=True) for k in range(len(row))]
    assert not [step for step in steps if 0 < step <= budget - found.kept], "something still fits"


def test_a_large_coarse_problem_is_close_to_its_bound():
    n = 400
    kept = [[(997 + 13 * i) * k for k in (1, 2, 3, 4)] for i in range(n)]
    costs = [[(1 + i % 7) * c for c in (9.0, 4.0, 1.0, 0.0)] for i in range(n)]
    budget = sum(row[1] for row in kept)
    found = choose(costs, kept, budget, max_cells=n * 20_000)
    assert not found.exact
    assert 0 <= budget - found.kept < 997
    assert found.least_cost <= found.cost <= 1.01 * found.least_cost


def test_equal_costs_keep_the_first_choice():
    assert choose([[1.0, 1.0]] * 3, [[2, 2]] * 3, 6).choices == (0, 0, 0)


def test_a_budget_below_the_smallest_choices_is_our_bug():
    with pytest.raises(ValueError, match="the smallest choices take 5, more than the budget of 4"):
        choose([[0.0], [0.0]], [[2], [3]], 4)
