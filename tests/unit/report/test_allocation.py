from __future__ import annotations

from dataclasses import replace

from nmprune.report import allocation_table, allocation_words
from nmprune.results import AllocationResult

FACTS = AllocationResult(
    rule="owl",
    choices=("1:4", "2:4", "dense"),
    density_asked=0.55,
    density=0.5,
    weights=2000,
    budget=1100,
    kept=1000,
    error=1.5,
    least_error=1.2,
    exact=True,
    roles={"up": {"1:4": 0, "2:4": 1200, "dense": 1}, "down": {"1:4": 3, "2:4": 0, "dense": 0}},
)


def test_linears_are_counted_by_role_and_pattern():
    table = allocation_table(FACTS)
    assert table.heads == ("role", "1:4", "2:4", "dense")
    assert table.rows == (("up", "", "1,200", "1"), ("down", "3", "", ""))
    assert table.total == ("all", "3", "1,200", "1")
    assert table.title == (
        "patterns by owl: density 0.5000 of 0.55 asked, 100 weights below the budget (the sizes allow no closer); relative "
        "output errors add up to 1.5000, 25.00% above the least that the budget allows"
    )


def test_what_was_reached_is_said():
    met = allocation_words(replace(FACTS, kept=1100, error=1.2))
    assert "the budget to the last weight" in met and met.endswith("the least that the budget allows")
    assert "(the budget has too many levels to be met exactly)" in allocation_words(replace(FACTS, exact=False))
    assert "the least" in allocation_words(replace(FACTS, error=0.0, least_error=0.0))
