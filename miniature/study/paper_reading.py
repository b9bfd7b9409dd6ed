"""The reading that the page leads with: what the paper says, what holds here, and under which condition.

Every line is a finding, its verdict, and what limits it: the points at which it holds (strengths, betas, shares; the
other judge), other conditions under which it was asked again, and where it depends on the reward model in one
dimension, how well that model judges generated clips of unseen prompts in it.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from ...callbacks.plots import markdown_table
from ...models.dimensions import DIMENSIONS
from .claims_aligned import ORDER, ORDERED
from .paper_claims import ALGORITHMS, KINDS, POOLS
from .paper_findings import Seeds, over_seeds
from .paper_verdicts import UNDECIDED, WORDS, Decided, Row, decided

Condition = Callable[[Seeds, Decided], str]
"""Says under which condition a finding holds, from the findings of all seeds and from all decided findings; empty where
nothing is known yet."""
ANSWERS = ("yes", "no", UNDECIDED)


def reading(found: Seeds, rows: Sequence[Row], paper: bool = True) -> str:
    """The table, one line for each finding with a result; empty where there is none.

    Args:
        found: Findings by seed.
        rows: What :func:`.paper_verdicts.verdicts` returns.
        paper: Whether findings of the paper are shown, or our own.
    """
    findings, body = decided(rows), []
    for key, row in findings.items():
        if bool(row["paper"]) == paper:
            says = [row["family"], row["statement"], row["paper"]][: 3 if paper else 2]
            body.append([*says, shown(row), _condition(found, findings, rows, key)])
    head = ["where", "what the paper says", "its numbers"] if paper else ["where", "what we asked"]
    return markdown_table([*head, "what holds here", "condition"], body) if body else ""


def shown(row: Row) -> str:
    """A finding's verdict and its difference, as tables show them.

    Args:
        row: A primary row.
    """
    half = f" ± {row['half']:.3f}" if math.isfinite(row["half"]) else ""
    verdict = row["verdict"] if row["verdict"].startswith(UNDECIDED) else f"**{row['verdict']}**"
    return f"{verdict}: {row['mean']:+.3f}{half}"


def _condition(found: Seeds, findings: Decided, rows: Sequence[Row], key: tuple[str, str]) -> str:
    """Everything that limits a finding."""
    row = findings[key]
    points = [one for one in rows if (one["family"], one["statement"]) == key and one["point"] and not one["primary"]]
    parts = [_answers({one["point"]: one["alone"] for one in points})]
    if hook := CONDITIONS.get(key):
        parts.append(hook(found, findings))
    if d := row["dimension"]:
        accuracy = over_seeds(found, lambda f: f["judges"]["reward"]["generated"][d][KINDS[0]])
        parts.append(f"judge's accuracy in {d}: {accuracy or 'not yet'}")
    return "; ".join(part for part in parts if part)


def _answers(points: Mapping[str, str]) -> str:
    """Points at which a statement holds, does not, or is undecided."""
    groups = {answer: [point for point, own in points.items() if own == answer] for answer in ANSWERS}
    return "; ".join(f"{answer}: {_listed(own)}" for answer, own in groups.items() if own)


def _listed(points: Sequence[str]) -> str:
    """Points beside each other, a first word that they share said once: strength 10, 30."""
    first = {point.split(" ")[0] for point in points}
    short = [point.partition(" ")[2] or point for point in points]
    return f"{points[0].split(' ')[0]} {', '.join(short)}" if len(points) > 1 == len(first) else ", ".join(points)


def _other_pairs(rival: str) -> Condition:
    """Pairs of other origins on which Flow-DPO is above another algorithm, or is not."""

    def condition(found: Seeds, findings: Decided) -> str:
        points = {}
        for text in POOLS.values():
            row = findings.get(("our own: conditions", f"Flow-DPO above {ALGORITHMS[rival]}: {text}"))
            if row:
                points[text] = dict(zip(WORDS[False], ANSWERS)).get(row["verdict"], UNDECIDED)
        return _answers(points)

    return condition


CONDITIONS: dict[tuple[str, str], Condition] = {
    (ORDERED, f"{ALGORITHMS[first]} above {ALGORITHMS[second]}, mean of VQ, MQ and TA"): _other_pairs(second)
    for first, second in ORDER
    if first == "dpo" and second in ("sft", "rwr")
}
"""Further conditions, by family and statement of the finding."""


def judge_line(found: Seeds) -> str:
    """How well the reward model that labels and chooses judges generated clips of unseen prompts, by dimension."""
    each = {d: over_seeds(found, lambda f, d=d: f["judges"]["reward"]["generated"][d][KINDS[0]]) for d in DIMENSIONS}
    return ", ".join(f"{d} {interval}" for d, interval in each.items() if interval)
