import re
import xml.etree.ElementTree as ET

import pytest

from nmprune.report import AnalysedRow, CorrelationRow, analysis_tables
from nmprune.report.scatter import Point, scatter_svg

SHARES = (1e-4, 1e-2)


def row(number, role="mlp.up_proj", **changes):
    facts = {
        "name": f"model.layers.{number}.{role}",
        "role": role,
        "n_outputs": 10,
        "calibration_error": None,
        "error": 0.1 * (number + 1),
        "nats": (20.0, 10.0),
        "determines_input": number % 2 == 0,
        "mean_share": 0.25,
        "kept": 0.9,
    }
    return AnalysedRow(**{**facts, **changes})


def test_roles_worst_and_correlations():
    linears = [row(number) for number in range(9)] + [row(0, "mlp.down_proj", calibration_error=0.05)]
    rows = [CorrelationRow("over masks", 1e-3, 7, -0.5, None, -1.0, 1.0), CorrelationRow("x", 1e-3, 2, *[None] * 4)]
    roles, worst, correlation = analysis_tables("runs/first: wanda", "on text", SHARES, linears, rows)
    assert roles.title == "runs/first: wanda; on text"
    assert [line[0] for line in roles.rows] == ["mlp.up_proj", "mlp.down_proj"]
    assert roles.rows[0] == ("mlp.up_proj", "9", "", "0.5000", "2.000", "1.000", "5", "25.0%", "90.0%")
    assert roles.rows[1][2] == "0.0500" and roles.total[1] == "10"
    assert len(worst.rows) == 8 and worst.rows[0][0] == "model.layers.8.mlp.up_proj"
    assert len(worst.columns) == len(worst.rows[0])
    assert correlation.rows[0] == ("over masks", "0.001", "7", "-0.500", "", "-1.000 to +1.000")
    assert correlation.rows[1][3:] == ("", "", "")
    assert (
        len(analysis_tables("", "", SHARES, linears[:3], rows)) == 2
    )  # all of a few linears are in the first table's means


def circles(svg):
    return list(ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}circle"))


def test_dots_lie_where_the_axes_say():
    points = [Point(0.01, 0.0, "a", "first"), Point(1.0, 8.0, "b", "second <&>"), Point(0.1, 4.0, "", "third")]
    svg = scatter_svg("title", "x", "y", points, "note")
    dots = circles(svg)[:3]
    assert [dot[0].text for dot in dots] == ["third", "first", "second <&>"]  # grey ones behind
    (x3, y3), (x1, y1), (x2, y2) = ((float(dot.get("cx")), float(dot.get("cy"))) for dot in dots)
    assert x1 < x3 < x2 and x3 == pytest.approx((x1 + x2) / 2, abs=0.1)  # a logarithmic axis
    assert y2 < y3 < y1 and y3 == pytest.approx((y1 + y2) / 2, abs=0.1)
    assert x1 > 80 and x2 < 860 - 230 and y2 > 48 and y1 < 520 - 64
    assert len(circles(svg)) == 3 + 3  # the legend: two kinds, and the others
    labels = [one.text for one in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert {"title", "x", "y", "note", "a", "b", "0.1"} <= set(labels)
    assert not re.search(r"href|url|script|@import", svg)


@pytest.mark.parametrize(
    "points", [[], [Point(0.5, 1.0, "a", "")], [Point(2e-9, -5e6, "a", ""), Point(3e4, 7e6, "b", "")]]
)
def test_any_range_has_a_few_ticks(points):
    svg = scatter_svg("", "x", "y", points)
    lines = len(re.findall("<line ", svg))
    assert 4 <= lines <= 20


def test_more_kinds_than_colours_still_differ():
    svg = scatter_svg("", "x", "y", [Point(0.1 * (i + 1), i, f"kind {i}", "") for i in range(12)])
    looks = {(dot.get("fill"), dot.get("stroke")) for dot in circles(svg)[:12]}
    assert len(looks) == 12
