"""A scatter plot as one self-contained SVG: no script, no font, nothing fetched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from nmprune.report.axes import COLOURS, Axis, decade_ticks, frame, text, ticks

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 860, 520, 80, 230, 48, 64


@dataclass(frozen=True)
class Point:
    """One dot.

    Attributes:
        x: > 0: the axis is logarithmic.
        y: any finite number.
        kind: dots of a kind look alike and have one line in the legend; "" = small, grey and behind the others.
        label: shown when the mouse rests on it.
    """

    x: float
    y: float
    kind: str
    label: str


def scatter_svg(title: str, x_label: str, y_label: str, points: Sequence[Point], note: str = "") -> str:
    """The drawing, as the text of an .svg file.

    Args:
        title: above the drawing.
        x_label: of the logarithmic axis.
        y_label: of the other one.
        points: those without a kind are drawn first. Values that are not finite, or x <= 0, must not be among them.
        note: a line under it.
    """
    kinds = list(dict.fromkeys(point.kind for point in points if point.kind))
    x_axis = Axis([math.log10(point.x) for point in points], _LEFT, _WIDTH - _RIGHT)
    y_axis = Axis([point.y for point in points], _HEIGHT - _BOTTOM, _TOP)
    dots = [
        f'<circle cx="{x_axis.at(math.log10(p.x)):.1f}" cy="{y_axis.at(p.y):.1f}" {_look(kinds, p.kind)}>'
        f"<title>{escape(p.label)}</title></circle>"
        for p in sorted(points, key=lambda p: p.kind != "")
    ]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        text(_LEFT, 26, title, 'font-size="16"'),
        *_frame(x_axis, y_axis, x_label, y_label),
        *dots,
        *_legend(kinds, grey=any(not point.kind for point in points)),
        text(_LEFT, _HEIGHT - 8, note, 'fill="#555555"'),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _frame(x_axis: Axis, y_axis: Axis, x_label: str, y_label: str) -> list[str]:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    x_ticks = [(value, f"{10**value:.2g}") for value in decade_ticks(x_axis.low, x_axis.high)]
    y_ticks = [(value, f"{value:g}") for value in ticks(y_axis.low, y_axis.high)]
    parts = frame((_LEFT, _TOP, right, bottom), x_axis, y_axis, x_ticks, y_ticks)
    middle = (_TOP + bottom) / 2
    parts.append(text((_LEFT + right) / 2, bottom + 36, x_label, 'text-anchor="middle"'))
    parts.append(text(24, middle, y_label, f'text-anchor="middle" transform="rotate(-90 24 {middle})"'))
    return parts


def _legend(kinds: Sequence[str], grey: bool) -> list[str]:
    x, parts = _WIDTH - _RIGHT + 24, []
    for row, kind in enumerate([*kinds, *([""] if grey else [])]):
        y = _TOP + 12 + 20 * row
        parts += [f'<circle cx="{x}" cy="{y}" {_look(kinds, kind)}/>', text(x + 14, y + 4, kind or "other masks")]
    return parts


def _look(kinds: Sequence[str], kind: str) -> str:
    if not kind:
        return 'r="2" fill="#c4c4c4"'
    place = kinds.index(kind)
    colour = COLOURS[place % len(COLOURS)]
    filled = (place // len(COLOURS)) % 2 == 0
    return f'r="4" fill="{colour if filled else "none"}" stroke="{colour}" fill-opacity="0.75"'
