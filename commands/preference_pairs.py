"""`videoalign shards pairs-from-rewards`: preference pairs of videos that a reward model has scored.

From a generator's own samples (a *videos* set), the best against the worst of each prompt, or all that differ by more
than a margin; or a *pairs* set whose labels a reward model replaces, as the paper does with its training set (section 5.2).
Rewards are kept with each pair, normalised: alignment reads preferences, margins and weights from them.
"""

import math
import sys
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from .. import VideoAlignError
from ..alignment.reward_model import RewardModel
from ..callbacks.progress import PredictProgress
from ..datamodules.latents import Weights
from ..datamodules.ratings import WORDS
from ..datamodules.shards import SIDES, Content, ShardSet, ShardWriter
from ..models.files import claims_out
from ..models.finite import require_finite
from ..models.preference import DIMENSIONS, OVERALL
from .benchmarking import score_set
from .inference import Source, predicting

MODES = ("best-worst", "margin", "relabel")


@claims_out
def pairs_from_rewards(
    source: Source,
    data: str,
    out: str,
    mode: str,
    weights: Weights,
    margin: float,
    batch_size: int,
    workers: int,
    device: str,
    devices: int = 1,
) -> str | None:
    """Score a set's videos and write pairs of them.

    Args:
        source: Where the reward model comes from.
        data: *Videos* set (``relabel``: *pairs* set).
        out: Folder to make; the rewards of an interrupted run are beside it and are taken up.
        mode: One of :data:`MODES`.
        weights: Weights of the dimensions in what "better" means.
        margin: Pairs whose weighted rewards differ by no more are left out.
        batch_size: Videos at once.
        workers: Processes that decode.
        device: ``auto``, ``cpu`` or ``gpu``.
        devices: Processes that share the scoring.

    Returns:
        What was found, as text; None on every process but the first.
    """
    if not (math.isfinite(margin) and margin >= 0):
        raise VideoAlignError(f"--margin must be a number from 0 on, got {margin}")
    shards = ShardSet(data)
    want = "pairs" if mode == "relabel" else "videos"
    if shards.index.kind != want or shards.index.media != "mp4":
        raise VideoAlignError(
            f"{data} holds {shards.index.kind} as {shards.index.media}; --mode {mode} needs {want} with mp4 files"
        )
    contents = {content.key: content for content in shards.contents()}
    keys = [f"{key}.{side}".rstrip(".") for key in contents for side in SIDES[shards.index.kind]]
    network = source.load()
    network.need_statistics(source.model)
    trainer = predicting(device, [PredictProgress()], sys.stderr.isatty(), devices)
    folder = Path(out).parent / f"{Path(out).name}.rewards"
    raw = score_set(trainer, RewardModel(network), shards, keys, folder, batch_size, workers)
    if not trainer.is_global_zero:
        return None
    rewards = dict(zip(keys, network.normalise(raw)))
    require_finite(f"the rewards of {data}", rewards, f"look at the statistics of {source.model}")
    if mode == "relabel":
        chosen = [((content, "a"), (content, "b")) for content in contents.values()]
    else:
        chosen = _choose(contents, rewards, weights, mode, margin)
    with ShardWriter(out, "pairs") as writer:
        left_out = 0
        for number, ((a, side_a), (b, side_b)) in enumerate(chosen):
            both = torch.stack([rewards[f"{c.key}.{s}".rstrip(".")] for c, s in ((a, side_a), (b, side_b))])
            if abs(float(weights(both).diff())) <= margin:
                left_out += 1
                continue
            key = a.key if mode == "relabel" else f"{number:06d}"
            media = {"a": a.read(f"{side_a}.mp4".lstrip(".")), "b": b.read(f"{side_b}.mp4".lstrip("."))}
            writer.write(key, media, _record(a, b, both, mode))
    return (
        f"{len(chosen) - left_out} pairs of {len(contents)} samples, {left_out} left out with a margin of at most {margin}; mean "
        f"reward {', '.join(f'{d} {v:+.3f}' for d, v in zip(DIMENSIONS, torch.stack(list(rewards.values())).mean(0).tolist()))}"
    )


def _choose(
    contents: dict[str, Content], rewards: dict[str, Tensor], weights: Weights, mode: str, margin: float
) -> list:
    """Pairs of each prompt's videos, in the order of their keys, so that neither side is the better one by its place."""
    of_prompt: dict[str, list[Content]] = {}
    for content in contents.values():
        of_prompt.setdefault(content.record["prompt"], []).append(content)
    chosen = []
    for group in of_prompt.values():
        score = {content.key: float(weights(rewards[content.key])) for content in group}
        if mode == "best-worst":
            ends = {max(score, key=score.get), min(score, key=score.get)}
            pairs = [tuple(c for c in group if c.key in ends)] if len(ends) == 2 else []
        else:
            pairs = [pair for pair in combinations(group, 2) if abs(score[pair[0].key] - score[pair[1].key]) > margin]
        chosen += [((a, ""), (b, "")) for a, b in pairs]
    if not chosen:
        raise VideoAlignError(
            "no prompt has two videos that differ enough, so there is no pair to write; generate more samples per prompt"
        )
    return chosen


def _record(a: Content, b: Content, rewards: Tensor, mode: str) -> dict:
    """Prompt, labels by the sign of each difference, rewards, and where the two came from."""
    difference = torch.cat([rewards[0] - rewards[1], (rewards[0] - rewards[1]).sum()[None]])
    labels = {column: WORDS[int(sign)] for column, sign in zip((*DIMENSIONS, OVERALL), difference.sign().tolist())}
    kept = {
        "labels": labels,
        "rewards": {side: dict(zip(DIMENSIONS, row)) for side, row in zip("AB", rewards.tolist())},
    }
    if mode == "relabel":
        return {**a.record, **kept}
    both = dict(zip("AB", (a, b)))
    return {
        "prompt": a.record["prompt"],
        **kept,
        "sources": {s: c.record.get("source", "") for s, c in both.items()},
        "keys": {s: c.key for s, c in both.items()},
        "seeds": {s: c.record.get("seed") for s, c in both.items()},
        "guidance": {s: c.record.get("guidance") for s, c in both.items()},
        "fps": {s: c.record.get("fps") for s, c in both.items()},
        "num_frames": {s: c.record.get("num_frames") for s, c in both.items()},
    }
