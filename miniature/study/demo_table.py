"""What the demo found, in one table and one sentence: for its report, and for a terminal."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...callbacks.plots import text_table
from ...models.dimensions import DIMENSIONS, OVERALL

ORACLE, REWARD_MODEL = "oracle", "reward model"
BASE, CONTROL = "base", "control"
"""Arms that are no algorithm: the generator as it was, and training on samples that nobody selected."""
TRAINED = {
    BASE: "the generator as it was",
    CONTROL: "fine-tuned on samples that nobody selected: what any further training does",
    "sft": "SFT on the preferred samples",
    "rwr": "Flow-RWR: samples weighted by their reward",
    "dpo": "Flow-DPO, constant beta",
    "dpo-time": "Flow-DPO, beta (1 - t)²",
    "dpo-motion": "Flow-DPO, constant beta, on pairs labelled by motion quality alone",
}
"""What each arm without guidance is."""
BEST_OF = "best-of-"
"""Beginning of the name of a search: the best of several of the base's samples by the reward model."""
LEGEND = (
    "VQ, MQ, TA: visual quality, motion quality and text alignment by the oracle, from 0 to 1, with the difference to "
    "the base and its 95 % interval. Wins: share of an arm's clips that beat the base's from other noise of the same "
    "prompt; 0.5 is no difference; the best of several samples has none. Cost: seconds of sampling against the base's."
)
"""What the table's columns are."""


@dataclass(frozen=True)
class Cell:
    """A cell of the table.

    Attributes:
        text: The number.
        note: Its difference or its interval.
        sign: 1 where the interval is wholly better than the base, -1 where it is wholly worse, 0 otherwise.
    """

    text: str
    note: str = ""
    sign: int = 0

    def __str__(self) -> str:
        return f"{self.text}  {self.note}".strip()


def named(arm: str, compared: Mapping[str, Any]) -> str:
    """What an arm is, in words.

    Args:
        arm: Name of the arm.
        compared: Numbers of the comparison, see :func:`.comparison.found_of`.
    """
    if arm in TRAINED:
        return TRAINED[arm]
    if arm.startswith(BEST_OF):
        return f"the best of {arm.removeprefix(BEST_OF)} samples of the base, by the reward model"
    sweep, _, strength = arm.rpartition("@")
    dimensions = ", ".join(d for d, weight in compared["sweeps"][sweep]["weights"].items() if weight)
    return f"Flow-NRG, guided to {dimensions}, strength {strength}"


def algorithms(compared: Mapping[str, Any]) -> list[str]:
    """Names of all arms that are aligned or guided by the reward model; a search has no clips of its own.

    Args:
        compared: Numbers of the comparison.
    """
    return [name for name in compared["arms"] if name not in (BASE, CONTROL)]


def best_algorithm(compared: Mapping[str, Any]) -> str:
    """The algorithm that wins most often over the base by the oracle; the first of several.

    Args:
        compared: Numbers of the comparison.
    """
    return max(algorithms(compared), key=lambda name: wins(compared, name, ORACLE)[0])


def wins(compared: Mapping[str, Any], arm: str, judge: str) -> tuple[float, list[float]]:
    """Share of an arm's videos that beat the base's at other noise of their prompt, and its 95 % interval.

    With one video a prompt there is no other noise: then they are those of the same noise.

    Args:
        compared: Numbers of the comparison.
        arm: Name of the arm, not the base.
        judge: Name of the judge.
    """
    kind = "superiority" if compared["samples"] > 1 else "win_rate"
    row = compared["arms"][arm]["against_base"][judge][OVERALL]
    return row[kind], row[f"{kind}_interval"]


def summary(compared: Mapping[str, Any], dimension: str = "MQ") -> str:
    """Whether a quality rose by at least one algorithm, strength of guidance or search, by the oracle.

    Args:
        compared: Numbers of the comparison.
        dimension: The quality, VQ, MQ or TA.
    """
    rows = {n: compared["arms"][n]["differences"][ORACLE][dimension] for n in algorithms(compared)}
    rows |= {name: row[dimension] for name, row in _searches(compared).items()}
    rose = [name for name, row in rows.items() if row["interval"][0] > 0]
    fell = [name for name, row in rows.items() if row["interval"][1] < 0]
    most = max(rose or rows, key=lambda name: rows[name]["difference"])
    what = {"VQ": "Visual quality", "MQ": "Motion quality", "TA": "Text alignment"}[dimension]
    arm = f"{most} ({named(most, compared)}): {_difference(rows[most])}"
    if rose:
        text = f"{what} rose with {len(rose)} of {len(rows)} ways to use the reward model, most with {arm}."
    else:
        text = f"{what} rose with none of {len(rows)} ways to use the reward model; the largest difference has {arm}."
    if fell:
        text += f" It fell with {', '.join(fell)}."
    chance = 0.025 * len(rows)  # half of the 5 % that a 95 % interval leaves out is on the side of a rise
    return (
        f"{text} These are differences to the base by the oracle, with 95 % intervals over {compared['prompts']} "
        f"prompts; of {len(rows)} that change nothing, {chance:.1f} would seem to rise by chance."
    )


def _searches(compared: Mapping[str, Any]) -> dict[str, Any]:
    """Differences of the best of all the base's samples of a prompt, which cost as many samples."""
    most, found = str(compared["samples"]), compared.get("best_of_differences", {})  # earlier releases have none
    return {BEST_OF + most: found[most]} if most in found else {}


def one_table(compared: Mapping[str, Any]) -> tuple[list[str], list[list[Cell]]]:
    """Head and rows of the table: each arm's qualities by the oracle, wins by both judges, and its cost.

    The last row is the best of all of the base's samples, where there are several.

    Args:
        compared: Numbers of the comparison.
    """
    head = ["arm", *DIMENSIONS, "wins: oracle", "wins: reward model", "cost"]
    rows = [_row(compared, name) for name in compared["arms"]]
    for name, differences in _searches(compared).items():
        means = compared["best_of"][name.removeprefix(BEST_OF)]
        cells = [Cell(name, named(name, compared)), *_qualities(means, differences), Cell(""), Cell("")]
        rows.append([*cells, Cell(f"{compared['samples']:.2f}x")])
    return head, rows


def _row(compared: Mapping[str, Any], name: str) -> list[Cell]:
    row = compared["arms"][name]
    differences = row.get("differences", {}).get(ORACLE, {})
    cells = [Cell(name, named(name, compared))]
    cells += _qualities(row["means"][ORACLE], differences)
    for judge in (ORACLE, REWARD_MODEL):
        if name == BASE:
            cells.append(Cell(""))
        else:
            share, interval = wins(compared, name, judge)
            cells.append(Cell(f"{share:.2f}", _interval(interval, ".2f"), _sign(interval, 0.5)))
    return [*cells, Cell(f"{row['cost']:.2f}x")]


def _qualities(means: Mapping[str, float], differences: Mapping[str, Any]) -> list[Cell]:
    cells = []
    for dimension in DIMENSIONS:
        mean, change = f"{means[dimension]:.2f}", differences.get(dimension)
        cells.append(Cell(mean, _difference(change), _sign(change["interval"], 0.0)) if change else Cell(mean))
    return cells


def _difference(row: Mapping[str, Any]) -> str:
    """A difference to the base with its interval, such as ``+0.06 (+0.01 to +0.11)``."""
    return f"{row['difference']:+z.2f} {_interval(row['interval'], '+.2f')}".strip()


def _interval(ends: Sequence[float], form: str) -> str:
    return "" if any(map(math.isnan, ends)) else f"({ends[0]:{form}} to {ends[1]:{form}})"


def _sign(ends: Sequence[float], zero: float) -> int:
    """On which side of zero an interval is; an undefined one is on none."""
    return int(ends[0] > zero) - int(ends[1] < zero)


def as_text(compared: Mapping[str, Any]) -> str:
    """The table for a terminal.

    Args:
        compared: Numbers of the comparison.
    """
    head, rows = one_table(compared)
    # a terminal has no room for what arms are, nor for the intervals of wins
    short = [[row[0].text, *map(str, row[1:4]), *(cell.text for cell in row[4:])] for row in rows]
    return text_table(head, short)
