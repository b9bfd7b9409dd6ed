"""Simulated annotators of the miniature world, after the paper's protocol (VideoAlign, section 3.1).

Three raters judge a pair independently, with Bradley-Terry-with-ties votes on what they perceive and a 1-5 score for
each video; where their votes differ, a fourth decides. A rater may have a level and a spread of their own, as in the
subject model of ITU-T P.910 and P.913 (Janowski and Pinson, 2015; Li and Bampis, 2017): both change scores, and neither
changes a vote, because one rater compares two videos on one scale.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ...datamodules.ratings import COLUMNS, WORDS
from ...models.dimensions import DIMENSIONS

SCALE = 9.0
"""Distance between the worst and the best quality, in units of reward; sets how often annotators err."""
THETA = 5.0
"""Readiness of annotators to call a tie: theta of Bradley-Terry with ties."""
PERCEPTION = 0.06
"""Standard deviation of an annotator's perception of a quality in [0, 1]."""
SCORE_NOISE = 0.6
"""Standard deviation of a score before it is rounded, in points. After level and spread are taken out, single scores of
VQEG HD3 deviate by 0.58 points, those of the NFLX public set by 0.58."""
MIDDLE = 3.0
"""Middle of the 1-5 scale, about which a rater's spread stretches scores."""
PUBLIC_BIAS = 0.45
"""Standard deviation of raters' levels in public sets, in points of a 1-5 scale.

Measured on the raw scores of two sets that the VMAF repository publishes (Netflix/vmaf, ``resource/dataset``), sampling
errors taken out, 95 % intervals by resampling viewers: VQEG HD3 0.45 (0.33 to 0.56; 24 viewers, the 35 clips of four of
its contents), NFLX public 0.46 (0.32 to 0.54; 26 viewers, the 19 of 33 clips whose mean score lies between 1.5 and 4.5;
over all 33, many of which nearly everybody scores 1 or 5, it is 0.31).
"""
SPREAD_OF_BIAS = 1 / 3
"""Deviation of the logarithm of raters' spreads over that of their levels. Slopes of a viewer's scores on the mean of
all others deviate by 0.15 around 1 in both sets (VQEG HD3 0.07 to 0.22, NFLX public 0.03 to 0.21)."""
DIFFICULTY = 0.17
"""Deviation of the logarithm of how hard a stimulus is to score: that of the clips of VQEG HD3, beyond chance. Janowski
and Pinson (2015) call it stimulus scoring difficulty."""
POOL = 24
"""Raters in a pool, as many as saw VQEG HD3."""


@dataclass(frozen=True)
class Rater:
    """Somebody who rates videos.

    Attributes:
        name: Name in the records.
        level: Points that the rater gives to every video beyond what others give.
        spread: Use of the scale, above 0; a rater of 0.5 gives half of the distance from the middle.
    """

    name: str
    level: float = 0.0
    spread: float = 1.0

    def points(self, seen: np.ndarray) -> np.ndarray:
        """Scores before noise and rounding, on the 1-5 scale and beyond it.

        Args:
            seen: Perceived qualities in [0, 1], in any shape.
        """
        return MIDDLE + self.level + self.spread * (1 + 4 * seen - MIDDLE)


TEAM = tuple(Rater(f"rater-{number}") for number in range(1, 5))
"""Three raters without any bias, and the one who decides."""


def rater_pool(bias: float, rng: np.random.Generator, count: int = POOL) -> list[Rater]:
    """Raters with levels and spreads of their own.

    From the same ``rng`` come the same raters, with all their deviations in proportion to the bias.

    Args:
        bias: Standard deviation of the levels, in points; that of the spreads' logarithms is a third of it. 0 gives
            raters like :data:`TEAM`; public sets show :data:`PUBLIC_BIAS`.
        rng: Draws levels and spreads.
        count: Number of raters.
    """
    drawn = rng.normal(size=(count, 2))
    levels, spreads = bias * drawn[:, 0], np.exp(bias * SPREAD_OF_BIAS * drawn[:, 1])
    return [Rater(f"rater-{n:02d}", float(a), float(b)) for n, (a, b) in enumerate(zip(levels, spreads), 1)]


def difficulties(prompts: Iterable[str], rng: np.random.Generator) -> dict[str, float]:
    """How hard each prompt's videos are to perceive: a factor of :data:`PERCEPTION`, log-normal with median 1.

    Args:
        prompts: The prompts; repetitions change nothing.
        rng: Draws the factors.
    """
    names = sorted({*prompts})
    return dict(zip(names, np.exp(DIFFICULTY * rng.normal(size=len(names))).tolist()))


def vote(margins: np.ndarray, rng: np.random.Generator, theta: float = THETA) -> np.ndarray:
    """Votes +1, 0 or -1 drawn from Bradley-Terry with ties.

    Args:
        margins: Perceived reward of A minus that of B, in any shape.
        rng: Draws the votes.
        theta: Readiness to call a tie, above 1.
    """
    a, b = 1 / (1 + theta * np.exp(-margins)), 1 / (1 + theta * np.exp(margins))
    u = rng.random(margins.shape)
    return np.where(u < a, 1, np.where(u > 1 - b, -1, 0))


def annotate(
    quality_a: np.ndarray,
    quality_b: np.ndarray,
    rng: np.random.Generator,
    raters: Sequence[Rater] = TEAM,
    difficulty: float = 1.0,
) -> dict:
    """Labels, votes and scores of one pair.

    Args:
        quality_a: True qualities of A in [0, 1] for VQ, MQ and TA, shape (3,).
        quality_b: True qualities of B.
        rng: Draws perception, votes and scores; equally much whoever the raters are.
        raters: The four who are asked, the last of whom decides.
        difficulty: Factor of :data:`PERCEPTION`.

    Returns:
        ``votes`` in the form of a round of annotation (one a rater, with choices and scores; the fourth, a review, only
        where one was needed), ``labels`` (4: VQ, MQ, TA, Overall), and ``scores`` of A and B (3 each, means over the
        first three raters).
    """
    votes, scores = [], []
    for rater in raters:
        seen = np.stack([quality_a, quality_b]) + rng.normal(0, PERCEPTION * difficulty, (2, 3))
        rewards = SCALE * np.column_stack([seen, seen.mean(1)])  # (2, 4), the last one overall
        votes.append(vote(rewards[0] - rewards[1], rng))
        scores.append(np.clip(np.rint(rater.points(seen) + rng.normal(0, SCORE_NOISE, (2, 3))), 1, 5))
    first = np.array(votes[:3])
    agreed = (first == first[0]).all(0)
    labels = np.where(agreed, first[0], votes[3])
    asked = 3 if agreed.all() else 4
    return {
        "labels": [WORDS[int(v)] for v in labels],
        "votes": [_record(*each, review=n == 3) for n, each in enumerate(zip(raters[:asked], votes, scores))],
        "scores": np.mean(scores[:3], 0).round(3).tolist(),
    }


def _record(rater: Rater, choices: np.ndarray, scores: np.ndarray, review: bool) -> dict:
    """A rater's vote as a round of annotation exports it."""
    return {
        "annotator": rater.name,
        "choices": {column: WORDS[int(choice)] for column, choice in zip(COLUMNS, choices)},
        "scores": {side: dict(zip(DIMENSIONS, map(int, row))) for side, row in zip("AB", scores)},
        "flags": [],
        "review": review,
    }
