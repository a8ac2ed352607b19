"""allocation.json: what was measured and chosen, so that a resumed run prunes by the same choice. Format: docs/formats.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nmprune.errors import InputError
from nmprune.prepare.allocation import Allocation, Measured, Unit
from nmprune.prepare.choices import name_of, parse_choices

FORMAT, FORMAT_VERSION = "nmprune-allocation", 1


def to_json(allocation: Allocation, seconds: float) -> str:
    """The text of the file.

    Args:
        allocation: what was found.
        seconds: that it took.
    """
    units = [
        {
            "name": unit.name,
            "layer": unit.layer,
            "role": unit.role,
            "linears": list(unit.linears),
            "weights": unit.n_weights,
            "errors": list(unit.errors),
            "choice": name_of(choice),
        }
        for unit, choice in zip(allocation.units, allocation.chosen, strict=True)
    ]
    raw = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "rule": allocation.rule,
        "choices": [name_of(choice) for choice in allocation.choices],
        "density": allocation.density,
        "weights": allocation.n_weights,
        "budget": allocation.budget,
        "kept": allocation.kept,
        "error": allocation.error,
        "least_error": allocation.least_error,
        "exact": allocation.exact,
        "seconds": seconds,
        "layers": [
            {
                "layer": one.layer,
                "outlier_share": one.outlier_share,
                "keep_ratio": allocation.keep_ratios.get(one.layer),
            }
            for one in allocation.layers
        ],
        "units": units,
    }
    return json.dumps(raw, indent=1) + "\n"


def read(path: Path) -> tuple[Allocation, float]:
    """The allocation that a run found, and the seconds that it took.

    Raises:
        InputError: no such file, or it is damaged or of another version.
    """
    try:
        raw = json.loads(path.read_text())
        if (raw["format"], raw["format_version"]) != (FORMAT, FORMAT_VERSION):
            raise InputError(
                f"{path} is {raw['format']!r} of version {raw['format_version']!r}; expected {FORMAT!r} of version "
                f"{FORMAT_VERSION}. Use the nmprune that wrote it."
            )
        return _allocation(raw), float(raw["seconds"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is damaged ({type(error).__name__}: {error}). Delete it and run the command again: it is measured anew."
        ) from error


def _allocation(raw: dict[str, Any]) -> Allocation:
    choices = parse_choices(raw["choices"])
    by_name = {name_of(choice): choice for choice in choices}
    units = [
        Unit(u["name"], u["layer"], u["role"], tuple(u["linears"]), u["weights"], tuple(u["errors"]))
        for u in raw["units"]
    ]
    layers = tuple(
        Measured(one["layer"], one["outlier_share"], tuple(unit for unit in units if unit.layer == one["layer"]))
        for one in raw["layers"]
    )
    ratios = {one["layer"]: one["keep_ratio"] for one in raw["layers"] if one["keep_ratio"] is not None}
    return Allocation(
        rule=raw["rule"],
        choices=choices,
        density=raw["density"],
        budget=raw["budget"],
        n_weights=raw["weights"],
        kept=raw["kept"],
        error=raw["error"],
        least_error=raw["least_error"],
        exact=raw["exact"],
        layers=layers,
        chosen=tuple(by_name[u["choice"]] for u in raw["units"]),
        keep_ratios=ratios,
    )
