"""Where the tests find data that is not part of the package: oracle numbers, small models, texts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def shared(path: str) -> Path:
    """`../shared/<path>` beside the project root, or `$NMPRUNE_SHARED/<path>`; skips the test where it is absent."""
    root = Path(os.environ.get("NMPRUNE_SHARED") or Path(__file__).resolve().parents[2] / "shared")
    place = root / path
    if not place.exists():
        pytest.skip(f"{place} is absent: set NMPRUNE_SHARED to the folder that holds {path}")
    return place
