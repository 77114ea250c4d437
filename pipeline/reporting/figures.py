"""Figures as SVG: values over steps, points in groups, bars."""

import io
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

MOST_POINTS = 500  # a line holds no more: longer ones show means of neighbours
MARKED_POINTS = 30  # up to as many are marked each
NARROW = 24  # characters of a label that leave room for another beside it
GREYS = ("0.35", "0.6")
WIDTH, HEIGHT, LEGEND_ROW = 4.6, 2.7, 0.2  # inches
BAR = 0.2  # inches
MOST_OPAQUE, LEAST_OPAQUE = 0.4, 0.06  # of the bands, which many lines share
SIZES = {"*": 11, "D": 7}  # of markers that stand out
Colour = tuple[float, ...]
Limits = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One line.

    Attributes:
        label: its name in the legend.
        values: by step; numbers that are not finite leave a gap.
        lowest: lower edge of a band around it, by step.
        highest: the upper edge.
    """

    label: str
    values: pd.Series
    lowest: pd.Series | None = None
    highest: pd.Series | None = None

    @classmethod
    def of_seeds(cls, label: str, seeds: Sequence[pd.Series]) -> "Line":
        """The mean over seeds in a band from the lowest to the highest, at the steps that all of them have."""
        table = pd.concat([seed for seed in seeds if len(seed)] or [pd.Series(dtype=float)], axis=1, join="inner")
        means = table.mean(axis=1, skipna=False)
        return cls(label, means, table.min(axis=1), table.max(axis=1)) if table.shape[1] > 1 else cls(label, means)


@dataclass(frozen=True)
class Points:
    """Points that look the same.

    Attributes:
        label: their name in the legend.
        x: where they are; one that is not a number parts the line that joins them.
        y: likewise.
        colour: as matplotlib names it.
        marker: matplotlib's sign for their form; an empty one shows the line alone.
        hollow: whether the form is an outline.
        width: of the line that joins them in their order; 0 is none.
        steps: whether the line keeps each value up to the next point.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    marker: str = "o"
    hollow: bool = False
    width: float = 0.0
    steps: bool = False


def draw(
    lines: Sequence[Line], *, levels: Mapping[str, float] | None = None, chosen: int | None = None, log: bool = False
) -> bytes | None:
    """A figure of the lines as SVG, or none where there is nothing to draw.

    Args:
        lines: in the order of their colours.
        levels: values that are the same at every step, by label.
        chosen: a step to be marked.
        log: logarithmic, if all values are above 0.
    """
    if not any(np.isfinite(line.values).any() for line in lines):
        return None
    buffer = io.BytesIO()
    with _canvas(buffer, "step") as axes:
        colours = matplotlib.colormaps["tab10" if len(lines) <= 10 else "tab20"]
        for index, line in enumerate(lines):
            if np.isfinite(line.values).any():
                _draw_line(axes, line, colours(index % colours.N), band=max(MOST_OPAQUE / len(lines), LEAST_OPAQUE))
        for (label, level), grey in zip((levels or {}).items(), GREYS, strict=False):
            if math.isfinite(level):
                axes.axhline(level, label=_text(label), color=grey, linestyle="--", linewidth=1.2)
        if chosen is not None:
            axes.axvline(chosen, label=f"chosen: step {chosen}", color="0.35", linestyle=":", linewidth=1.2)
        axes.ticklabel_format(axis="y", scilimits=(-3, 5))
        if log and all((line.values[np.isfinite(line.values)] > 0).all() for line in lines):
            axes.set_yscale("log")
            _plain_numbers(axes.yaxis)
    return buffer.getvalue()


def scatter(
    groups: Sequence[Points],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    x_limits: Limits | None = None,
    y_limits: Limits | None = None,
    marks: Mapping[str, Sequence[float]] | None = None,
) -> bytes | None:
    """A figure of groups of points as SVG, or none where there is nothing to draw.

    Args:
        groups: later ones lie above earlier ones; those without points have no place in the legend.
        x_label: what the points' x is.
        y_label: what their y is.
        log_x: logarithmic; needs x above 0.
        x_limits: ends of the axis; points beyond them are drawn at the edge, lines leave the figure.
        y_limits: likewise.
        marks: x to be marked by vertical lines, by their name in the legend.
    """
    shown = [group for group in groups if (np.isfinite(group.x) & np.isfinite(group.y)).any()]
    if not shown:
        return None
    buffer = io.BytesIO()
    with _canvas(buffer, x_label) as axes:
        for label, places in (marks or {}).items():
            for index, place in enumerate(places):
                axes.axvline(place, label=_text(label) if index == 0 else None, color="0.35", linestyle=":")
        for group in shown:
            _draw_points(axes, group, x_limits, y_limits)
        axes.set_ylabel(_text(y_label))
        axes.ticklabel_format(axis="y", scilimits=(-3, 5))
        if log_x:
            axes.set_xscale("log")
            _plain_numbers(axes.xaxis)
        elif all(float(x).is_integer() for group in shown for x in group.x if math.isfinite(x)):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if x_limits:
            axes.set_xlim(x_limits)
        if y_limits:
            axes.set_ylim(y_limits)
    return buffer.getvalue()


def bars(names: Sequence[str], series: Mapping[str, Sequence[float]], *, x_label: str) -> bytes | None:
    """A figure of horizontal bars with their values as SVG, the first name on top, or none without names.

    Args:
        names: what the bars stand beside.
        series: for each name a value of 0 or above, by the series' name in the legend.
        x_label: what the values are.
    """
    if not names or not series:
        return None
    buffer = io.BytesIO()
    with _canvas(buffer, x_label, height=1 + BAR * len(names) * (len(series) + 0.5)) as axes:
        thickness = 0.8 / len(series)
        for index, (label, values) in enumerate(series.items()):
            places = np.arange(len(names)) + (index - (len(series) - 1) / 2) * thickness
            drawn = axes.barh(places, values, thickness, label=_text(label))
            axes.bar_label(drawn, fmt="%.2f", padding=3, fontsize="small")
        axes.set_yticks(range(len(names)), [textwrap.fill(name, NARROW).replace("$", r"\$") for name in names])
        axes.invert_yaxis()
        axes.margins(x=0.12, y=0.02)  # room for the values
        axes.grid(visible=False, axis="y")
    return buffer.getvalue()


@contextmanager
def _canvas(buffer: io.BytesIO, x_label: str, height: float = HEIGHT) -> Iterator[Axes]:
    """Axes to draw in; what was drawn is then written to ``buffer`` as SVG.

    Args:
        buffer: where to.
        x_label: what the horizontal axis is.
        height: of the figure without legend, inches.
    """
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report", "axes.spines.top": False}):
        figure = Figure(layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel(_text(x_label))
        axes.spines["right"].set_visible(False)
        axes.grid(alpha=0.3)
        yield axes
        _finish(figure, axes, height)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})


def _plain_numbers(axis: Axis) -> None:
    axis.set_major_formatter(_PlainNumbers())
    axis.set_minor_formatter(_PlainNumbers(minor_thresholds=(1.5, 0.4)))


class _PlainNumbers(LogFormatter):
    """Labels the ticks that its base class does, but as 0.2 instead of 2e-01."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def _draw_line(axes: Axes, line: Line, colour: Colour, *, band: float) -> None:
    values = _thin(line.values)
    marker = "." if len(values) <= MARKED_POINTS else ""
    axes.plot(values.index, values, label=_text(line.label), color=colour, marker=marker, linewidth=1.4)
    if line.lowest is not None and line.highest is not None:
        lowest, highest = _thin(line.lowest), _thin(line.highest)
        axes.fill_between(lowest.index, lowest, highest, color=colour, alpha=band, linewidth=0)


def _draw_points(axes: Axes, group: Points, x_limits: Limits | None, y_limits: Limits | None) -> None:
    x, y = (np.where(np.isfinite(values), values, math.nan) for values in (group.x, group.y))
    if not group.width:
        x = np.clip(x, *x_limits) if x_limits else x
        y = np.clip(y, *y_limits) if y_limits else y
    axes.plot(
        x,
        y,
        label=_text(group.label),
        color=group.colour,
        marker=group.marker,
        markersize=SIZES.get(group.marker, 5),
        markerfacecolor="none" if group.hollow else group.colour,
        linestyle="-" if group.width else "none",
        linewidth=group.width,
        drawstyle="steps-post" if group.steps else "default",
        clip_on=group.width > 0,  # a point at the edge is shown whole
    )


def _finish(figure: Figure, axes: Axes, height: float) -> None:
    labels = axes.get_legend_handles_labels()[1]
    columns = 2 if max(map(len, labels), default=0) <= NARROW else 1
    rows = math.ceil(len(labels) / columns) if len(labels) > 1 else 0
    figure.set_size_inches(WIDTH, height + rows * LEGEND_ROW)
    if rows:
        figure.legend(loc="outside lower center", ncols=columns, fontsize="medium", frameon=False)


def _thin(values: pd.Series) -> pd.Series:
    values = values.where(np.isfinite(values))
    size = math.ceil(len(values) / MOST_POINTS)
    if size < 2:
        return values
    groups = np.arange(len(values)) // size
    steps = pd.Series(values.index, dtype=float).groupby(groups).mean()
    return values.groupby(groups).mean().set_axis(steps)


def _text(label: str) -> str:
    """A label that is not taken for a formula and fits into the figure."""
    return textwrap.fill(label, 2 * NARROW).replace("$", r"\$")
