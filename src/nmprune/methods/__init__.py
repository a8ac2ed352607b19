"""The registry: one paper = one file = one line here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from nmprune.errors import InputError, near_matches
from nmprune.methods.alps import Alps
from nmprune.methods.base import Method, PerLinear, Pruned
from nmprune.methods.descent import Descent
from nmprune.methods.dsnot import Dsnot
from nmprune.methods.gblm import Gblm
from nmprune.methods.global_descent import GlobalDescent
from nmprune.methods.hyperprune import HyperPrune
from nmprune.methods.magnitude import Magnitude
from nmprune.methods.maskllm import MaskLLM
from nmprune.methods.maskpro import MaskPro
from nmprune.methods.proxsparse import ProxSparse
from nmprune.methods.pruner_zero import PrunerZero
from nmprune.methods.ria import Ria
from nmprune.methods.sparsegpt import SparseGPT
from nmprune.methods.wanda import Wanda

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Magnitude,
        Wanda,
        Ria,
        Gblm,
        PrunerZero,
        Dsnot,
        Descent,
        SparseGPT,
        Alps,
        HyperPrune,
        MaskLLM,
        ProxSparse,
        MaskPro,
        GlobalDescent,
    )
}


def find(name: str) -> type[Method]:
    """The method class of that name.

    Raises:
        InputError: no such method; the message lists near matches.
    """
    if name not in METHODS:
        raise InputError(f"there is no method {name!r}. {near_matches(name, METHODS)}")
    return METHODS[name]


def create(name: str, settings: Mapping[str, Any] | None = None) -> Method:
    """A method with some hyper-parameters set and the rest at their defaults.

    Numbers may come as text (from the command line) or as numbers (from a recipe). The key "preset" names one of the
    method's `presets`; what else is given goes before what the preset says.

    Raises:
        InputError: unknown method, preset or hyper-parameter (near matches are named), or a value of the wrong type.
    """
    method = find(name)
    fields = {f.name: f for f in dataclasses.fields(method)}
    values: dict[str, Any] = {}
    for key, given in _expanded(method, settings or {}).items():
        if key not in fields:
            known = near_matches(key, fields) if fields else "It has none."
            raise InputError(f"method {name} has no hyper-parameter {key!r}. {known}")
        values[key] = _typed(f"{name}.{key}", given, fields[key].default)
    return method(**values)


def _expanded(method: type[Method], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with those of the preset that they name in its place."""
    own = {key: value for key, value in settings.items() if key != "preset"}
    if "preset" not in settings:
        return own
    preset = str(settings["preset"])
    if preset not in method.presets:
        known = near_matches(preset, method.presets) if method.presets else "It has none."
        raise InputError(f"method {method.name} has no preset {preset!r}. {known}")
    return {**method.presets[preset], **own}


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


__all__ = ["METHODS", "Method", "PerLinear", "Pruned", "create", "find"]
