"""What a learner said, step by step, as curves: one self-contained HTML page, no script, nothing fetched."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from nmprune.report.axes import COLOURS, Axis, frame, text, ticks
from nmprune.report.layout import Table

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 960, 260, 80, 20, 34, 40
_PLACE = ("layer", "step", "total")  # where a row stands; everything else was measured
_MOST_POINTS = 1500  # of a curve; more cannot be told apart on the page

Row = Mapping[str, float]


def curves_html(title: str, rows: Sequence[Row]) -> str:
    """The page.

    Args:
        title: its heading.
        rows: lines of metrics.jsonl, in order: `step`, `layer` where layers are learned one by one, and any numbers.
    """
    charts = "\n".join(_chart(name, rows) for name in quantities(rows))
    across = "decoder layer (a layer's steps fill the space up to the next)" if _by_layer(rows) else "step"
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>\n'
        "<style>body{font-family:sans-serif;margin:2em auto;max-width:1000px;color:#222}svg{width:100%;height:auto}</style>\n"
        f"<h1>{escape(title)}</h1>\n<p>{len(rows):,} steps; across: {across}.</p>\n{charts}\n</html>\n"
    )


def quantities(rows: Sequence[Row]) -> list[str]:
    """What was measured at least once, in the order of its first coming."""
    return list(dict.fromkeys(name for row in rows for name in row if name not in _PLACE))


def curves_table(rows: Sequence[Row]) -> Table:
    """Each quantity's first, least, largest and last value."""
    lines = []
    for name in quantities(rows):
        values = [row[name] for row in rows if name in row and math.isfinite(row[name])]
        found = (values[0], min(values), max(values), values[-1]) if values else ()
        lines.append((name, f"{len(values):,}", *(f"{value:.4g}" for value in found), *[""] * (4 - len(found))))
    return Table("learning", ("quantity", "steps>", "first>", "least>", "largest>", "last>"), tuple(lines))


def _by_layer(rows: Sequence[Row]) -> bool:
    return any("layer" in row for row in rows)


def _place(row: Row) -> float:
    """Where a row stands across: its step, or its layer and how far it is through it."""
    return row["layer"] + row["step"] / max(row.get("total", 1), 1) if "layer" in row else row["step"]


def _chart(name: str, rows: Sequence[Row]) -> str:
    points = [(_place(row), row[name], row) for row in rows if name in row and math.isfinite(row[name])]
    x_axis = Axis([_place(row) for row in rows], _LEFT, _WIDTH - _RIGHT)
    y_axis = Axis([value for _, value, _ in points], _HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12">',
        f"<title>{escape(name)}</title>",
        text(_LEFT, 20, name.replace("_", " "), 'font-size="15"'),
        *_frame(x_axis, y_axis),
        *_curves(points, x_axis, y_axis),
        "</svg>",
    ]
    return "\n".join(parts)


def _curves(points: Sequence[tuple[float, float, Row]], x_axis: Axis, y_axis: Axis) -> list[str]:
    """One curve per layer, neighbours in two colours; of very many points every so many."""
    layers: dict[float, list[tuple[float, float]]] = {}
    for x, y, row in points[:: math.ceil(len(points) / _MOST_POINTS) or 1]:
        layers.setdefault(row.get("layer", 0), []).append((x_axis.at(x), y_axis.at(y)))
    parts = []
    for number, places in enumerate(layers.values()):
        colour = COLOURS[number % 2]
        if len(places) == 1:
            parts.append(f'<circle cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="2" fill="{colour}"/>')
        else:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.4"/>')
    return parts


def _frame(x_axis: Axis, y_axis: Axis) -> list[str]:
    x_ticks = [(value, f"{value:g}") for value in ticks(x_axis.low, x_axis.high)]
    y_ticks = [(value, f"{value:.6g}") for value in ticks(y_axis.low, y_axis.high)]
    return frame((_LEFT, _TOP, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM), x_axis, y_axis, x_ticks, y_ticks)
