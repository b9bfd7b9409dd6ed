"""Figures of the paper's page: means over seeds, with intervals or with the seeds themselves where they are few."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...callbacks.plots import BARS, BLUE, ORANGE, SMALL, bars, curve, legend_below, panels, reference_line
from ...commands.comparison import COLUMNS
from .paper_claims import BETAS, GUIDES, ORACLE, OTHER, RM, SHARES, STRENGTHS, Value, of_share, wins
from .paper_findings import Seeds, over_seeds
from .paper_tables import NAMES, pools
from .rater_tables import rater_figure

SIZE = (6.4, 3.8)
"""Width and height of a figure with one panel, in inches."""


def cell_figure(cell: str, found: Seeds) -> Figure | None:
    """The figure of a cell; None where it has none.

    Args:
        cell: Letter of the cell.
        found: Findings by seed.
    """
    draw: dict[str, Callable[[], Figure]] = {
        "b": lambda: _shares(found),
        "d": lambda: _arms(found, "aligned", NAMES),
        "f": lambda: _betas(found),
        "g": lambda: _guidance(found),
        "i": lambda: _arms(found, "conditions", {arm: arm for arm in pools()}),
        "l": lambda: rater_figure(found),
    }
    return draw[cell]() if cell in draw else None


def _known(
    axis: Axes, found: Seeds, places: Sequence[float], of: Callable[[float], Value], label: str, **style: Any
) -> None:
    """A line through the places at which any seed has a number."""
    known = {place: interval for place in places if (interval := over_seeds(found, of(place)))}
    curve(axis, list(known), list(known.values()), label, **style)


def _shares(found: Seeds) -> Figure:
    figure, (axis,) = panels(size=SIZE)
    for loss, words in (("bt", "BT"), ("reg", "regression")):
        _known(axis, found, (*SHARES, 1.0), lambda share, loss=loss: of_share(loss, share), words)
    axis.set(title="Accuracy over the share of training pairs", xscale="log")
    axis.set(xlabel="share of the pairs", ylabel="mean accuracy without ties")
    axis.legend()
    return figure


def _arms(found: Seeds, cell: str, arms: Mapping[str, str]) -> Figure:
    arms = {arm: words for arm, words in arms.items() if over_seeds(found, wins(cell, arm, ORACLE))}
    figure, axes = panels(2, (10, 1.5 + 0.42 * len(arms)))
    for axis, judge in zip(axes, (RM, ORACLE)):
        series = {
            column: [over_seeds(found, wins(cell, arm, judge, column, OTHER)) for arm in arms] for column in COLUMNS
        }
        bars(axis, list(arms.values()), series, list(BARS.values()), horizontal=True)
        reference_line(axis, 0.5, upright=True)
        axis.set(xlim=(0, 1), title=f"{cell}: by the {judge}", xlabel="wins over the base, other noise")
    legend_below(figure)
    return figure


def _betas(found: Seeds) -> Figure:
    figure, (axis,) = panels(size=SIZE)
    for name, words, colour in (("constant", "constant", BLUE), ("time", "beta (1 - t)^2", ORANGE)):
        for judge, line in ((RM, "solid"), (ORACLE, "dashed")):

            def of(beta: float, name: str = name, judge: str = judge) -> Value:
                return wins("beta", f"{name}-{beta:g}", judge, "TA", OTHER)

            _known(axis, found, BETAS, of, f"{words}, {judge}", color=colour, linestyle=line)
    reference_line(axis, 0.5)
    axis.set(title="Text alignment alone", xscale="log")
    axis.set(xlabel="beta", ylabel="wins over the base in TA, other noise")
    axis.legend(fontsize=SMALL)
    return figure


def _guidance(found: Seeds) -> Figure:
    figure, (axis,) = panels(size=SIZE)
    chosen = {one["tuned"]["nrg"]["strength"] for one in found.values() if "tuned" in one}
    for name in GUIDES:
        _known(
            axis,
            found,
            sorted({*STRENGTHS[1:], *chosen}),
            lambda s, name=name: wins("nrg", f"{name}@{s:g}", ORACLE),
            name,
        )
    reference_line(axis, 0.5)
    axis.set(title="Flow-NRG: wins by the oracle over strength", xscale="log")
    axis.set(xlabel="strength", ylabel="wins over the base, overall, other noise")
    axis.legend(fontsize=SMALL, ncols=2)
    return figure
