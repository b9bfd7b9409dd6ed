"""How far annotators agree with each other and with themselves, and how often each source wins."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import krippendorff
import numpy as np
from scipy import stats

from .protocol import CHOICES, Vote

PLACE = {"B": 0, "same": 1, "A": 2}
"""Place of each choice on the ordinal scale from B to A."""


def agreement(votes: Mapping[int, Sequence[Vote]], column: str) -> dict[str, float]:
    """How far the independent votes in one column agree; votes with flags are left out.

    Args:
        votes: Votes by pair.
        column: The column of choices.

    Returns:
        ``alpha``: Krippendorff's alpha on the ordinal scale. ``raw``: among all two votes on the same pair, the share
        in which both are equal. ``ties``: share of votes for "same". ``votes``: number of votes. What nothing is known
        about is NaN: agreement where no pair has two votes, alpha also where all votes are equal.
    """
    units = [
        [vote.choices[column] for vote in of_pair if not vote.review and not vote.flags and column in vote.choices]
        for of_pair in votes.values()
    ]
    every = Counter(choice for unit in units for choice in unit)
    total = sum(every.values())
    shares = {"ties": every["same"] / total if total else math.nan, "votes": total}
    scale = sorted(PLACE, key=PLACE.get)
    counts = np.array([[unit.count(choice) for choice in scale] for unit in units if len(unit) > 1])  # (pairs, 3)
    if not len(counts):
        return {"alpha": math.nan, "raw": math.nan, **shares}
    sizes = counts.sum(1)
    raw = (counts * (counts - 1)).sum() / (sizes * (sizes - 1)).sum()
    alpha = math.nan
    if (counts.sum(0) > 0).sum() > 1:
        ordinal = {"value_domain": [0, 1, 2], "level_of_measurement": "ordinal"}
        alpha = float(krippendorff.alpha(value_counts=counts, **ordinal))
    return {"alpha": alpha, "raw": float(raw), **shares}


def consistency(
    first: Mapping[int, Sequence[Vote]], again: Mapping[int, Sequence[Vote]], columns: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """How far people agree with themselves when a pair comes again.

    Args:
        first: First votes by pair.
        again: Votes on repetitions by pair.
        columns: The columns of choices.

    Returns:
        By person, the ``share`` of choices that are equal, and the number of ``choices`` that were compared.
    """
    found: dict[str, list[bool]] = {}
    for pair, votes in again.items():
        before = {vote.annotator: vote for vote in first.get(pair, [])}
        for vote in votes:
            if (old := before.get(vote.annotator)) and not (old.flags or vote.flags):
                found.setdefault(vote.annotator, []).extend(old.choices.get(c) == vote.choices.get(c) for c in columns)
    return {name: {"share": sum(equal) / len(equal), "choices": len(equal)} for name, equal in found.items()}


def wilson(wins: float, count: float) -> tuple[float, float]:
    """95 % interval of a share by Wilson's score; (0, 1) where nothing was counted.

    Args:
        wins: Number of wins; may be a fraction.
        count: Number of trials; may be a fraction.
    """
    if not count:
        return 0.0, 1.0
    z = float(stats.norm.ppf(0.975))
    share = wins / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return middle - half, middle + half


def independent(won: Mapping[str, Sequence[float]]) -> float:
    """The number of independent pairs that would tell as much as these.

    It is at most the number of pairs, and less where pairs of one prompt have similar results.

    Args:
        won: The results of the pairs by prompt: 1 for a win, 0.5 for a tie, 0 for a loss.
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
    """Win rates by source and column; a tie counts as half a win.

    Args:
        labels: Of each decided pair the source of A, the source of B, and the label in each column. Pairs of one source
            compare nothing and are left out.
        columns: The columns of choices.
        prompts: The prompt of each pair. Pairs of one prompt are not independent, which widens the intervals; without
            prompts all pairs count as independent.

    Returns:
        By source and column ``wins`` (a share), ``interval`` (of 95 %) and ``pairs`` (their number).
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
