from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmprune.errors import InputError
from nmprune.pattern import Pattern
from nmprune.prepare.allocation import Measured, Unit, allocate, budget_of
from nmprune.prepare.choices import Choice, n_kept

CHOICES: tuple[Choice, ...] = (Pattern(1, 4), Pattern(2, 4), Pattern(3, 4), None)


def layers(units: list[list[tuple[int, float]]], shares: list[float] | None = None) -> list[Measured]:
    """Decoder layers of (weights, how sensitive) units; errors fall convexly to 0 for staying dense."""
    return [
        Measured(
            index,
            shares[index] if shares else 0.0,
            tuple(
                Unit(f"l{index}.{at}", index, f"role{at}", (f"l{index}.{at}",), n, (0.5 * s, 0.2 * s, 0.05 * s, 0.0))
                for at, (n, s) in enumerate(row)
            ),
        )
        for index, row in enumerate(units)
    ]


def test_error_against_brute_force():
    measured = layers([[(16, 1.0), (32, 0.3)], [(16, 0.2), (64, 0.7)], [(32, 2.0)]])
    found = allocate(measured, CHOICES, 0.6)
    budget = math.floor(0.6 * 160)
    best = min(
        (-(kept := sum(n_kept(c, u.n_weights) for u, c in zip(found.units, picked, strict=True))), error, kept)
        for picked in itertools.product(CHOICES, repeat=5)
        if sum(n_kept(c, u.n_weights) for u, c in zip(found.units, picked, strict=True)) <= budget
        for error in [sum(u.errors[CHOICES.index(c)] for u, c in zip(found.units, picked, strict=True))]
    )
    assert (found.kept, found.error) == (best[2], pytest.approx(best[1]))
    assert (found.budget, found.n_weights, found.exact, found.keep_ratios) == (96, 160, True, {})
    assert found.by_linear == {u.name: c for u, c in zip(found.units, found.chosen, strict=True)}


def test_equal_linears_share_the_budget_equally():
    found = allocate(layers([[(64, 1.0)] * 3] * 4), CHOICES, 0.5)
    assert set(found.chosen) == {Pattern(2, 4)}
    assert found.counts() == {f"role{at}": {**dict.fromkeys(CHOICES, 0), Pattern(2, 4): 4} for at in range(3)}


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 6).map(lambda n: 8 * n), st.floats(0.01, 5)), max_size=4),
        min_size=1,
        max_size=5,
    ).filter(lambda rows: any(rows)),
    st.floats(0.26, 0.99),
    st.sampled_from(["error", "owl"]),
    st.data(),
)
def test_the_budget_is_met_as_closely_as_the_sizes_allow(rows, density, rule, data):
    shares = [data.draw(st.floats(0, 0.1)) for _ in rows]
    found = allocate(layers(rows, shares), CHOICES, density, rule, owl_lambda=0.3)
    reachable = {0}
    for unit in found.units:
        reachable = {total + n_kept(choice, unit.n_weights) for total in reachable for choice in CHOICES}
    kept = sum(n_kept(choice, unit.n_weights) for unit, choice in zip(found.units, found.chosen, strict=True))
    assert found.kept == kept == max(total for total in reachable if total <= found.budget)
    assert found.exact and found.least_error <= found.error + 1e-9


def test_owl_moves_weights_to_layers_with_outliers_and_errors_choose_inside():
    rows = [[(64, 1.0), (64, 0.1)]] * 3
    found = allocate(layers(rows, [0.01, 0.02, 0.03]), CHOICES, 0.5, "owl", owl_lambda=0.25)
    assert found.keep_ratios == pytest.approx({0: 0.25, 1: 0.5, 2: 0.75})
    kept = [
        sum(n_kept(c, 64) for u, c in zip(found.units, found.chosen, strict=True) if u.layer == i) for i in range(3)
    ]
    assert kept == [32, 64, 96]
    assert found.chosen[2:] == (Pattern(3, 4), Pattern(1, 4), None, Pattern(2, 4))
    plain = allocate(layers(rows), CHOICES, 0.5)
    assert found.error > plain.error == pytest.approx(found.least_error)


def test_owl_passes_on_what_rounding_leaves():
    """Each layer alone would round 0.55 of 64 down to 2:4; together they keep what was asked."""
    found = allocate(layers([[(64, 1.0)]] * 10), CHOICES, 0.55, "owl")
    assert found.kept == 352 == found.budget
    assert list(found.chosen).count(Pattern(3, 4)) == 2
    assert allocate(layers([[(64, 1.0)]] * 10), CHOICES, 0.6, "owl", owl_lambda=2.0).kept == found.n_weights * 6 // 10


def test_a_budget_counts_the_decimal_number_that_was_written():
    assert budget_of(0.29, 100) == 29  # 0.29 * 100 is 28.999999999999996
    assert budget_of(0.7, 10) == 7


def test_a_density_out_of_reach():
    with pytest.raises(InputError, match="leaves nothing to allocate"):
        allocate(layers([[(64, 1.0)]]), CHOICES, 0.2)
