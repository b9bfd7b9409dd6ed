"""How well a judge orders clips of one generator, against annotators who rate pairs of them.

Clips that are all alike are hard to order for anyone. So the accuracy of the oracle's own qualities on the same labels,
the ceiling, stands beside the judge's: where both fall, the clips have come closer to each other; where the judge's
alone falls, it no longer knows what it sees.

Legend: N clips, P pairs.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...datamodules.ratings import COLUMNS, WORDS
from ...models.metrics import PreferenceAccuracy
from .annotators import annotate

_LABELS = {word: float(label) for label, word in WORDS.items()}


def ring_pairs(prompts: Sequence[str], per_clip: int, seed: int) -> list[tuple[int, int]]:
    """Pairs of clips of one prompt, in which every clip occurs equally often: neighbours on a ring in random order.

    Args:
        prompts: Prompt of each clip.
        per_clip: Number of pairs that each clip is in, even; fewer where a prompt has too few clips.
        seed: Seed of the order and of the sides.
    """
    rng = np.random.default_rng([seed, 63])
    of_prompt: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        of_prompt.setdefault(prompt, []).append(number)
    pairs = []
    for group in of_prompt.values():
        ring = [group[i] for i in rng.permutation(len(group))]
        known = set()
        for step in range(1, per_clip // 2 + 1):
            for place, one in enumerate(ring):
                other = ring[(place + step) % len(ring)]
                if other != one and frozenset((one, other)) not in known:
                    known.add(frozenset((one, other)))
                    pairs.append((one, other) if rng.random() < 0.5 else (other, one))
    return pairs


def output_accuracy(
    quality: Tensor, rewards: Tensor, prompts: Sequence[str], per_clip: int = 4, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Accuracies without ties on pairs that annotators rate, by column.

    Pairs and the annotators' noise depend on the seed and the clips' places alone. So generators that sampled the same
    prompts with the same noises are compared on the same pairs, by equally lucky annotators.

    Args:
        quality: Qualities (N, 3) that the annotators perceive: the oracle's.
        rewards: The judge's rewards (N, 3), normalised.
        prompts: Prompt of each clip.
        per_clip: Number of pairs that each clip is in.
        seed: Seed of pairs and annotators.

    Returns:
        By column (VQ, MQ, TA, Overall) the accuracies of the ``judge`` and of the oracle, the ``ceiling``, and the
        share of pairs that are ``decided``. A column in which no pair is decided is left out.
    """
    pairs = torch.tensor(ring_pairs(prompts, per_clip, seed))  # (P, 2)
    rng = np.random.default_rng([seed, 64])
    labels = []
    for a, b in pairs.tolist():
        rating = annotate(quality[a].double().numpy(), quality[b].double().numpy(), rng)
        labels.append([_LABELS[word] for word in rating["labels"]])
    labels = torch.tensor(labels)
    decided = (labels != 0).double().mean(0).tolist()
    found = {"judge": _accuracies(rewards, pairs, labels), "ceiling": _accuracies(quality, pairs, labels)}
    return {**found, "decided": dict(zip(COLUMNS, decided))}


def _accuracies(values: Tensor, pairs: Tensor, labels: Tensor) -> dict[str, float]:
    metric = PreferenceAccuracy(resamples=0)
    metric.update(values[pairs[:, 0]] - values[pairs[:, 1]], labels)
    return {column: row["without_ties"] for column, row in metric.compute().items() if row["decided"]}
