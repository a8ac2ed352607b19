"""Finished runs of two-layer models, for tests of what comes after pruning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_models
from nmprune.methods import create
from nmprune.pattern import Pattern
from nmprune.run import CalibrationRecipe, Recipe, prune_run

CALIBRATION = CalibrationRecipe("builtin", 4, 16)


def model(folder: Path, name: str = "llama", **kwargs: Any) -> Path:
    """A saved model with a tokenizer."""
    return tiny_models.save_tokenizer(tiny_models.save(name, folder, **kwargs))


def finished(base: Path, out: Path, method: str = "wanda", pattern: str = "2:4", exclude: tuple[str, ...] = ()) -> Path:
    """A finished run of the model in `base`."""
    recipe = Recipe(str(base), create(method), Pattern.parse(pattern), exclude, CALIBRATION)
    prune_run(recipe, out)
    return out
