"""How much effort a run may be: documented recipes for whoever names no method. The picks are the benchmarks'."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nmprune.errors import InputError, near_matches


@dataclass(frozen=True)
class Effort:
    """A recipe without a model.

    Attributes:
        words: what it does, in half a sentence.
        recipe: keys of recipe.yaml and their values; what is not here has its default.
    """

    words: str
    recipe: Mapping[str, Any]


DEFAULT_EFFORT = "good"
EFFORTS: dict[str, Effort] = {
    "fast": Effort("better masks by descent; no weight moves", {"method": {"name": "descent"}}),
    "good": Effort(
        "better masks by descent, then weights that make up for what was removed",
        {"method": {"name": "descent"}, "reconstruct": "true"},
    ),
    "best": Effort(
        "masks that a shared network and free scores learn, layer by layer; no weight moves",
        {"method": {"name": "hyperprune"}},
    ),
}


def recipe_of(effort: str) -> dict[str, Any]:
    """The recipe of an effort as plain data, to be completed with a model and whatever else is asked for.

    Raises:
        InputError: no such effort; near matches are named.
    """
    if effort not in EFFORTS:
        raise InputError(f"there is no effort {effort!r}. {near_matches(effort, EFFORTS)}")
    return copy.deepcopy(dict(EFFORTS[effort].recipe))
