"""Table and figure of cell (l), and the rater bias at which one loss overtakes another."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ...callbacks.plots import curve, legend_below, markdown_table, panels, reference_line
from ...models.intervals import bootstrap
from ..world.annotators import POOL, PUBLIC_BIAS
from .paper_findings import Seeds, over_seeds
from .rater_cells import BATCH, PAIRS, STEPS
from .rater_claims import BIASES, SCORED, VOTED, accuracy_at, ahead

BELOW, BEYOND = -1.0, 2 * BIASES[-1]
"""Stand-ins for crossings outside of the measured biases, where only their side is known."""


def crossing(differences: Sequence[float], places: Sequence[float] = BIASES) -> float:
    """The place from which a broken line stays above 0 to its end.

    Args:
        differences: Its values.
        places: Where it has them, rising.

    Returns:
        The place, between two of the given ones; -infinity where the whole line is above 0, infinity where its end is
        not.
    """
    below = [number for number, difference in enumerate(differences) if not difference > 0]
    if not below:
        return -math.inf
    last = below[-1]
    if last == len(places) - 1:
        return math.inf
    share = -differences[last] / (differences[last + 1] - differences[last])
    return places[last] + share * (places[last + 1] - places[last])


def crossing_interval(differences: np.ndarray) -> tuple[float, float, float]:
    """Crossing of the mean line of several seeds, and its 95 % interval.

    Seeds are drawn with replacement (an expanded percentile bootstrap, :func:`~videoalign.models.intervals.bootstrap`),
    because a crossing that lies outside of the measured biases has a side but no value, and so no deviation.

    Args:
        differences: Values (S, P) of S seeds at the biases.

    Returns:
        Crossing, lower and upper end, each perhaps infinite; the ends are NaN with one seed.
    """

    def places(times: np.ndarray) -> np.ndarray:
        means = times @ differences / len(differences)  # (R, P)
        return np.clip([crossing(line) for line in means.tolist()], BELOW, BEYOND)

    ends = bootstrap(places, len(differences))
    low, high = (-math.inf if end < BIASES[0] else math.inf if end > BIASES[-1] else end for end in ends)
    return crossing(differences.mean(0).tolist()), low, high


def rater_table(found: Seeds) -> str:
    """Accuracies by bias, and where the losses of votes overtake those of scores, in Markdown.

    Args:
        found: Findings by seed.
    """
    rows = []
    for bias in BIASES:
        means = (over_seeds(found, accuracy_at(loss, bias)) for loss in (*VOTED, *SCORED))
        public = " (public sets)" * (bias == PUBLIC_BIAS)
        rows.append([f"{bias:g}{public}", *(str(mean) if mean else "-" for mean in means)])
    head = ["rater bias, points", *VOTED.values(), *SCORED.values()]
    equal = (
        f"Equal for all: {PAIRS:,} pairs, each scored by three of {POOL} raters, and {STEPS} steps of {BATCH} pairs."
    )
    return "\n".join([markdown_table(head, rows), "", equal, "", *(f"- {line}" for line in crossings(found))]).rstrip()


def crossings(found: Seeds) -> Iterator[str]:
    """A sentence for each loss of votes and each of scores: at which rater bias the first overtakes the second.

    Args:
        found: Findings by seed; those without all biases are left out.
    """
    for second, scores in SCORED.items():
        for first, votes in VOTED.items():
            if lines := [line for one in found.values() if (line := _line(one, first, second))]:
                place, low, high = crossing_interval(np.array(lines))
                each = ", ".join(_place(crossing(line)) for line in lines)
                sure = "" if math.isnan(low) else f"95 % interval {_place(low)} to {_place(high)}; "
                yield f"{votes} against {scores}: {_statement(place)} ({sure}seed by seed {each})"


def rater_condition(found: Seeds, *_: Any) -> str:
    """At which rater bias comparisons overtake scores: the condition of the paper's statement.

    Args:
        found: Findings by seed.
    """
    return next(crossings(found), "")


def _line(found: dict[str, Any], first: str, second: str) -> list[float] | None:
    """Differences of one seed at all biases; None where it lacks any."""
    try:
        return [ahead(first, second, bias)(found) for bias in BIASES]
    except KeyError:
        return None


def _statement(place: float) -> str:
    if place == -math.inf:
        return "ahead at every bias, also without any"
    if place == math.inf:
        return f"not ahead within the range, up to a bias of {BIASES[-1]:g}"
    return f"ahead from a bias of {place:.2f} on, {place / PUBLIC_BIAS:.1f} times that of public sets"


def _place(bias: float) -> str:
    if math.isinf(bias):
        return "below 0" if bias < 0 else f"beyond {BIASES[-1]:g}"
    return f"{bias:.2f}"


def rater_figure(found: Seeds) -> Figure:
    """Accuracy over the raters' bias, a line for each loss.

    Args:
        found: Findings by seed.
    """
    figure, (axis,) = panels(size=(6.4, 3.8))
    for loss, words in (VOTED | SCORED).items():
        known = {bias: mean for bias in BIASES if (mean := over_seeds(found, accuracy_at(loss, bias)))}
        curve(axis, list(known), list(known.values()), words)
    reference_line(axis, PUBLIC_BIAS, "public sets", upright=True)
    axis.set(title="Accuracy over the raters' bias", ylabel="mean accuracy without ties")
    axis.set_xlabel("standard deviation of raters' levels, points of 1 to 5")
    legend_below(figure)
    return figure
