"""What a linear may be given: a pattern out of a set, or to stay dense. Said in words such as "1:4,2:4,3:4,dense"."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nmprune.errors import InputError
from nmprune.pattern import Pattern

DENSE = "dense"
Choice = Pattern | None
"""A pattern; None = stays dense."""


def name_of(choice: Choice) -> str:
    """ "2:4", or "dense"."""
    return DENSE if choice is None else str(choice)


def density_of(choice: Choice) -> float:
    """Share of weights kept, 0..1."""
    return 1.0 if choice is None else choice.density


def n_kept(choice: Choice, n_weights: int) -> int:
    """How many of a linear's weights it keeps; the linear's width is a whole number of groups."""
    return n_weights if choice is None else n_weights // choice.group * choice.kept


def parse_choices(names: Iterable[str]) -> tuple[Choice, ...]:
    """The set that a recipe names, sparsest first; groups may differ ("2:4", "4:8").

    Raises:
        InputError: a name is no pattern and not "dense", is there twice, or there is only one: nothing to allocate.
    """
    words = [name.strip() for name in names]
    found = [None if word == DENSE else Pattern.parse(word) for word in words]
    double = sorted({name_of(choice) for choice in found if found.count(choice) > 1})
    if double:
        raise InputError(f"{', '.join(double)} is named more than once.")
    if len(found) == 1:
        instead = f"--pattern {words[0]}" if found[0] else "--exclude '*'"
        raise InputError(
            f"{words[0]} alone is not applicable: with one pattern there is nothing to allocate. Say {instead}, or name more, "
            "such as 1:4,2:4,3:4,dense."
        )
    return tuple(sorted(found, key=lambda choice: (density_of(choice), choice.group if choice else 0)))


def check_density(choices: Sequence[Choice], density: float) -> None:
    """Raise InputError unless the density lies between the sparsest and the densest choice, where there is a choice."""
    low, high = density_of(choices[0]), density_of(choices[-1])
    if not low < density < high:
        raise InputError(
            f"density {density:g} leaves nothing to allocate: expected more than {low:g} ({name_of(choices[0])} everywhere) "
            f"and less than {high:g} ({name_of(choices[-1])} everywhere)."
        )
