"""The public benchmarks' protocols: how their videos are read, and by which accuracies they are scored.

Beside the accuracies of :mod:`.preference` there are the number that the official script would print, and GenAI-Bench's
four classes read from scalar rewards.
"""

import math
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from .. import VideoAlignError
from .dimensions import DIMENSIONS, OVERALL
from .frame_sampling import FrameSampling
from .preference import _as_arrays, _correct
from .published import TABLE_2
from .registry import Registry


@dataclass(frozen=True)
class BenchmarkProtocol:
    """How a benchmark is scored.

    GenAI-Bench's budget of 256 x 256 is below the least area of the released preprocessing, which therefore enlarges
    clips of about that size: 256 x 256 becomes 336 x 336. The published numbers come from there, so the protocol does
    the same; ``min_pixels=0`` in its place keeps to the budget (252 x 252).

    Attributes:
        title: The benchmark's name as its authors write it.
        sampling: Frame rate and frame size of the videos (VideoAlign, section 5.1 and Table 9).
        overall: The overall reward: ``sum`` of the normalised dimensions, or the name of one dimension.
        columns: Columns in which pairs are rated.
        published: Accuracies without and with ties, in per cent, by column and method; empty where there are none.
        source: Where the published accuracies are from, for the report.
    """

    title: str
    sampling: FrameSampling
    overall: str
    columns: tuple[str, ...]
    published: dict[str, dict[str, tuple[float, float]]] = field(repr=False, default_factory=dict)
    source: str = ""

    def __post_init__(self) -> None:
        known = (*DIMENSIONS, OVERALL)
        if self.overall not in ("sum", *DIMENSIONS) or not self.columns or not set(self.columns) <= set(known):
            raise VideoAlignError(
                f"benchmark {self.title}: overall {self.overall!r} must be sum or one of {', '.join(DIMENSIONS)}, and "
                f"columns {self.columns} some of {', '.join(known)}"
            )
        if odd := set(self.published) - set(self.columns):
            raise VideoAlignError(f"benchmark {self.title}: published names the columns {sorted(odd)}, which it lacks")


VOTES = {"leftvote": "A", "rightvote": "B", "tievote": "same", "bothbad_vote": "same"}
"""GenAI-Bench's votes as labels; the paper scores its two kinds of ties as one."""

_TABLE_2 = (
    "Published rows: VideoAlign, v2 Table 2. w/o: decided pairs only, equal rewards are wrong (LiFT's were broken at "
    "random)."
)
_OWN = {
    "videogen-rewardbench": BenchmarkProtocol(
        title="VideoGen-RewardBench",
        sampling=FrameSampling(fps=2.0, max_pixels=448 * 448),
        overall="sum",
        columns=(OVERALL, *DIMENSIONS),
        published=TABLE_2["videogen-rewardbench"],
        source=_TABLE_2,
    ),
    "genai-bench": BenchmarkProtocol(
        title="GenAI-Bench (video)",
        sampling=FrameSampling(fps=2.0, max_pixels=256 * 256),
        overall="TA",
        columns=(OVERALL,),
        published=TABLE_2["genai-bench"],
        source=_TABLE_2,
    ),
}
PROTOCOLS: Registry[BenchmarkProtocol] = Registry(
    "videoalign.benchmarks",
    "benchmark",
    _OWN,
    lambda thing: isinstance(thing, BenchmarkProtocol),
    "a BenchmarkProtocol",
)
"""Protocols by the benchmark's name on the command line."""


def official_accuracy_with_ties(labels: Tensor, margins: Tensor) -> float:
    """Accuracy with ties as the official script prints it, for comparison with published numbers.

    The script walks through the pairs by growing abs(margin), calls each one it has passed a tie, and keeps the best
    accuracy on the way. So "no tie at all" is never a candidate, and within a run of equal margins it counts thresholds
    that no epsilon reaches, in the order of the rows. :func:`.preference.accuracy_with_ties` has neither flaw.

    Args:
        labels: (N,) with +1 where A was preferred, -1 where B was, 0 for a tie.
        margins: (N,) reward of A minus reward of B.

    Returns:
        The accuracy, in [0, 1]; NaN without a pair.

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
    """Accuracy in GenAI-Bench's four classes from scalar rewards, at the best tie threshold and quality threshold.

    A pair is a tie where abs(margin) <= epsilon; a tie is ``tievote`` (both good) where the pair's mean reward reaches
    a level, otherwise ``bothbad_vote``. Both thresholds are sought on the labels, exactly, over every pair of values.
    The benchmark's own scoring asks a chat model for one of four answers; this is how a scalar reward can answer.

    Args:
        votes: N votes, each of leftvote, rightvote, tievote or bothbad_vote.
        margins: (N,) reward of the left video minus reward of the right one.
        levels: (N,) mean reward of the two videos.

    Returns:
        The accuracy, in [0, 1]; NaN without a pair.
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
