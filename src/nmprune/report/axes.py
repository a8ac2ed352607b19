"""What drawings share: axes, ticks, lines and words as SVG. No script, no font, nothing fetched."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

# Colours that people with any colour vision tell apart (Okabe and Ito 2008), and two more.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#222222", "#b2a300")


class Axis:
    """Values -> places on the page, with some room at both ends."""

    def __init__(self, values: Sequence[float], start: float, stop: float) -> None:
        low, high = min(values, default=0.0), max(values, default=1.0)
        room = 0.05 * (high - low) or 0.5
        self.low, self.high, self._start, self._stop = low - room, high + room, start, stop

    def at(self, value: float) -> float:
        """The value's place."""
        return self._start + (value - self.low) / (self.high - self.low) * (self._stop - self._start)


def ticks(low: float, high: float) -> list[float]:
    """Four to nine multiples of a round number, from low to high."""
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    while (high - low) / step > 8:
        step *= 2 if (high - low) / (2 * step) > 4 else 2.5
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def decade_ticks(low: float, high: float) -> list[float]:
    """Logarithms of round numbers from 10^low to 10^high: 1, 2 and 5 times powers of ten, fewer over many decades."""
    if high - low < 0.7:
        return [math.log10(value) for value in ticks(10**low, 10**high)]
    steps = (1, 2, 5) if high - low < 2.5 else (1,)
    every = max(1, math.ceil((high - low) / 8))
    powers = [power for power in range(math.floor(low), math.ceil(high) + 1) if power % every == 0]
    marks = [power + math.log10(step) for power in powers for step in steps]
    return [mark for mark in marks if low <= mark <= high]


def line(x1: float, y1: float, x2: float, y2: float) -> str:
    """A thin grey line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#e4e4e4"/>'


def text(x: float, y: float, words: str, how: str = "") -> str:
    """Words at a place; nothing where there are none."""
    return f'<text x="{x:.1f}" y="{y:.1f}" {how}>{escape(words)}</text>' if words else ""


def frame(
    corners: tuple[float, float, float, float],
    x_axis: Axis,
    y_axis: Axis,
    x_ticks: Iterable[tuple[float, str]],
    y_ticks: Iterable[tuple[float, str]],
) -> list[str]:
    """The border of a drawing's area, its grid lines and their labels.

    Args:
        corners: left, top, right, bottom.
        x_axis: where values lie across.
        y_axis: where values lie upwards.
        x_ticks: values and what is written at them.
        y_ticks: the same of the other axis.
    """
    left, top, right, bottom = corners
    parts = [
        f'<rect x="{left}" y="{top}" width="{right - left}" height="{bottom - top}" fill="none" stroke="#888888"/>'
    ]
    for value, label in x_ticks:
        x = x_axis.at(value)
        parts += [line(x, bottom, x, top), text(x, bottom + 17, label, 'text-anchor="middle"')]
    for value, label in y_ticks:
        y = y_axis.at(value)
        parts += [line(left, y, right, y), text(left - 7, y + 4, label, 'text-anchor="end"')]
    return parts
