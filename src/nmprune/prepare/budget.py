"""One choice per item under a budget, at the least total cost (the multiple-choice knapsack), solved exactly.

Weights of linears come in multiples of large common divisors, so the budget has few distinct levels: a table of items by
levels is small, and dynamic programming over it is exact. Nothing here knows a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Items times levels of the table, one byte each. Past it the levels are made coarser, and the answer is no longer exact.
MAX_CELLS = 1 << 26
_BISECTIONS = 100


@dataclass(frozen=True)
class Solution:
    """What was chosen.

    Attributes:
        choices: per item, the number of its choice.
        kept: what the choices take of the budget together.
        cost: their total cost.
        least_cost: no choices that stay within the budget cost less than this. `cost` may be above it although `exact`,
            since of all choices only those count that use the budget up as far as possible.
        exact: `kept` is the largest total within the budget, and nothing of that total costs less than `cost`.
    """

    choices: tuple[int, ...]
    kept: int
    cost: float
    least_cost: float
    exact: bool


def choose(
    costs: Sequence[Sequence[float]], kept: Sequence[Sequence[int]], budget: int, max_cells: int = MAX_CELLS
) -> Solution:
    """Choose for every item so that the budget is used up as far as it can be, and at that total the cost is least.

    Args:
        costs: item -> choice -> its cost, finite.
        kept: item -> choice -> what it takes of the budget, >= 0; rows as long as those of `costs`.
        budget: what may be taken in all.
        max_cells: size of the table, in items times levels.

    Raises:
        ValueError: even the smallest choices exceed the budget, or a row is empty.
    """
    floor = [min(row) for row in kept]
    room = budget - sum(floor)
    if room < 0:
        raise ValueError(f"the smallest choices take {sum(floor)}, more than the budget of {budget}")
    extra = [[value - least for value in row] for row, least in zip(kept, floor, strict=True)]
    room = min(room, sum(map(max, extra)))
    unit = math.gcd(*(value for row in extra for value in row)) or 1
    exact = len(costs) * (room // unit) <= max_cells
    if not exact:
        # Rounding up keeps every answer within the budget; what it leaves unused is filled below.
        unit = -(-room * len(costs) // max_cells)
    levels = room // unit
    values, table = _fill([[-(-value // unit) for value in row] for row in extra], costs, levels)
    at = int(np.flatnonzero(np.isfinite(values))[-1])
    choices = []
    for picked, row in zip(reversed(table), reversed(extra), strict=True):
        choices.append(int(picked[at]))
        at -= -(-row[choices[-1]] // unit)
    choices.reverse()
    if not exact:
        _use_up(choices, kept, costs, budget)
    cost = math.fsum(row[number] for row, number in zip(costs, choices, strict=True))
    least = float(values.min()) if exact else lower_bound(costs, kept, budget)
    return Solution(tuple(choices), _taken(kept, choices), cost, min(least, cost), exact)


def _fill(steps: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], levels: int) -> tuple[np.ndarray, list]:
    """The least cost at every level 0..levels (infinite where no choices reach it), and per item the choice that led there.

    Of equal costs the earlier choice wins.
    """
    values = np.full(levels + 1, np.inf)
    values[0] = 0.0
    table = []
    for row, cost_row in zip(steps, costs, strict=True):
        best = np.full(levels + 1, np.inf)
        picked = np.zeros(levels + 1, dtype=np.uint8)
        for number, (step, cost) in enumerate(zip(row, cost_row, strict=True)):
            if step > levels:
                continue
            candidate = values[: levels + 1 - step] + cost
            better = candidate < best[step:]
            best[step:][better] = candidate[better]
            picked[step:][better] = number
        values = best
        table.append(picked)
    return values, table


def _use_up(choices: list[int], kept: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], budget: int) -> None:
    """Spend what coarse levels left over: always the largest step that still fits, of equal ones the one that saves most."""
    room = budget - _taken(kept, choices)
    while True:
        fitting = [
            (row[number] - row[now], costs[item][now] - costs[item][number], -item, number)
            for item, (row, now) in enumerate(zip(kept, choices, strict=True))
            for number in range(len(row))
            if 0 < row[number] - row[now] <= room
        ]
        if not fitting:
            return
        step, _, item, number = max(fitting)
        choices[-item] = number
        room -= step


def lower_bound(costs: Sequence[Sequence[float]], kept: Sequence[Sequence[int]], budget: int) -> float:
    """The Lagrangian bound: the largest value of sum_i min_k (cost + price * kept) - price * budget over prices >= 0.

    No choices within the budget cost less, whatever the price; the best price is found by bisection.
    """

    def at(price: float) -> tuple[float, float]:
        rows = [
            min((cost + price * take, take) for cost, take in zip(cost_row, row, strict=True))
            for cost_row, row in zip(costs, kept, strict=True)
        ]
        return math.fsum(value for value, _ in rows) - price * budget, sum(take for _, take in rows)

    low, high = 0.0, 1.0
    while at(high)[1] > budget and high < 1e30:
        high *= 4
    best = at(low)[0]
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        value, taken = at(middle)
        best = max(best, value)
        low, high = (middle, high) if taken > budget else (low, middle)
    return best


def _taken(kept: Sequence[Sequence[int]], choices: Sequence[int]) -> int:
    return sum(row[number] for row, number in zip(kept, choices, strict=True))
