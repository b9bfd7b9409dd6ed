"""Which pair is rated next: those of which a reward model knows least (active learning).

With one model, pairs whose probability of a tie is largest: it cannot tell which video is better. With two, pairs in which their
rewards differ most: at least one of them is wrong.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .. import VideoAlignError
from ..commands.reward_judge import RewardJudge
from ..datamodules.shards import ShardSet
from ..models.preference import probabilities

THETA = 5.0
"""Of a tie's probability (the paper's)."""


def uncertainty(margins: Sequence[Tensor], scales: Sequence[Tensor]) -> Tensor:
    """(N,) how much there is to learn from each pair.

    Args:
        margins: of one or two models, (N, D) raw rewards of A minus those of B. scales: of each, (D,) deviations of the rewards: two
            models are compared in these.
    """
    if len(margins) == 1:
        return probabilities(margins[0], THETA)[..., 1].mean(1)
    first, second = (margin / scale for margin, scale in zip(margins, scales))
    return (first - second).abs().mean(1)


def rank(
    models: Sequence[str], videos: ShardSet, ends: Sequence[tuple[str, str]], out: Path, device: str = "auto"
) -> Tensor:
    """:func:`uncertainty` of pairs of a *videos* set.

    Args:
        models: folders of one or two reward models. ends: keys of A and B. out: folder for rewards; an interrupted run goes on.
    """
    if not 1 <= len(models) <= 2:
        raise VideoAlignError(f"--model names {len(models)} reward models; one or two decide which pairs are uncertain")
    keys = sorted({key for pair in ends for key in pair})
    place = {key: number for number, key in enumerate(keys)}
    both = torch.tensor([[place[a], place[b]] for a, b in ends])
    margins, scales = [], []
    for model in models:
        judge = RewardJudge(model=model, batch_size=16, device=device)
        judge.need_statistics()
        record = json.dumps(judge.record_of(videos), sort_keys=True)
        rewards = out / hashlib.sha256(record.encode()).hexdigest()[:16]  # another model's stand elsewhere
        raw = judge.score_set(videos, keys, rewards, progress=True)
        margins.append(raw[both[:, 0]] - raw[both[:, 1]])  # (N, D)
        scales.append(torch.tensor(judge.network.statistics.std))
    return uncertainty(margins, scales)
