"""Which side of a sample is preferred, from its record alone.

Legend: N samples; S sides, 2 (A and B, or preferred and other) or 1; D dimensions.
"""

import math
import re
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import VideoAlignError
from ..models.dimensions import DIMENSIONS
from .contents import ShardError
from .latent_files import OF
from .ratings import labels_in, prompt_of


@dataclass(frozen=True)
class Weights:
    """Weight of each dimension in the preference: 1:1:1 in the paper, 0:0:1 for text alignment alone."""

    VQ: float = 1.0
    """Weight of visual quality."""
    MQ: float = 1.0
    """Weight of motion quality."""
    TA: float = 1.0
    """Weight of text alignment."""

    def __post_init__(self) -> None:
        values = (self.VQ, self.MQ, self.TA)
        if not all(math.isfinite(v) and v >= 0 for v in values) or not sum(values) > 0:
            raise VideoAlignError(f"weights of VQ, MQ and TA {values} must not be negative, and one at least positive")

    def __call__(self, values: Tensor) -> Tensor:
        """Weighted mean over the last axis (D); a dimension of weight 0 may be missing (NaN)."""
        weights = torch.tensor([self.VQ, self.MQ, self.TA], device=values.device)
        parts = torch.where(weights != 0, weights * values, 0.0).unbind(-1)
        return sum(parts) / weights.sum()  # not .sum(-1), whose last bits depend on how many rows there are


@dataclass(frozen=True)
class Judged:
    """The judgement of a sample.

    Attributes:
        prompt: Text that the videos were generated from.
        scores: Weighted rewards (S,), or half the weighted label with either sign; the preferred side first. NaN where
            unknown.
        rewards: Rewards (S, D) in the same order; NaN where there is none.
        labels: Labels (D,) of the first side against the second; NaN where there is none.
        swapped: Whether B is the preferred side.
    """

    prompt: str
    scores: Tensor
    rewards: Tensor
    labels: Tensor
    swapped: bool


class Judgements:
    """Which side of each sample is preferred, and by how much: by its rewards, or by its labels without rewards.

    A few arrays hold the judgements, so that those of a million samples take little time and memory.

    Args:
        records: JSON record of each sample, and what to call the sample in messages.
        of: Kind of the videos, ``pairs`` or ``videos``.
        weights: Weights of the dimensions.

    Attributes:
        prompts: What the videos were generated from, N of them: the prompt, behind it the checksum of the image that
            they begin with, if their record states one.
        scores: (N, S), the preferred side first, as in :class:`Judged`.
        rewards: (N, S, D) in the same order.
        labels: (N, D).
        swapped: (N,) bool.

    Raises:
        ShardError: If rewards or labels are unsound, or a pair has neither.
    """

    def __init__(self, records: Iterable[tuple[dict, str]], of: str, weights: Weights) -> None:
        self.prompts: list[str] = []
        counted = [place for place, weight in enumerate((weights.VQ, weights.MQ, weights.TA)) if weight]
        rewards, labels = array("f"), array("f")
        for record, name in records:
            rows = _rewards(record, of, name)
            unknown = any(math.isnan(row[place]) for row in rows for place in counted)
            rewards.extend(value for row in rows for value in row)
            asked = of == "pairs" and (unknown or record.get("labels") is not None)
            labels.extend(labels_in(record, name)[: len(DIMENSIONS)] if asked else [math.nan] * len(DIMENSIONS))
            self.prompts.append(prompt_of(record, name) + _image_of(record))
        count = len(self.prompts)
        self.rewards = torch.tensor(rewards).view(count, len(OF[of]), len(DIMENSIONS))
        self.labels = torch.tensor(labels).view(count, len(DIMENSIONS))
        self.scores = weights(self.rewards)  # (N, S)
        self.swapped = torch.zeros(count, dtype=torch.bool)
        if of == "pairs":
            by_labels = weights(self.labels)  # (N,)
            by_labels = torch.stack([by_labels, -by_labels], 1) / 2
            self.scores = torch.where(self.scores.isnan().any(1, keepdim=True), by_labels, self.scores)
            self.swapped = self.scores[:, 1] > self.scores[:, 0]
            self.scores = torch.where(self.swapped[:, None], self.scores.flip(1), self.scores)
            self.rewards = torch.where(self.swapped[:, None, None], self.rewards.flip(1), self.rewards)
            self.labels = torch.where(self.swapped[:, None], -self.labels, self.labels)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, number: int) -> Judged:
        tensors = self.scores[number], self.rewards[number], self.labels[number]
        return Judged(self.prompts[number], *tensors, bool(self.swapped[number]))

    @property
    def margins(self) -> Tensor:
        """(N,) How much better the preferred side is; 0 for single videos."""
        return self.scores[:, 0] - self.scores[:, -1]

    def take(self, numbers: Tensor) -> "Judgements":
        """The judgements with these numbers (K,)."""
        part = object.__new__(Judgements)
        part.prompts = [self.prompts[number] for number in numbers.tolist()]
        for name in ("scores", "rewards", "labels", "swapped"):
            setattr(part, name, getattr(self, name)[numbers])
        return part


def _image_of(record: dict) -> str:
    image = record.get("image")
    return f"\n{image['sha256']}" if isinstance(image, dict) and isinstance(image.get("sha256"), str) else ""


def without_image(text: str) -> str:
    """A prompt of :class:`Judgements` without the checksum of the image that may stand behind it."""
    return re.sub(r"\n[0-9a-f]{64}$", "", text)


def _rewards(record: dict, of: str, name: str) -> list[list[float]]:
    """Rewards (S, D) of a record; NaN where there is none."""
    given = record.get("rewards")
    if given is None:
        return [[math.nan] * len(DIMENSIONS)] * len(OF[of])
    try:
        rows = [given.get(side, {}) for side in "AB"] if of == "pairs" else [given]
        return [[float(row.get(dimension, math.nan)) for dimension in DIMENSIONS] for row in rows]
    except (TypeError, ValueError, AttributeError):
        raise ShardError(f"{name}: rewards {given!r} are no numbers by dimension") from None
