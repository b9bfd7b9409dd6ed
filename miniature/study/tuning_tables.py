"""What tuning tried, what the reward model chose, and what that choice loses by the oracle."""

from collections.abc import Mapping, Sequence
from typing import Any

from ...callbacks.plots import markdown_table
from ...models.intervals import Interval
from .tuning_rounds import GRIDS, ROUNDS, Trial, Values, choice, ends

Tried = Mapping[str, Any]
"""All trials with their numbers by seed, as tuning saves them."""


def tuning_tables(tuned: Mapping[str, Values] | None, tried: Tried | None) -> str:
    """The chosen settings, and beside them the oracle's choice.

    Args:
        tuned: The chosen settings by algorithm; None before anything was tuned.
        tried: All trials; None where they are not known.
    """
    if not tried:
        rows = [[name, _text((tuned or {}).get(name))] for name in GRIDS]
        return markdown_table(["algorithm", "chosen"], rows)
    rows = [_row(name, _trials(every)) for name, every in tried["trials"].items()]
    head = ["algorithm", "trials", "tried", "chosen by the reward model", "its wins, reward model", "oracle"]
    head += ["the oracle would choose", "which wins, oracle", "lost by the oracle"]
    return markdown_table(head, rows)


def tuning_text(tried: Tried | None) -> str:
    """How many rounds there were, and which choices lie at an end of what was tried.

    Args:
        tried: All trials; None where they are not known.
    """
    if not tried:
        return "The trials themselves are not in this folder."
    known = {name: _trials(every) for name, every in tried["trials"].items()}
    rounds = 1 + max(one.number for every in known.values() for one in every)
    counts = {len(every) for every in known.values()}
    at_end = {name: ends([one.values for one in every], choice(every).values) for name, every in known.items()}
    left = [f"{name} ({', '.join(axes)})" for name, axes in at_end.items() if axes]
    said = f"{rounds} of at most {ROUNDS} rounds on seeds {', '.join(map(str, tried['seeds']))}, "
    said += f"{' or '.join(map(str, sorted(counts)))} trials for each algorithm. "
    if left:
        return f"{said}**These choices still lie at an end of what was tried: {'; '.join(left)}.**"
    return f"{said}No choice lies at an end of what was tried."


def _trials(every: Sequence[Mapping[str, Any]]) -> list[Trial]:
    return [Trial(one["values"], tuple(one["judge"]), tuple(one["oracle"]), one["number"]) for one in every]


def _row(name: str, trials: Sequence[Trial]) -> list[str]:
    mine, best = choice(trials), choice(trials, "oracle")
    tried = "; ".join(
        f"{axis} {', '.join(f'{v:g}' for v in sorted({one.values[axis] for one in trials}))}" for axis in mine.values
    )
    lost = Interval.over([b - m for b, m in zip(best.oracle, mine.oracle)])
    means = [str(Interval.over(values)) for values in (mine.judge, mine.oracle, best.oracle)]
    return [name, f"{len(trials)}", tried, _text(mine.values), *means[:2], _text(best.values), means[2], str(lost)]


def _text(values: Values | None) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in values.items()) if values else "not yet"
