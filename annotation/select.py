"""Active learning: which pairs a reward model is least certain about, so that people rate these first.

With one model, these are the pairs whose probability of a tie is largest: it cannot tell which video is better. With
two models, they are the pairs whose rewards differ most between the models: at least one of the two is wrong.
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
"""The paper's tie parameter theta (Bradley-Terry with ties, :mod:`..models.preference`)."""


def uncertainty(margins: Sequence[Tensor], scales: Sequence[Tensor]) -> Tensor:
    """How much there is to learn from each pair.

    Args:
        margins: For each of one or two models, (N, D) raw rewards of A minus those of B.
        scales: For each model, (D,) standard deviations of its rewards; two models are compared in these units.

    Returns:
        (N,) values that are only comparable among the same models; the largest one marks the least certain pair.
    """
    if len(margins) == 1:
        return probabilities(margins[0], THETA)[..., 1].mean(1)
    first, second = (margin / scale for margin, scale in zip(margins, scales))
    return (first - second).abs().mean(1)


def rank(
    models: Sequence[str], videos: ShardSet, ends: Sequence[tuple[str, str]], out: Path, device: str = "auto"
) -> Tensor:
    """Score the videos of pairs, and return the pairs' :func:`uncertainty`.

    Args:
        models: Folders of one or two reward models.
        videos: The *videos* set.
        ends: Keys of A and B of each pair.
        out: Folder for the rewards; an interrupted run continues from them.
        device: Device on which the models compute.
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
