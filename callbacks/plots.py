"""Tables and charts in one style: for terminals and Markdown pages, PNG files and loggers.

Charts are drawn on :class:`matplotlib.figure.Figure` without pyplot, whose backend and list of open figures belong to
the whole process: in a notebook they must stay the notebook's.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..models.dimensions import DIMENSIONS, OVERALL
from ..models.files import new_file
from ..models.intervals import Interval

BLUE, ORANGE, GREEN, RED, GREY = "#4878a8", "#c08840", "#308030", "#b03030", "#808080"
LINES = (BLUE, ORANGE, GREEN, "#8060a0", "#20a0a0", "#a05030", "#c070a0", "#606060")
"""Colours of the lines of a chart, in turn. Red is for what results are held against, such as chance."""
BARS = dict(zip((*DIMENSIONS, OVERALL), ("#88a8c8", "#a8c888", "#d8b878", "#404040")))
"""Colours of bars by column."""
DPI = 110
"""Resolution of PNG files."""
SMALL = 8
"""Font size of legends."""
LEAST_RUNS = 3
"""Runs from which an interval over runs is drawn; of fewer, each run is a point."""


# --- tables -----------------------------------------------------------------------------------------------------------


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for terminals: the first column is aligned to the left, all others to the right."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]

    def padded(line: Sequence[str]) -> str:
        first, *rest = zip(line, widths)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)])

    return "\n".join(padded(line) for line in lines)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; bars inside of cells are escaped."""
    lines = [[cell.replace("|", r"\|") for cell in line] for line in (head, ["---"] * len(head), *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def csv_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as the text of a CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    return text.getvalue()


# --- charts -----------------------------------------------------------------------------------------------------------


def panels(count: int = 1, size: tuple[float, float] = (6.0, 3.6)) -> tuple[Figure, list[Axes]]:
    """A figure with panels beside each other, which share their vertical axis.

    Args:
        count: Number of panels.
        size: Width and height of the whole figure in inches.
    """
    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(1, count, sharey=True, squeeze=False)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_prop_cycle(color=LINES)
    return figure, axes


def bars(
    axis: Axes,
    names: Sequence[str],
    series: Mapping[str, Sequence[Interval]],
    colours: Sequence[str],
    horizontal: bool = False,
) -> None:
    """Groups of bars, one group per name, with intervals. Bars of NaN are left out, and series of nothing else.

    Args:
        axis: The panel to draw in.
        names: Names of the groups, along the axis.
        series: Bars by label; each series has a bar in every group.
        colours: Colours of the series.
        horizontal: Whether bars lie, with the first group at the top.
    """
    drawn = {
        label: (values, colour)
        for (label, values), colour in zip(series.items(), colours)
        if not all(math.isnan(value.mean) for value in values)
    }
    step = min(0.62, 0.8 / max(len(drawn), 1))
    for number, (label, (values, colour)) in enumerate(drawn.items()):
        places = np.arange(len(names)) + step * (number - (len(drawn) - 1) / 2)
        known = [not math.isnan(value.mean) for value in values]
        shown = [value for value in values if not math.isnan(value.mean)]
        error = {
            "xerr" if horizontal else "yerr": _reach(shown),
            "capsize": 2,
            "error_kw": {"linewidth": 0.8},
        }
        draw = axis.barh if horizontal else axis.bar
        draw(places[known], [v.mean for v in shown], 0.95 * step, color=colour, label=label, **error)
        for place, value in zip(places[known], shown):
            if _as_points(value):
                line = [place] * len(value.runs), value.runs
                axis.plot(*(line[::-1] if horizontal else line), "k.", markersize=3)
    ticks, long = range(len(names)), len(names) > 4
    if horizontal:
        axis.set_yticks(ticks, list(names))
        axis.set_ylim(len(names) - 0.45, -0.55)
    else:
        axis.set_xticks(ticks, list(names), rotation=20 if long else 0, ha="right" if long else "center")


def curve(axis: Axes, places: Sequence[float], values: Sequence[Interval], label: str, **style: Any) -> None:
    """A line of means over runs, with intervals, or with the runs themselves where they are few.

    Args:
        axis: The panel to draw in.
        places: Places of the values on the horizontal axis.
        values: Means with their intervals.
        label: Name of the line in the legend.
        style: Arguments of :meth:`matplotlib.axes.Axes.errorbar`, such as ``color``.
    """
    means = [value.mean for value in values]
    drawn = axis.errorbar(places, means, yerr=_reach(values), marker="o", capsize=3, label=label, **style)
    for place, value in zip(places, values):
        if _as_points(value):
            colour = drawn[0].get_color()
            axis.plot([place] * len(value.runs), value.runs, ".", color=colour, markersize=4, alpha=0.6)


def reference_line(axis: Axes, value: float, label: str | None = None, upright: bool = False) -> None:
    """A dashed red line at a value that results are held against.

    Args:
        axis: The panel to draw in.
        value: Where the line is.
        label: Name of the line in the legend, if it is to have one.
        upright: Whether the line is upright, for bars that lie.
    """
    draw = axis.axvline if upright else axis.axhline
    draw(value, color=RED, linestyle="dashed", linewidth=0.9, label=label)


def distribution(title: str, values: np.ndarray) -> Figure:
    """A histogram.

    Args:
        title: Title of the figure.
        values: Values (N,).
    """
    figure, (axis,) = panels(size=(4.5, 3))
    axis.hist(values, bins=30, color=BLUE)
    axis.set(title=title, ylabel="number")
    return figure


def legend_below(figure: Figure) -> None:
    """The legend of the last panel, below all of them, where it hides no bar."""
    handles, labels = figure.axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=SMALL)


def _as_points(value: Interval) -> bool:
    return 1 < len(value.runs) < LEAST_RUNS


def _reach(values: Sequence[Interval]) -> np.ndarray:
    """(2, N) distances of the ends below and above; 0 where an end is unknown, or where runs are drawn as points."""
    ends = np.array([[value.mean - value.low, value.high - value.mean] for value in values]).reshape(-1, 2)
    few = np.array([0 < len(value.runs) < LEAST_RUNS for value in values], dtype=bool)
    ends[few] = 0
    return np.where(np.isfinite(ends), ends, 0).clip(min=0).T


# --- output -----------------------------------------------------------------------------------------------------------


def save_png(figure: Figure, path: str | Path) -> None:
    """Write a figure as a PNG file, which takes its name when it is whole."""
    with new_file(path) as file:
        figure.savefig(file, dpi=DPI, format="png")


def pixels(figure: Figure) -> np.ndarray:
    """A figure as a picture (H, W, 3) of uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
