"""The registry: one paper = one file = one line here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from nmprune.errors import InputError, near_matches
from nmprune.methods.alps import Alps
from nmprune.methods.base import PerLinear, Pruned
from nmprune.methods.descent import Descent
from nmprune.methods.dsnot import Dsnot
from nmprune.methods.gblm import Gblm
from nmprune.methods.magnitude import Magnitude
from nmprune.methods.pruner_zero import PrunerZero
from nmprune.methods.ria import Ria
from nmprune.methods.sparsegpt import SparseGPT
from nmprune.methods.wanda import Wanda

METHODS: dict[str, type[PerLinear]] = {
    method.name: method for method in (Magnitude, Wanda, Ria, Gblm, PrunerZero, Dsnot, Descent, SparseGPT, Alps)
}


def find(name: str) -> type[PerLinear]:
    """The method class of that name.

    Raises:
        InputError: no such method; the message lists near matches.
    """
    if name not in METHODS:
        raise InputError(f"there is no method {name!r}. {near_matches(name, METHODS)}")
    return METHODS[name]


def create(name: str, settings: Mapping[str, Any] | None = None) -> PerLinear:
    """A method with some hyper-parameters set and the rest at their defaults.

    Numbers may come as text (from the command line) or as numbers (from a recipe).

    Raises:
        InputError: unknown method or hyper-parameter (near matches are named), or a value of the wrong type.
    """
    method = find(name)
    fields = {f.name: f for f in dataclasses.fields(method)}
    values: dict[str, Any] = {}
    for key, given in (settings or {}).items():
        if key not in fields:
            known = near_matches(key, fields) if fields else "It has none."
            raise InputError(f"method {name} has no hyper-parameter {key!r}. {known}")
        values[key] = _typed(f"{name}.{key}", given, fields[key].default)
    return method(**values)


def _typed(where: str, given: Any, default: Any) -> Any:
    """`given` as the type of the field's default."""
    kind = type(default)
    if kind is bool:
        text = str(given).lower()
        if text in ("true", "1", "yes", "on"):
            return True
        if text in ("false", "0", "no", "off"):
            return False
    else:
        try:
            value = kind(given)
            if kind is not int or float(given) == value:
                return value
        except (TypeError, ValueError, OverflowError):
            pass
    raise InputError(f"{where} is {given!r}; expected a {kind.__name__} such as {default!r}.")


__all__ = ["METHODS", "PerLinear", "Pruned", "create", "find"]
