"""Held-out pairs with the rewards that a validation gave them, gathered from all ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..datamodules.data_ranks import merged
from ..models.dimensions import DIMENSIONS
from ..models.preference import probabilities, tie_threshold

OUTCOMES = ("A", "same", "B")
"""What people and the model say of a pair, in the order of rows and columns."""


@dataclass(frozen=True)
class HeldOut:
    """Held-out pairs, sorted by key, so that nothing depends on the number of ranks.

    Attributes:
        keys: Keys of the N pairs.
        sources: Names of the models that made A and B; empty where unknown.
        labels: Labels (N, D): +1 / -1 / 0, NaN where there is none.
        rewards: Raw rewards (N, 2, D) of A and B.
    """

    keys: Sequence[str]
    sources: Sequence[tuple[str, str]]
    labels: Tensor
    rewards: Tensor

    @property
    def margins(self) -> Tensor:
        """Rewards A minus rewards B, (N, D)."""
        return self.rewards[:, 0] - self.rewards[:, 1]


class Rows:
    """Collects the pairs of a rank, batch by batch."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple] = {}

    def add(self, batch: dict, rewards: Tensor) -> None:
        """Add a batch.

        Args:
            batch: Batch of pairs with ``keys``, ``labels``, ``valid`` and, where they are known, ``sources``.
            rewards: Raw rewards (2, N, D) of A and B.
        """
        sources = batch.get("sources") or [("", "")] * len(batch["keys"])
        labels = batch["labels"][:, : len(DIMENSIONS)].tolist()
        both = rewards.detach().float().transpose(0, 1).tolist()
        for key, source, label, reward, valid in zip(batch["keys"], sources, labels, both, batch["valid"].tolist()):
            if valid:
                self.rows[key] = tuple(source), label, reward

    def gathered(self) -> HeldOut | None:
        """The pairs of all ranks; None where there is none. Collective: every rank must call it."""
        rows = sorted((key, *row) for key, row in merged(self.rows).items())
        if not rows:
            return None
        keys, sources, labels, rewards = zip(*rows)
        return HeldOut(keys, sources, torch.tensor(labels), torch.tensor(rewards))


class Confusion(NamedTuple):
    """What people and the model say of the pairs of one dimension."""

    threshold: float
    """Tie threshold with the best accuracy; -1 where it is best to predict no tie."""
    counts: Tensor
    """Numbers of pairs (3, 3), whole: rows are labels and columns predictions, in the order of :data:`OUTCOMES`."""


def confusion(labels: Tensor, margins: Tensor) -> Confusion:
    """Count labels against predictions at the tie threshold with the best accuracy.

    Args:
        labels: Labels (N,): +1 / -1 / 0, NaN where there is none; these are left out.
        margins: Rewards A minus rewards B, (N,).
    """
    known = ~labels.isnan()
    labels, margins = labels[known], margins[known]
    threshold = tie_threshold(labels, margins)
    predicted = torch.where(margins.double().abs() <= max(threshold, 0.0), 0.0, margins.sign())
    counts = torch.zeros(3, 3, dtype=torch.long)
    for label, said in zip((1 - labels).long().tolist(), (1 - predicted).long().tolist()):
        counts[label, said] += 1
    return Confusion(threshold, counts)


def source_accuracies(pairs: HeldOut) -> dict[str, list[tuple[float, int]]]:
    """Accuracy without ties of each pair of sources, most frequent first; pairs without sources are left out.

    Returns:
        Accuracy (NaN without a decided pair) and number of decided pairs per dimension, by the names of both sources.
    """
    found: dict[str, list[int]] = {}
    for number, sources in enumerate(pairs.sources):
        if any(sources):
            found.setdefault(" | ".join(sorted(name or "unknown" for name in sources)), []).append(number)
    rows = {}
    for name, numbers in sorted(found.items(), key=lambda item: (-len(item[1]), item[0])):
        labels, margins = pairs.labels[numbers], pairs.margins[numbers]
        decided = ~labels.isnan() & (labels != 0)
        right = (labels * margins > 0) & decided
        count = decided.sum(0)
        rows[name] = list(zip((right.sum(0) / count).tolist(), count.tolist()))
    return rows


def surprises(pairs: HeldOut, theta: float) -> tuple[list[int], list[int]]:
    """Order pairs by the probability that the model gives to what people said.

    Args:
        pairs: The pairs.
        theta: Tie parameter of the probabilities. At 1 a tie has no probability, and labels of a tie do not count.

    Returns:
        Numbers of the pairs for which another outcome is more probable than a label, from the least probable label on;
        and of those that people decided in some dimension, from the one whose labels are most probable together to the
        least.
    """
    outcome = probabilities(pairs.margins.double(), theta)  # (N, D, 3)
    known = ~pairs.labels.isnan() & ((pairs.labels != 0) | (theta > 1))
    index = (1 - pairs.labels.nan_to_num()).long()[..., None]
    logs = outcome.gather(-1, index).squeeze(-1).log()  # (N, D)
    worst = logs.masked_fill(~known, torch.inf).amin(1)
    # the mean, so that a pair with fewer labels is not thought to be surer
    together = torch.where(known, logs, 0.0).sum(1) / known.sum(1)
    decided = (known & (pairs.labels != 0)).any(1)
    wrong = (known & (outcome.argmax(-1, keepdim=True) != index).squeeze(-1)).any(1)
    mistakes = [n for n in worst.argsort(stable=True).tolist() if wrong[n]]
    agreements = [n for n in together.argsort(descending=True, stable=True).tolist() if decided[n]]
    return mistakes, agreements
