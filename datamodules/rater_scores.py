"""Scores of pairs without the raters' own levels and spreads.

One rater's 3 is another one's 4. Where few rate a video, the mean of their scores tells who they were beside how good
it is. Here each rater's scores are standardised by that rater's own mean and deviation before they are averaged.

Legend: D dimensions (VQ, MQ, TA).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import VideoAlignError
from ..models.dimensions import DIMENSIONS
from .ratings import scores_of, single_scores

LEAST = 10
"""Scores of a rater in a dimension below which nothing is known about the rater's level and spread."""

Named = Iterable[tuple[dict, str]]
"""JSON records of pairs, and what to call each in messages."""


@dataclass(frozen=True)
class RaterScales:
    """The mean and the deviation of each rater's scores, and of all of them.

    A rater with fewer than :data:`LEAST` scores in a dimension, or whose scores in it are all equal, has no scale
    there: such scores are left out, in training and in validation. So are those of raters whom the training set does
    not know.

    Attributes:
        means: Mean (D,) of each rater's scores, by name; NaN where the rater has no scale.
        deviations: Standard deviation (D,) of each rater's scores around their own mean, by name; NaN in the same
            places.
        centre: Mean (D,) of all scores of raters with a scale.
        spread: Root mean square (D,) of their deviations from their own raters' means.
    """

    means: dict[str, np.ndarray]
    deviations: dict[str, np.ndarray]
    centre: np.ndarray
    spread: np.ndarray

    @classmethod
    def of(cls, records: Named, name: str) -> "RaterScales":
        """Measure the scales of all raters of a training set.

        Args:
            records: Records of its pairs.
            name: Name of the set, for messages.

        Raises:
            VideoAlignError: If pairs have mean scores but not those of single raters, or no rater has a scale.
        """
        given: dict[str, list[list[float]]] = {}
        for record, where in records:
            for rater, _, scores in _singles(record, where):
                given.setdefault(rater, []).append(scores)
        means, deviations, counts = {}, {}, {}
        for rater, rows in given.items():
            scores = np.array(rows)
            counts[rater] = (~np.isnan(scores)).sum(0)
            with np.errstate(invalid="ignore", divide="ignore"):
                mean = np.nansum(scores, 0) / counts[rater]
                deviation = np.sqrt(np.nansum((scores - mean) ** 2, 0) / (counts[rater] - 1))
            scaled = (counts[rater] >= LEAST) & (deviation > 0)
            means[rater], deviations[rater] = np.where(scaled, mean, math.nan), np.where(scaled, deviation, math.nan)
        count = np.array([np.where(np.isnan(means[r]), 0, counts[r]) for r in given]).reshape(-1, len(DIMENSIONS))
        if not count.sum():
            lacking = f"no rater of {name} gave {LEAST} scores that differ" if given else f"{name} has none"
            raise VideoAlignError(
                f"data.scores: standardised needs scores by rater in the votes of the pairs, and {lacking}; set "
                "data.scores: mean, or export a round of annotation in which people score"
            )
        with np.errstate(invalid="ignore"):  # 0 / 0 is NaN, as it should be in a dimension without any scale
            centre = np.nansum(count * np.array(list(means.values())), 0) / count.sum(0)
            variance = np.nansum((count - 1) * np.array(list(deviations.values())) ** 2, 0) / count.sum(0)
        return cls(means, deviations, centre, np.sqrt(variance))

    def __call__(self, record: dict, name: str) -> Tensor:
        """Standardised scores (2, D) of A and B, averaged over raters and mapped back to the scale of all of them.

        They have about the mean and the spread of scores from 1 to 5, and may lie beyond its ends; NaN where no rater
        with a scale gave a score.

        Args:
            record: JSON record of a pair.
            name: What to call the sample in messages.
        """
        total, count = np.zeros((2, len(DIMENSIONS))), np.zeros((2, len(DIMENSIONS)))
        unknown = np.full(len(DIMENSIONS), math.nan)
        for rater, side, scores in _singles(record, name):
            standard = (scores - self.means.get(rater, unknown)) / self.deviations.get(rater, unknown)
            total[side] += np.nan_to_num(standard)
            count[side] += ~np.isnan(standard)
        mean = total / np.where(count, count, math.nan)
        return torch.tensor(self.centre + self.spread * mean, dtype=torch.float32)

    def left_out(self, records: Named) -> tuple[int, int]:
        """Number of single scores that are left out because their rater has no scale, and number of all of them."""
        out = every = 0
        for record, where in records:
            for rater, _, scores in _singles(record, where):
                there = ~np.isnan(scores)
                every += int(there.sum())
                out += int((there & np.isnan(self.means[rater])).sum() if rater in self.means else there.sum())
        return out, every


def _singles(record: dict, name: str) -> list[tuple[str, int, list[float]]]:
    """Single scores of a pair; refuses one with nothing but their means, which would silently not count."""
    found = single_scores(record, name)
    if not found and not scores_of(record, name).isnan().all():
        raise VideoAlignError(
            f"{name}: it has scores but no votes that say who gave them, which data.scores: standardised needs; set "
            "data.scores: mean"
        )
    return found
