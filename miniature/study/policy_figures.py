"""Figures of the page of `videoalign study on-policy`."""

import math

from matplotlib.figure import Figure

from ...callbacks.plots import BARS, BLUE, GREEN, ORANGE, SMALL, bars, curve, legend_below, panels, reference_line
from ...models.dimensions import DIMENSIONS, OVERALL
from ...models.intervals import Interval
from .paper_claims import ORACLE, Value
from .paper_findings import Seeds, over_seeds
from .policy_findings import BASE, JUDGES, NAMES, gain
from .policy_size import SHARES
from .policy_units import HELD

COLOURS = dict(zip(JUDGES, (ORANGE, BLUE, GREEN)))
WORDS = {"own": "own reward", HELD: HELD, ORACLE: ORACLE}
_NOTHING = Interval(math.nan, math.nan, math.nan)
_COLUMNS = 5


def figures(found: Seeds) -> dict[str, Figure]:
    """All figures by name.

    Args:
        found: Findings by seed.
    """
    return {"curves": _curves(found), "judges": _judges(found), "dimensions": _dimensions(found)}


def _of(found: Seeds, of: Value) -> Interval:
    return over_seeds(found, of) or _NOTHING


def _curves(found: Seeds) -> Figure:
    """A panel for each algorithm, each with its own scale: gains over the share of the budget, by each judge."""
    names = [name for name in NAMES if name != "nrg"]
    rows = math.ceil(len(names) / _COLUMNS)
    figure = Figure(figsize=(2.5 * _COLUMNS, 2.3 * rows), layout="constrained")
    grid = figure.subplots(rows, _COLUMNS, sharex=True, squeeze=False).flatten()
    for axis, name in zip(grid, names):
        axis.spines[["top", "right"]].set_visible(False)
        for judge in JUDGES:
            values = {
                {BASE: 0.0, **SHARES}[share]: interval
                for share in (BASE, *SHARES)
                if (interval := over_seeds(found, lambda f, n=name, s=share, j=judge: gain(f, s, n, j)))
            }
            if values:
                curve(axis, list(values), list(values.values()), WORDS[judge], color=COLOURS[judge], markersize=3)
        axis.axhline(0, color="#808080", linewidth=0.6)
        axis.set_title(NAMES[name], fontsize=SMALL + 1)
    for axis in grid[len(names) :]:
        axis.set_visible(False)
    for axis in grid[max(0, len(names) - _COLUMNS) : len(names)]:  # the lowest of each column
        axis.tick_params(labelbottom=True)
        axis.set_xlabel("share of the budget", fontsize=SMALL)
    figure.supylabel("gain, deviations of the base", fontsize=SMALL + 1)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower right", fontsize=SMALL + 1)
    return figure


def _judges(found: Seeds) -> Figure:
    """Gains at the whole budget by each judge."""
    figure, (axis,) = panels(size=(7.5, 1.2 + 0.42 * len(NAMES)))
    series = {
        WORDS[judge]: [_of(found, lambda f, n=name, j=judge: gain(f, "full", n, j)) for name in NAMES]
        for judge in JUDGES
    }
    bars(axis, list(NAMES.values()), series, list(COLOURS.values()), horizontal=True)
    reference_line(axis, 0.0, upright=True)
    axis.set(xlabel="gain at the whole budget, deviations of the base")
    legend_below(figure)
    return figure


def _dimensions(found: Seeds) -> Figure:
    """Gains at the whole budget by dimension: the reward model's beside the oracle's."""
    figure, axes = panels(2, (10.5, 1.2 + 0.45 * len(NAMES)))
    for axis, judge in zip(axes, ("own", ORACLE)):
        series = {
            column: [_of(found, lambda f, n=name, j=judge, c=column: gain(f, "full", n, j, c)) for name in NAMES]
            for column in (*DIMENSIONS, OVERALL)
        }
        bars(axis, list(NAMES.values()), series, list(BARS.values()), horizontal=True)
        reference_line(axis, 0.0, upright=True)
        axis.set(title=WORDS[judge], xlabel="gain, deviations of the base")
    legend_below(figure)
    return figure
