"""A run on disk and its composition."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nmprune.run.allocate_recipe import AllocateRecipe
    from nmprune.run.folder import RunFolder
    from nmprune.run.machine import Machine
    from nmprune.run.progress import Progress, Report
    from nmprune.run.prune import prune_run
    from nmprune.run.recipe import CalibrationRecipe, Recipe, StreamRecipe, with_settings

# Loaded at first use: checking a recipe or comparing two mask files needs no transformers, which takes seconds to import.
_LAZY = {
    "AllocateRecipe": "nmprune.run.allocate_recipe",
    "CalibrationRecipe": "nmprune.run.recipe",
    "Machine": "nmprune.run.machine",
    "Progress": "nmprune.run.progress",
    "Recipe": "nmprune.run.recipe",
    "Report": "nmprune.run.progress",
    "RunFolder": "nmprune.run.folder",
    "StreamRecipe": "nmprune.run.recipe",
    "prune_run": "nmprune.run.prune",
    "with_settings": "nmprune.run.recipe",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'nmprune.run' has no attribute {name!r}")


__all__ = [
    "AllocateRecipe",
    "CalibrationRecipe",
    "Machine",
    "Progress",
    "Recipe",
    "Report",
    "RunFolder",
    "StreamRecipe",
    "prune_run",
    "with_settings",
]
