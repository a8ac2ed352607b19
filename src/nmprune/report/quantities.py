"""Numbers as people read them. Bytes in powers of 1024, as memory is sold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def size(n_bytes: float) -> str:
    """1536 -> "1.5 KiB"."""
    unit = "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if n_bytes < 1024 or unit == "TiB":
            break
        n_bytes /= 1024
    return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.1f} {unit}"


def duration(seconds: float) -> str:
    """Seconds -> "0.31 s", "12.0 s", "3 min 05 s", "2 h 10 min"."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def shape(sizes: tuple[int, ...]) -> str:
    """(576, 1536) -> "576 x 1536"."""
    return " x ".join(map(str, sizes))


def error(value: float | None) -> str:
    """A relative error with four digits; empty where it was not measured."""
    return "" if value is None else f"{value:.4f}"


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that were measured; None where none was."""
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def settings(values: Mapping[str, Any]) -> list[str]:
    """{"damping": 0.1, "polish": {"sweeps": 2}} -> ["damping 0.1", "polish.sweeps 2"]."""
    words = []
    for key, value in values.items():
        words += [f"{key}.{one}" for one in settings(value)] if isinstance(value, Mapping) else [f"{key} {value}"]
    return words
