"""Figures of values over steps, as SVG."""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

MOST_POINTS = 500  # a line holds no more: longer ones show means of neighbours
MARKED_POINTS = 30  # up to as many are marked each
NARROW = 24  # characters of a label that leave room for another beside it
GREYS = ("0.35", "0.6")
WIDTH, HEIGHT, LEGEND_ROW = 4.6, 2.7, 0.2  # inches
MOST_OPAQUE, LEAST_OPAQUE = 0.4, 0.06  # of the bands, which many lines share
Colour = tuple[float, ...]


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
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report", "axes.spines.top": False}):
        figure = Figure(layout="constrained")
        axes = figure.add_subplot()
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
            axes.yaxis.set_major_formatter(_PlainNumbers())
            axes.yaxis.set_minor_formatter(_PlainNumbers(minor_thresholds=(1.5, 0.4)))
        _finish(figure, axes)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


class _PlainNumbers(LogFormatter):
    """Labels the ticks that its base class does, but as 0.2 instead of 2e-01."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def _draw_line(axes: Axes, line: Line, colour: Colour, *, band: float) -> None:
    values = _thinned(line.values)
    marker = "." if len(values) <= MARKED_POINTS else ""
    axes.plot(values.index, values, label=_text(line.label), color=colour, marker=marker, linewidth=1.4)
    if line.lowest is not None and line.highest is not None:
        lowest, highest = _thinned(line.lowest), _thinned(line.highest)
        axes.fill_between(lowest.index, lowest, highest, color=colour, alpha=band, linewidth=0)


def _finish(figure: Figure, axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.spines["right"].set_visible(False)
    axes.grid(alpha=0.3)
    labels = axes.get_legend_handles_labels()[1]
    columns = 2 if max(map(len, labels)) <= NARROW else 1
    rows = math.ceil(len(labels) / columns) if len(labels) > 1 else 0
    figure.set_size_inches(WIDTH, HEIGHT + rows * LEGEND_ROW)
    if rows:
        figure.legend(loc="outside lower center", ncols=columns, fontsize="medium", frameon=False)


def _thinned(values: pd.Series) -> pd.Series:
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
