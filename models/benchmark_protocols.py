"""The public benchmarks' protocols: how they are scored, by which numbers, and what has been published on them.

Accuracies beside those of :mod:`.preference`: the number that the official script would print, and GenAI-Bench's four
classes read from scalar rewards.
"""

import math
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from .dimensions import OVERALL
from .frame_sampling import FrameSampling
from .preference import _as_arrays, _correct

Published = dict[str, dict[str, tuple[float, float]]]
"""Accuracy without and with ties, in per cent, by column and method."""


@dataclass(frozen=True)
class BenchmarkProtocol:
    """How a benchmark is scored.

    GenAI-Bench's budget of 256 x 256 is below the least area of the released preprocessing, which therefore enlarges
    clips of about that size: 256 x 256 becomes 336 x 336. The published numbers come from there, so the protocol does
    the same; ``min_pixels=0`` in its place keeps to the budget (252 x 252).

    Attributes:
        title: Name as the authors write it.
        sampling: Frames and sizes (VideoAlign, section 5.1 and Table 9).
        overall: What the overall reward is: ``sum`` of the normalised dimensions, or one dimension.
        columns: Columns that pairs are rated in.
        published: Published accuracies (VideoAlign, Table 2).
    """

    title: str
    sampling: FrameSampling
    overall: str
    columns: tuple[str, ...]
    published: Published = field(repr=False)


VOTES = {"leftvote": "A", "rightvote": "B", "tievote": "same", "bothbad_vote": "same"}
"""GenAI-Bench's votes as labels; the paper scores its two kinds of ties as one."""
VIDEOREWARD = "VideoReward (2B), as published"

PROTOCOLS = {
    "videogen-rewardbench": BenchmarkProtocol(
        "VideoGen-RewardBench", FrameSampling(fps=2.0, max_pixels=448 * 448), "sum", (OVERALL, "VQ", "MQ", "TA"),
        {
            OVERALL: {VIDEOREWARD: (73.59, 61.26), "VisionReward": (67.59, 56.77), "LiFT": (57.26, 39.08),
                      "VideoScore": (50.22, 41.80), "random": (50.30, 41.86)},
            "VQ": {VIDEOREWARD: (75.66, 59.68), "VisionReward": (59.03, 47.43), "LiFT": (55.97, 47.53),
                   "VideoScore": (47.72, 47.41), "random": (49.86, 47.42)},
            "MQ": {VIDEOREWARD: (74.70, 66.03), "VisionReward": (60.98, 59.03), "LiFT": (54.91, 59.04),
                   "VideoScore": (51.09, 59.05), "random": (49.64, 59.07)},
            "TA": {VIDEOREWARD: (72.20, 53.80), "VisionReward": (61.15, 46.56), "LiFT": (55.43, 33.79),
                   "VideoScore": (50.34, 37.24), "random": (50.40, 37.25)},
        },
    ),
    "genai-bench": BenchmarkProtocol(
        "GenAI-Bench (video)", FrameSampling(fps=2.0, max_pixels=256 * 256), "TA", (OVERALL,),
        {
            OVERALL: {VIDEOREWARD: (72.89, 49.41), "VisionReward": (72.41, 51.56), "LiFT": (58.39, 37.06),
                      "VideoScore": (71.69, 49.03), "random": (49.84, 33.67)},
        },
    ),
}  # fmt: skip
"""By the name that the command line knows."""


def official_accuracy_with_ties(labels: Tensor, margins: Tensor) -> float:
    """What the official script prints as accuracy with ties, for comparison with published numbers.

    It walks through the pairs by growing abs(margin), calls each one it has passed a tie, and keeps the best accuracy
    on the way. So "no tie at all" is never a candidate, and within a run of equal margins it counts thresholds that no
    epsilon reaches, in the order of the rows. :func:`.preference.accuracy_with_ties` has neither flaw.

    Args:
        labels: 1-D, +1 / -1 / 0. margins: 1-D, reward A minus reward B.

    Returns:
        In [0, 1]; NaN without a pair.

    Example:
        >>> official_accuracy_with_ties([1, 0], [2.0, 0.1]), official_accuracy_with_ties([1], [0.5])
        (1.0, 0.0)
    """
    labels, margins = _as_arrays(labels, margins)
    if not labels.size:
        return math.nan
    order = np.argsort(np.abs(margins), kind="stable")
    right, tie = _correct(labels, margins)[order], (labels == 0)[order]
    hits = right.sum() + np.cumsum(tie.astype(np.int64) - right)  # after each pair is called a tie
    return float(hits.max() / labels.size)


def accuracy_four_way(votes: list[str], margins: Tensor, levels: Tensor) -> float:
    """GenAI-Bench's four classes from scalar rewards: the best over a tie threshold and a quality threshold.

    A pair is a tie where abs(margin) <= epsilon; a tie is ``tievote`` (both good) where the pair's mean reward reaches
    a level, otherwise ``bothbad_vote``. Both thresholds are sought on the labels, exactly, over every pair of values.
    The benchmark's own scoring asks a chat model for one of four answers; this is how a scalar reward can answer.

    Args:
        votes: N of leftvote, rightvote, tievote, bothbad_vote. margins: (N,) left minus right.
        levels: (N,) mean reward of the two.

    Returns:
        In [0, 1]; NaN without a pair.
    """
    votes, margins, levels = np.asarray(votes), np.asarray(margins, np.float64), np.asarray(levels, np.float64)
    if not len(votes):
        return math.nan
    labels = (votes == "leftvote") * 1 - (votes == "rightvote") * 1
    size, right = np.abs(margins), _correct(labels, margins)
    order = np.argsort(size, kind="stable")
    ends = np.append(np.diff(size[order]) != 0, True)  # only here may a threshold fall
    _, place = np.unique(levels, return_inverse=True)  # rank of each pair's level
    # hits[k]: ties answered rightly if levels of rank >= k are good; k may lie above all ranks
    hits, best, decided = np.zeros(place.max() + 2, np.int64), int(right.sum()), int(right.sum())
    for number, end in zip(order, ends):
        decided -= int(right[number])
        if votes[number] == "tievote":
            hits[: place[number] + 1] += 1
        elif votes[number] == "bothbad_vote":
            hits[place[number] + 1 :] += 1
        if end:
            best = max(best, decided + int(hits.max()))
    return best / len(votes)
