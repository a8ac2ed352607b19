"""How far a run is, told to whoever wants to show it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        stage: "open", "calibrate", "layers", "masks", "model" or "done".
        done: parts finished; layers (with a fraction for the layer in work) or bytes.
        total: of them; 0 where there is nothing to count.
        text: a line for a log, where something worth one happened; else empty.
    """

    stage: str
    done: float = 0
    total: float = 0
    text: str = ""


Report = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """The report of a caller who wants none."""
