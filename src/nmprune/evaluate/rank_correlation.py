"""Spearman's rank correlation: whether two measures put the same things in the same order."""

from __future__ import annotations

import math
from collections.abc import Sequence


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Correlation of the ranks of two measures of the same things, -1..1; equal values share their mean rank.

    Returns:
        None where there is no order to compare: fewer than three things, or all values of a measure equal.

    Raises:
        ValueError: different lengths, or a value is not finite.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} values cannot be of the same things")
    if not all(map(math.isfinite, [*first, *second])):
        raise ValueError("ranks of values that are not finite are asked for")
    if len(first) < 3:
        return None
    middle = (len(first) - 1) / 2
    a, b = ([rank - middle for rank in _ranks(values)] for values in (first, second))
    norm = math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norm if norm else None


def _ranks(values: Sequence[float]) -> list[float]:
    """The place of each value in order, from 0; equal ones get the mean of their places."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        stop = start
        while stop < len(order) and values[order[stop]] == values[order[start]]:
            stop += 1
        for place in order[start:stop]:
            ranks[place] = (start + stop - 1) / 2
        start = stop
    return ranks
