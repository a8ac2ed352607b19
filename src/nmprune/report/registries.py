"""What there is to choose from: methods, architectures, text sources. One source each: the registries themselves."""

from __future__ import annotations

import dataclasses
from typing import Any

from nmprune.architectures import FAMILIES, Family
from nmprune.calibration import FILES, SOURCES
from nmprune.methods import METHODS, Method
from nmprune.pattern import Pattern
from nmprune.report.layout import Table

# The patterns that hardware or papers use; what `list` and `inspect` try.
USUAL_PATTERNS = tuple(Pattern(kept, group) for kept, group in ((2, 4), (4, 8), (1, 4), (3, 4), (8, 16)))


def describe_method(method: type[Method]) -> dict[str, Any]:
    """A method's facts as plain data."""
    refused = {str(pattern): method().why_not(pattern) for pattern in USUAL_PATTERNS}
    return {
        "name": method.name,
        "summary": method.summary,
        "paper": method.paper,
        "needs": sorted(method.needs),
        "updates_weights": method.updates_weights,
        "patterns_not_supported": {pattern: reason for pattern, reason in refused.items() if reason},
        "hyper_parameters": [
            {"name": one.name, "default": one.default, "help": one.metadata["help"]}
            for one in dataclasses.fields(method)
        ],
        "presets": {name: dict(settings) for name, settings in method.presets.items()},
    }


def describe_family(family: Family) -> dict[str, Any]:
    """A family's table as plain data."""
    experts = {} if family.experts is None else {"experts": list(family.experts.shared_inputs)}
    return {
        "model_types": list(family.model_types),
        "shared_inputs": [list(roles) for roles in family.shared_inputs],
        **experts,
        "dense": dict(family.dense),
    }


def methods() -> list[dict[str, Any]]:
    """Every registered method."""
    return [describe_method(method) for method in METHODS.values()]


def architectures() -> list[dict[str, Any]]:
    """Every family's table, once."""
    return [describe_family(family) for family in {family.model_types: family for family in FAMILIES.values()}.values()]


def texts() -> list[dict[str, Any]]:
    """Every text source, files last."""
    return [{"spelling": one.spelling, "summary": one.summary} for one in (*SOURCES.values(), FILES)]


def methods_table() -> Table:
    """One row per method."""
    rows = tuple(
        (
            one["name"],
            one["summary"],
            ", ".join(one["needs"]) or "nothing",
            "moved" if one["updates_weights"] else "frozen",
            "; ".join(f"{pattern}: {why.removesuffix('.')}" for pattern, why in one["patterns_not_supported"].items()),
            one["paper"],
        )
        for one in methods()
    )
    return Table("methods", ("method", "what it does", "needs", "kept weights", "cannot do", "paper"), rows)


def hyper_parameters_table() -> Table:
    """One row per hyper-parameter."""
    rows = tuple(
        (f"--set method.{setting['name']}={setting['default']}", one["name"], setting["help"])
        for one in methods()
        for setting in one["hyper_parameters"]
    ) + tuple(
        (f"--preset {preset}", one["name"], ", ".join(f"{key}={value}" for key, value in settings.items()))
        for one in methods()
        for preset, settings in one["presets"].items()
    )
    return Table("hyper-parameters, with their defaults", ("setting", "method", "what it is"), rows)


def architectures_table() -> Table:
    """One row per family."""
    rows = tuple(
        (
            ", ".join(one["model_types"]),
            "; ".join(
                [" ".join(roles) for roles in one["shared_inputs"]] + [f"experts: {e}" for e in one.get("experts", [])]
            ),
            ", ".join(one["dense"]) or "none",
        )
        for one in architectures()
    )
    return Table("architectures (config.json's model_type)", ("model_type", "linears by shared input", "dense"), rows)


def texts_table() -> Table:
    """One row per text source."""
    rows = tuple((one["spelling"], one["summary"]) for one in texts())
    return Table("text sources", ("source", "what it is"), rows)
