"""Which linear gets which pattern: chosen from measured errors so that all together meet one budget of kept weights.

The rules choose; `unit_errors` measures. docs/allocation.md says what is minimised and why.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

from nmprune.prepare.budget import choose
from nmprune.prepare.choices import Choice, check_density, n_kept
from nmprune.prepare.owl import keep_ratios

RULES = ("error", "owl")


@dataclass(frozen=True)
class Unit:
    """What gets one pattern: a linear, or all experts of one kind in a decoder layer.

    Attributes:
        name: the linear's, or of the experts together.
        layer: 0-based decoder layer.
        role: place in the decoder layer.
        linears: names of its linears.
        n_weights: of them together.
        errors: per choice of the set, the relative output error on the calibration tokens; 0 for staying dense.
    """

    name: str
    layer: int
    role: str
    linears: tuple[str, ...]
    n_weights: int
    errors: tuple[float, ...]


@dataclass(frozen=True)
class Measured:
    """What the dense pass found in one decoder layer.

    Attributes:
        layer: 0-based decoder layer.
        outlier_share: OWL's, 0..1.
        units: in order of execution.
    """

    layer: int
    outlier_share: float
    units: tuple[Unit, ...]


@dataclass(frozen=True)
class Allocation:
    """A choice for every unit.

    Attributes:
        rule: "error" or "owl".
        choices: the set, sparsest first.
        density: as asked, 0..1.
        budget: weights that may be kept: density * n_weights, rounded down.
        n_weights: of all units.
        kept: weights that are kept, units that stay dense included; at most `budget`.
        error: sum of the chosen errors.
        least_error: no allocation within the budget has a smaller sum (by rule "owl", `error` may well be larger).
        exact: `kept` is the largest total that the sizes allow within the budget, and for rule "error", nothing of that
            total has a smaller sum.
        layers: what was measured.
        chosen: per unit, in order, its choice.
        keep_ratios: by decoder layer, what OWL asked for; empty for rule "error".
    """

    rule: str
    choices: tuple[Choice, ...]
    density: float
    budget: int
    n_weights: int
    kept: int
    error: float
    least_error: float
    exact: bool
    layers: tuple[Measured, ...]
    chosen: tuple[Choice, ...]
    keep_ratios: dict[int, float]

    @property
    def units(self) -> list[Unit]:
        """All units, in order."""
        return [unit for layer in self.layers for unit in layer.units]

    @property
    def by_linear(self) -> dict[str, Choice]:
        """Linear name -> its choice."""
        pairs = zip(self.units, self.chosen, strict=True)
        return {name: choice for unit, choice in pairs for name in unit.linears}

    def counts(self) -> dict[str, dict[Choice, int]]:
        """Role -> choice -> how many linears got it, choices in the order of the set."""
        found: dict[str, dict[Choice, int]] = {}
        for unit, choice in zip(self.units, self.chosen, strict=True):
            row = found.setdefault(unit.role, dict.fromkeys(self.choices, 0))
            row[choice] += len(unit.linears)
        return found


def budget_of(density: float, n_weights: int) -> int:
    """Weights that may be kept, rounded down; the density counts as the decimal number that it is written as."""
    return math.floor(Fraction(repr(density)) * n_weights)


def allocate(
    layers: Sequence[Measured],
    choices: Sequence[Choice],
    density: float,
    rule: str = "error",
    *,
    owl_lambda: float = 0.08,
) -> Allocation:
    """Choose for every unit.

    Rule "error" minimises the sum of the units' errors. Rule "owl" first gives every decoder layer its share of the budget
    by its outliers; what rounding to patterns leaves over is passed on to the next layer; inside a layer the errors choose.
    Both use the budget up as far as the sizes allow, and never pass it.

    Args:
        layers: what was measured, with errors in the order of `choices`.
        choices: the set, sparsest first.
        density: share of the units' weights to keep, 0..1.
        rule: "error" or "owl".
        owl_lambda: half the range of OWL's keep ratios.

    Raises:
        InputError: the density is not between the sparsest and the densest choice.
    """
    check_density(choices, density)
    units = [unit for layer in layers for unit in layer.units]
    n_weights = sum(unit.n_weights for unit in units)
    budget = budget_of(density, n_weights)
    kept = [[n_kept(choice, unit.n_weights) for choice in choices] for unit in units]
    errors = [unit.errors for unit in units]
    best = choose(errors, kept, budget)
    ratios: dict[int, float] = {}
    picked, exact = best.choices, best.exact
    if rule == "owl":
        filled = [layer for layer in layers if layer.units]
        sizes = [sum(unit.n_weights for unit in layer.units) for layer in filled]
        wanted = keep_ratios([layer.outlier_share for layer in filled], sizes, density, owl_lambda)
        ratios = {layer.layer: ratio for layer, ratio in zip(filled, wanted, strict=True)}
        by_layers = _layer_by_layer(units, kept, ratios, budget)
        # The sizes may allow a little more than layers on their own: the least change that gets there.
        moves = [
            [0.0 if number == own else 1.0 + abs(take - row[own]) for number, take in enumerate(row)]
            for row, own in zip(kept, by_layers, strict=True)
        ]
        final = choose(moves, kept, budget)
        picked, exact = final.choices, final.exact
    return Allocation(
        rule=rule,
        choices=tuple(choices),
        density=density,
        budget=budget,
        n_weights=n_weights,
        kept=sum(row[number] for row, number in zip(kept, picked, strict=True)),
        error=math.fsum(row[number] for row, number in zip(errors, picked, strict=True)),
        least_error=best.least_cost,
        exact=exact,
        layers=tuple(layers),
        chosen=tuple(choices[number] for number in picked),
        keep_ratios=ratios,
    )


def _layer_by_layer(
    units: Sequence[Unit], kept: Sequence[Sequence[int]], ratios: dict[int, float], budget: int
) -> list[int]:
    """Per unit the number of its choice: each layer spends what is due up to it and was not spent before."""
    members: defaultdict[int, list[int]] = defaultdict(list)
    for at, unit in enumerate(units):
        members[unit.layer].append(at)
    rows = [[kept[at] for at in members[layer]] for layer in members]
    least_after = list(accumulate((sum(map(min, row)) for row in reversed(rows)), initial=0))[-2::-1]
    most_after = list(accumulate((sum(map(max, row)) for row in reversed(rows)), initial=0))[-2::-1]
    picked: list[int] = []
    spent, due = 0, 0.0
    for (layer, ats), row, least, most in zip(members.items(), rows, least_after, most_after, strict=True):
        due += ratios[layer] * sum(units[at].n_weights for at in ats)
        # the layers after this one must be able to spend the rest, and to do with it
        room = min(max(round(due) - spent, budget - spent - most), budget - spent - least)
        found = choose([units[at].errors for at in ats], row, max(room, sum(map(min, row))))
        picked += found.choices
        spent += found.kept
    return picked
