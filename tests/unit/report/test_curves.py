"""Curves: one page that needs nothing else, every quantity once, numbers that are not finite left out."""

import math
import re
from xml.etree import ElementTree

from nmprune.report.curves import curves_html, curves_table, quantities

LAYERS = [
    {"layer": layer, "step": step, "total": 4, "loss": 1.0 / step + layer, **({"flips": 0.1} if step == 4 else {})}
    for layer in range(3)
    for step in range(1, 5)
]


def drawings(page):
    return [ElementTree.fromstring(one) for one in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def curves(drawing):
    found = [one for one in drawing.iter() if one.tag.endswith("polyline")]
    return [[tuple(map(float, place.split(","))) for place in one.get("points").split()] for one in found]


def test_one_chart_a_quantity_and_one_curve_a_layer():
    page = curves_html("a <run> & more", LAYERS)
    assert "a &lt;run&gt; &amp; more" in page and "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "<script" not in page and "12 steps" in page
    loss, flips = drawings(page)
    assert [one.findtext("{*}title") for one in (loss, flips)] == ["loss", "flips"]
    assert [len(one) for one in curves(loss)] == [4, 4, 4]
    assert not curves(flips) and sum(one.tag.endswith("circle") for one in flips.iter()) == 3
    for curve in curves(loss):
        xs, ys = zip(*curve, strict=True)
        assert list(xs) == sorted(xs) and list(ys) == sorted(ys), "the loss falls, and down the page y grows"


def test_steps_of_the_whole_model_are_one_curve():
    rows = [{"step": step, "loss": float(step)} for step in range(1, 4001)]
    (loss,) = drawings(curves_html("run", rows))
    (curve,) = curves(loss)
    assert 500 < len(curve) <= 1500
    assert "across: step" in curves_html("run", rows)


def test_values_that_are_not_finite_or_all_the_same():
    rows = [{"step": 1, "loss": math.nan, "flat": 2.0}, {"step": 2, "loss": 3.0, "flat": 2.0}]
    page = curves_html("run", rows)
    assert "nan" not in page.lower() and len(drawings(page)) == 2
    table = curves_table([*rows, {"step": 3, "gone": math.inf}])
    assert table.rows[0] == ("loss", "1", "3", "3", "3", "3")
    assert table.rows[1] == ("flat", "2", "2", "2", "2", "2")
    assert table.rows[2] == ("gone", "0", "", "", "", "")


def test_quantities_come_in_the_order_of_their_first_coming():
    assert quantities(LAYERS) == ["loss", "flips"] and quantities([]) == []
