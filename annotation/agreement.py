"""How far annotators agree: with each other, with themselves, and what follows for the sources."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import krippendorff
import numpy as np
from scipy import stats

from .protocol import CHOICES, Vote

PLACE = {"B": 0, "same": 1, "A": 2}
"""Of a choice on the ordinal scale from B to A."""


def agreement(votes: Mapping[int, Sequence[Vote]], column: str) -> dict[str, float]:
    """Of the independent votes in one column.

    Returns:
        ``alpha``: Krippendorff's, ordinal (NaN with fewer than two values in use or no pair with two votes). ``raw``: share of pairs of
        votes on the same pair of videos that are equal. ``ties``: share of votes for "same". ``votes``: how many.
    """
    units = [
        [vote.choices[column] for vote in of_pair if not vote.review and not vote.flags and column in vote.choices]
        for of_pair in votes.values()
    ]
    counts = np.array(
        [[unit.count(choice) for choice in sorted(PLACE, key=PLACE.get)] for unit in units if len(unit) > 1]
    )  # (pairs, 3)
    every = Counter(choice for unit in units for choice in unit)
    total = sum(every.values())
    if not len(counts):
        return {
            "alpha": math.nan,
            "raw": math.nan,
            "ties": every["same"] / total if total else math.nan,
            "votes": total,
        }
    sizes = counts.sum(1)
    raw = (counts * (counts - 1)).sum() / (sizes * (sizes - 1)).sum()
    used = (counts.sum(0) > 0).sum()
    alpha = (
        float(krippendorff.alpha(value_counts=counts, value_domain=[0, 1, 2], level_of_measurement="ordinal"))
        if used > 1
        else math.nan
    )
    return {"alpha": alpha, "raw": float(raw), "ties": every["same"] / total, "votes": total}


def consistency(
    first: Mapping[int, Sequence[Vote]], again: Mapping[int, Sequence[Vote]], columns: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Share of equal choices between a person's vote on a pair and the repetition, by person."""
    found: dict[str, list[bool]] = {}
    for pair, votes in again.items():
        before = {vote.annotator: vote for vote in first.get(pair, [])}
        for vote in votes:
            if (old := before.get(vote.annotator)) and not (old.flags or vote.flags):
                found.setdefault(vote.annotator, []).extend(old.choices.get(c) == vote.choices.get(c) for c in columns)
    return {name: {"share": sum(equal) / len(equal), "choices": len(equal)} for name, equal in found.items()}


def wilson(wins: float, count: float) -> tuple[float, float]:
    """95 % interval of a share, by Wilson's score; (0, 1) of nothing."""
    if not count:
        return 0.0, 1.0
    z = float(stats.norm.ppf(0.975))
    share = wins / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return middle - half, middle + half


def independent(won: Mapping[str, Sequence[float]]) -> float:
    """How many independent pairs tell as much as these: at most their number, fewer where pairs of a prompt go together.

    Args:
        won: What each pair was worth, by prompt.
    """
    count, prompts = sum(map(len, won.values())), len(won)
    share = sum(map(sum, won.values())) / count
    if prompts < 2 or share in (0.0, 1.0):
        return prompts
    between = prompts / (prompts - 1) * sum((sum(v) - share * len(v)) ** 2 for v in won.values()) / count**2
    return min(count, share * (1 - share) / between) if between else count


def sources(
    labels: Sequence[tuple[str, str, dict[str, str]]], columns: Sequence[str], prompts: Sequence[str] | None = None
) -> dict[str, dict[str, dict[str, Any]]]:
    """Win rates by source and column, a tie counting half.

    Args:
        labels: (source of A, source of B, choices by column) of decided pairs; those of one source compare nothing and are left out.
        columns: What was chosen in.
        prompts: The prompt of each pair: pairs of one prompt are not independent, which widens the intervals. Without them every pair
            counts as a prompt of its own.
    """
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    worth = {"A": 1.0, "same": 0.5, "B": 0.0}
    for (a, b, chosen), prompt in zip(labels, prompts or map(str, range(len(labels)))):
        for column in columns if a != b else ():
            if column in chosen:
                for source, won in ((a, worth[chosen[column]]), (b, 1 - worth[chosen[column]])):
                    found.setdefault(source, {}).setdefault(column, {}).setdefault(prompt, []).append(won)
    return {source: {c: _win_rate(won) for c, won in row.items()} for source, row in sorted(found.items())}


def _win_rate(won: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    count = sum(map(len, won.values()))
    share, alone = sum(map(sum, won.values())) / count, independent(won)
    return {"wins": share, "interval": wilson(share * alone, alone), "pairs": count}


assert {*PLACE} == {*CHOICES}
