"""Shortcuts for tests of whole runs."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import nmprune
import tiny_models
from nmprune import PruneResult


def prune(model: Any, out: Path | None, method: Any = "wanda", **kwargs: Any) -> PruneResult:
    """`nmprune.prune` on six short windows of random tokens."""
    return nmprune.prune(model, method, **{"calibration": tiny_models.windows(), "out": out, **kwargs})


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file, by its path inside the folder."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def output(run: Path) -> dict[str, str]:
    """The files that must not differ between two runs of one recipe: masks and model."""
    found = hashes(run)
    return {name: value for name, value in found.items() if name == "masks.safetensors" or name.startswith("model/")}


def mtimes(folder: Path) -> dict[str, int]:
    """When each file was last written."""
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in folder.rglob("*")}


def looks_whole(run: Path) -> bool:
    """Whether anything is there that could be taken for a finished run."""
    return any((run / name).exists() for name in ("results.json", "model", "masks.safetensors"))
