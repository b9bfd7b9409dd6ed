"""How far annotators agree with each other and with themselves, and how often each source wins."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import krippendorff
import numpy as np
from scipy import stats

from .answers import ANSWERS, ranks
from .protocol import Vote

CHOICE_SCALE, SCORE_SCALE = ANSWERS["pairs"].scale, ANSWERS["single"].scale


def agreement(
    votes: Mapping[Any, Sequence[Vote]], column: str, scale: Sequence[str] = CHOICE_SCALE
) -> dict[str, float]:
    """How far the independent votes in one column agree; votes with flags are left out.

    Args:
        votes: Votes by pair.
        column: The column of choices.
        scale: All answers there are, from the worst to the best.

    Returns:
        ``alpha``: Krippendorff's alpha on the ordinal scale. ``raw``: among all two votes on the same pair, the share
        in which both are equal. ``ties``: share of votes for "same". ``votes``: number of votes. What nothing is known
        about is NaN: agreement where no pair has two votes, alpha also where all votes are equal. On the scale of
        scores, also ``interval``, the alpha to which 1 and 3 differ twice as much as 1 and 2.
    """
    units = [
        [vote.choices[column] for vote in of_pair if not vote.review and not vote.flags and column in vote.choices]
        for of_pair in votes.values()
    ]
    every = Counter(choice for unit in units for choice in unit)
    total = sum(every.values())
    shares = {"ties": every["same"] / total if total else math.nan, "votes": total}
    counts = np.array([[unit.count(choice) for choice in scale] for unit in units if len(unit) > 1])  # (pairs, 3)
    levels = {"alpha": "ordinal"} | ({"interval": "interval"} if scale == SCORE_SCALE else {})
    if not len(counts):
        return {**dict.fromkeys(levels, math.nan), "raw": math.nan, **shares}
    sizes = counts.sum(1)
    raw = (counts * (counts - 1)).sum() / (sizes * (sizes - 1)).sum()
    alphas = dict.fromkeys(levels, math.nan)
    if (counts.sum(0) > 0).sum() > 1:
        domain = {"value_counts": counts, "value_domain": [*range(len(scale))]}
        alphas = {
            name: float(krippendorff.alpha(**domain, level_of_measurement=level)) for name, level in levels.items()
        }
    return {**alphas, "raw": float(raw), **shares}


def concordance(votes: Mapping[Any, Sequence[Vote]], column: str) -> float:
    """Mean of Kendall's tau-b over all two independent rankings of the same videos.

    Rankings with flags are left out, and so are two of which one has no order at all; NaN where nothing is left.

    Args:
        votes: Rankings by group of videos.
        column: The column of rankings.
    """
    found = []
    for of_group in votes.values():
        said = [vote.choices for vote in of_group if not vote.review and not vote.flags]
        places = [[rank for _, rank in sorted(ranks(one[column]).items())] for one in said if column in one]
        # with one rank alone tau is undefined
        found += [
            float(stats.kendalltau(a, b).statistic) for a, b in combinations(places, 2) if len({*a}) > 1 < len({*b})
        ]
    return sum(found) / len(found) if found else math.nan


def consistency(
    first: Mapping[Any, Sequence[Vote]], again: Mapping[Any, Sequence[Vote]], columns: Sequence[str]
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
