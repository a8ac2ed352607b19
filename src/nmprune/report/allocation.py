"""How mixed patterns were allocated, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from nmprune.report.layout import Table
from nmprune.results import AllocationResult


def allocation_table(allocation: AllocationResult) -> Table:
    """How many linears of each role got which pattern; the title says what was asked and what was reached."""
    choices = allocation.choices
    rows = tuple(_row(role, [counts[choice] for choice in choices]) for role, counts in allocation.roles.items())
    sums = [sum(counts[choice] for counts in allocation.roles.values()) for choice in choices]
    return Table(allocation_words(allocation), ("role", *(f"{choice}>" for choice in choices)), rows, _row("all", sums))


def allocation_words(allocation: AllocationResult) -> str:
    """What was asked, what was reached, and how far the choice is from the best, in a line."""
    left = allocation.budget - allocation.kept
    gap = "the budget to the last weight"
    if left:
        why = "the sizes allow no closer" if allocation.exact else "the budget has too many levels to be met exactly"
        gap = f"{left:,} weights below the budget ({why})"
    over = allocation.error / allocation.least_error - 1 if allocation.least_error > 0 else 0.0
    least = "the least that the budget allows" if over < 1e-9 else f"{over:.2%} above the least that the budget allows"
    return (
        f"patterns by {allocation.rule}: density {allocation.density:.4f} of {allocation.density_asked:g} asked, {gap}; "
        f"relative output errors add up to {allocation.error:.4f}, {least}"
    )


def _row(role: str, counts: Sequence[int]) -> tuple[str, ...]:
    return role, *(f"{count:,}" if count else "" for count in counts)
