"""Which settings tuning tries: a first grid, and rounds that follow from the results of the rounds before.

Every algorithm has as many trials as any other. A round's choice is the trial whose videos the reward model prefers
most often to the base's, overall and at other noise, in the mean over the tuning seeds. While a choice lies at an end
of what was tried on one of its axes, a further round follows: algorithms whose choice lies at an end are tried beyond
it, the others between their choice and its neighbours, in log scale. After :data:`ROUNDS` rounds there is no further
one, and the page says which choices still lie at an end.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ... import VideoAlignError

Values = Mapping[str, float]
"""Settings of a trial: learning rate ``lr``, and ``beta`` where an algorithm has one; ``strength`` of guidance."""
Round = Mapping[str, Sequence[Values]]
"""New trials of every algorithm."""

TUNING = "tuning"
"""Folder of everything that chooses settings."""
TUNED, TRIED = f"{TUNING}/tuned.json", f"{TUNING}/trials.json"
"""The chosen settings by algorithm, and all trials with their numbers by seed."""
TUNING_SEEDS = (1000, 1001, 1002)
"""Seeds that settings are chosen on."""
ROUNDS, FURTHER = 4, 3
"""Greatest number of rounds, and number of trials of an algorithm in each round but the first."""
_RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "sft": {"lr": _RATES},
    "rwr": {"lr": _RATES},
    "dpo": {"lr": (2.5e-4, 5e-4, 1e-3), "beta": (30.0, 100.0)},
    "dpo-time": {"lr": (2.5e-4, 5e-4, 1e-3), "beta": (500.0, 2000.0)},
    "sft-full": {"lr": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)},
    "dpo-full": {"lr": (3e-5, 1e-4, 3e-4), "beta": (30.0, 100.0)},
    "nrg": {"strength": (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)},
}
"""Axes of each algorithm and their values in the first round, ascending. A step beyond an end is as wide as the grid's
last one."""


@dataclass(frozen=True)
class Trial:
    """A setting with what judges say of it, one number per tuning seed.

    Attributes:
        values: The setting.
        judge: Share of its videos that the reward model prefers to the base's, overall, at other noise.
        oracle: The same by the oracle.
        number: Number of the round that it was tried in, from 0.
    """

    values: Values
    judge: tuple[float, ...]
    oracle: tuple[float, ...]
    number: int = 0


def tuning_place(seed: int) -> str:
    """Folder of a tuning seed, under the folder of all results.

    Args:
        seed: One of :data:`TUNING_SEEDS`.
    """
    return f"{TUNING}/seed{seed}"


def reported(seeds: int, first: int) -> range:
    """Seeds that a study reports.

    Args:
        seeds: Number of seeds.
        first: The first seed.

    Raises:
        VideoAlignError: Where there is none, or one is for tuning.
    """
    chosen = range(first, first + seeds)
    if seeds < 1 or first < 0 or {*TUNING_SEEDS} & {*chosen}:
        raise VideoAlignError(
            f"--seeds must be at least 1, --first not negative, and seeds {TUNING_SEEDS[0]} to {TUNING_SEEDS[-1]} are "
            f"for tuning; got {seeds} from {first} on"
        )
    return chosen


def first_round() -> Round:
    """The whole grid of every algorithm."""
    return {
        algorithm: [dict(zip(axes, values)) for values in itertools.product(*axes.values())]
        for algorithm, axes in GRIDS.items()
    }


def next_round(trials: Mapping[str, Sequence[Trial]], rounds: int) -> Round:
    """The round that follows; empty where no choice lies at an end, or there were :data:`ROUNDS` rounds.

    Args:
        trials: All trials so far, by algorithm.
        rounds: Number of rounds so far.
    """
    tried = {algorithm: [one.values for one in every] for algorithm, every in trials.items()}
    choices = {algorithm: choice(every).values for algorithm, every in trials.items()}
    if rounds >= ROUNDS or not any(ends(tried[name], choices[name]) for name in trials):
        return {}
    return {name: list(itertools.islice(_further(GRIDS[name], tried[name], choices[name]), FURTHER)) for name in trials}


def choice(trials: Sequence[Trial], judge: str = "judge") -> Trial:
    """The trial that a judge prefers in the mean over seeds; of equal ones the first.

    Args:
        trials: Trials of one algorithm.
        judge: ``judge`` or ``oracle``.
    """
    return max(trials, key=lambda one: sum(getattr(one, judge)))


def ends(tried: Sequence[Values], chosen: Values) -> dict[str, int]:
    """Axes on which a setting lies at an end of what was tried: -1 at the lower, 1 at the upper one.

    Args:
        tried: All settings of an algorithm.
        chosen: One of them.
    """
    found = {}
    for axis, value in chosen.items():
        values = [one[axis] for one in tried]
        if value in (min(values), max(values)):
            found[axis] = 1 if value == max(values) else -1
    return found


def _further(grid: Mapping[str, Sequence[float]], tried: Sequence[Values], chosen: Values) -> Iterator[Values]:
    """New settings in the order in which they should be tried: beyond ends, then ever closer around the choice."""
    known = [dict(one) for one in tried]
    for changed in itertools.chain(_beyond(grid, ends(tried, chosen), chosen), _around(tried, chosen)):
        # three digits, so that names and records are short
        values = {**chosen, **{axis: float(f"{value:.3g}") for axis, value in changed.items()}}
        if values not in known:
            known.append(values)
            yield values


def _beyond(grid: Mapping[str, Sequence[float]], at: Mapping[str, int], chosen: Values) -> Iterator[Values]:
    """One step beyond ends, on each axis and on all of them at once, then two steps on each."""
    steps = {axis: (grid[axis][-1] / grid[axis][-2]) ** side for axis, side in at.items()}
    for count in range(1, len(steps) + 1):
        for axes in itertools.combinations(steps, count):
            yield {axis: chosen[axis] * steps[axis] for axis in axes}
    for axis, step in steps.items():
        yield {axis: chosen[axis] * step**2}


def _around(tried: Sequence[Values], chosen: Values) -> Iterator[Values]:
    """Half of the way to the neighbours on each axis, then quarters and so on."""
    for depth in range(1, 6):
        for axis, value in chosen.items():
            values = [one[axis] for one in tried]
            lower, upper = (v for v in values if v < value), (v for v in values if v > value)
            for neighbour in (max(lower, default=None), min(upper, default=None)):
                if neighbour:
                    yield {axis: value * (neighbour / value) ** (0.5**depth)}
