"""Figures of points and bars: what is drawn, where, and what the legend says."""

import math
import re

import pytest

from pipeline.reporting.figures import HEIGHT, Points, bars, scatter

pytestmark = pytest.mark.usefixtures("no_warnings")
RED, BLUE = "#ff0000", "#0000ff"
AXES = {"x_label": "x", "y_label": "y"}


def places(svg, colour):
    """Where markers of a colour are, in the SVG's units from the top left; the legend's own come last."""
    found = re.findall(r'<use xlink:href="#\w+" x="([\d.]+)" y="([\d.]+)" style="([^"]*)"', svg.decode())
    return [(float(x), float(y)) for x, y, style in found if f"stroke: {colour}" in style]


def texts(svg):
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg.decode())


def frame(svg):
    """Left, top, right and bottom edge of the axes."""
    left, bottom, right, top = re.search(
        r'id="patch_2">\s*<path d="M ([\d.]+) ([\d.]+) \nL ([\d.]+) [\d.]+ \nL [\d.]+ ([\d.]+)', svg.decode()
    ).groups()
    return float(left), float(top), float(right), float(bottom)


def test_points_are_where_their_values_say():
    svg = scatter(
        [Points("red", [0.0, 5.0, 10.0], [1.0, 2.0, 5.0], RED), Points("blue", [2.5], [3.0], BLUE)],
        **AXES,
        x_limits=(0.0, 10.0),
        y_limits=(1.0, 5.0),
    )
    left, top, right, bottom = frame(svg)
    wide, high = right - left, bottom - top
    assert places(svg, RED)[:3] == [
        pytest.approx(place, abs=1e-3) for place in ((left, bottom), (left + wide / 2, bottom - high / 4), (right, top))
    ]
    assert places(svg, BLUE)[0] == pytest.approx((left + wide / 4, bottom - high / 2), abs=1e-3)
    assert {"x", "y", "red", "blue"} <= {*texts(svg)}


def test_points_beyond_the_limits_are_at_the_edge_but_lines_leave_the_figure():
    x, y = [-9.0, 5.0, 99.0], [3.0, -50.0, 99.0]
    limits = {"x_limits": (0.0, 10.0), "y_limits": (1.0, 5.0)}
    svg = scatter([Points("points", x, y, RED), Points("line", x, y, BLUE, width=1.0)], **AXES, **limits)
    left, top, right, bottom = frame(svg)
    edge = [(left, (top + bottom) / 2), ((left + right) / 2, bottom), (right, top)]
    assert places(svg, RED)[:3] == [pytest.approx(place, abs=1e-3) for place in edge]
    assert max(y for _, y in places(svg, BLUE)) > bottom + 100
    cut = re.findall(r"<g clip-path[^>]*>\s*<use[^>]*stroke: (#\w+)", svg.decode())
    assert BLUE in cut and RED not in cut  # a point at the edge is whole


def test_a_logarithmic_axis_has_even_decades_and_plain_numbers():
    svg = scatter([Points("", [1e-3, 1e-2, 1e-1], [1, 2, 3], RED)], **AXES, log_x=True, x_limits=(1e-3, 1e-1))
    left, _, right, _ = frame(svg)
    assert [x for x, _ in places(svg, RED)[:3]] == [
        pytest.approx(x, abs=1e-3) for x in (left, (left + right) / 2, right)
    ]
    assert {"0.001", "0.01", "0.1"} <= {*texts(svg)}


def test_whole_numbers_have_whole_ticks():
    for x in ([0.0], [0.0, 1.0], [0.0, 1.0, math.nan, 2.0]):
        svg = scatter([Points("", x, [1.25] * len(x), RED)], **AXES)
        below = [text for text in texts(svg) if text in {"0", "1", "2"}]
        assert below == [f"{number:g}" for number in x if math.isfinite(number)]
        assert not {"0.5", "0.0", "1.5"} & {*texts(svg)}


def test_a_line_has_gaps_and_steps():
    path = r'<path d="([^"]*)"[^>]*style="[^"]*stroke: #ff0000'
    line = {"colour": RED, "marker": "", "width": 1.0}
    with_gap = scatter([Points("", [1, 2, math.nan, 3, 4], [1, 2, 3, 4, 5], **line)], **AXES)
    assert re.search(path, with_gap.decode())[1].count("M") == 2
    stepped = scatter([Points("", [1, 2, 3], [1, 5, 5], steps=True, **line)], **AXES)
    points = re.findall(r"[ML] ([\d.]+) ([\d.]+)", re.search(path, stepped.decode())[1])
    assert points[0][1] == points[1][1] and points[1][0] == points[2][0]  # along, then up


def test_values_that_are_not_finite_are_left_out():
    values = [1.0, math.nan, math.inf, -math.inf, 2.0]
    for x, y in ((values, [1.0] * 5), ([1.0] * 5, values)):
        svg = scatter([Points("", x, y, RED)], **AXES, x_limits=(0.0, 3.0), y_limits=(0.0, 3.0))
        assert len(places(svg, RED)) == 2
    assert scatter([Points("a", [1.0], [math.nan], RED), Points("b", [], [], RED)], **AXES) is None
    assert scatter([], **AXES, marks={"rung": [1.0]}) is None


def test_the_legend_names_each_group_and_mark_once_and_no_empty_one():
    groups = [Points("some", [1, 2], [1, 2], RED), Points("none", [], [], RED), Points("", [1], [1], BLUE, hollow=True)]
    svg = scatter(groups, **AXES, marks={"$rung_1$": [1.0, 1.5, 2.0]})
    assert texts(svg).count("some") == texts(svg).count("$rung_1$") == 1 and "none" not in texts(svg)
    assert svg.count(b"stroke-dasharray: 1.5,2.475") == 4  # three marks and the legend's
    assert b"fill: none; stroke: #0000ff" in svg or b"fill-opacity: 0; stroke: #0000ff" in svg


def test_bars_stand_below_each_other_with_their_values():
    names = ["first", "second $x_1$ of a very long name", "third"]
    svg = bars(names, {"psnr": [0.5, 0.25, 0.0], "lpips": [0.125, 0.75, 1.0]}, x_label="share")
    found = texts(svg)
    assert {"0.50", "0.25", "0.00", "0.12", "0.75", "1.00", "share", "psnr", "lpips", "first"} <= {*found}
    assert found.index("first") < found.index("third") and "second $x_1$ of a very" in found
    shapes = re.findall(r'd="M ([\d.]+) ([\d.]+) \nL ([\d.]+) [\d.]+ \n[^"]*"[^>]*style="fill: (#\w+)"', svg.decode())
    blue = [(float(y), float(right) - float(left)) for left, y, right, colour in shapes if colour == "#1f77b4"][:3]
    assert blue[0][0] < blue[1][0] < blue[2][0]  # the first one on top
    assert blue[0][1] == pytest.approx(2 * blue[1][1], rel=1e-3) and blue[2][1] == 0


def test_bars_have_room():
    def height(svg):
        return float(re.search(r'height="([\d.]+)pt"', svg.decode())[1]) / 72

    assert height(bars([str(number) for number in range(10)], {"one": [0.5] * 10}, x_label="")) > HEIGHT
    assert bars([], {"one": []}, x_label="") is None and bars(["name"], {}, x_label="") is None
