"""Simulated annotators of the miniature world, after the paper's protocol (VideoAlign, section 3.1).

Three annotators judge a pair independently, with Bradley-Terry-with-ties votes on what they perceive and a 1-5 score
for each video; where their votes differ, a fourth decides.
"""

import numpy as np

from ...datamodules.ratings import WORDS

SCALE = 9.0
"""Distance between the worst and the best quality, in units of reward; sets how often annotators err."""
THETA = 5.0
"""Readiness of annotators to call a tie: theta of Bradley-Terry with ties."""
PERCEPTION = 0.06
"""Standard deviation of an annotator's perception of a quality in [0, 1]."""
SCORE_NOISE = 0.6
"""Standard deviation of a score before it is rounded, in points."""


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


def annotate(quality_a: np.ndarray, quality_b: np.ndarray, rng: np.random.Generator) -> dict:
    """Labels, votes and scores of one pair.

    Args:
        quality_a: True qualities of A in [0, 1] for VQ, MQ and TA, shape (3,).
        quality_b: True qualities of B.
        rng: Draws perception, votes and scores.

    Returns:
        ``votes`` (annotators x 4: VQ, MQ, TA, Overall; the fourth annotator only where one was needed), ``labels``
        (4), and ``scores`` of A and B (3 each, means over the first three annotators).
    """
    votes, scores = [], []
    for _ in range(4):
        seen = np.stack([quality_a, quality_b]) + rng.normal(0, PERCEPTION, (2, 3))
        rewards = SCALE * np.column_stack([seen, seen.mean(1)])  # (2, 4), the last one overall
        votes.append(vote(rewards[0] - rewards[1], rng))
        scores.append(np.clip(np.rint(1 + 4 * seen + rng.normal(0, SCORE_NOISE, (2, 3))), 1, 5))
    first = np.array(votes[:3])
    agreed = (first == first[0]).all(0)
    labels = np.where(agreed, first[0], votes[3])
    return {
        "labels": [WORDS[int(v)] for v in labels],
        "votes": [[WORDS[int(v)] for v in row] for row in (votes if not agreed.all() else votes[:3])],
        "scores": np.mean(scores[:3], 0).round(3).tolist(),
    }
