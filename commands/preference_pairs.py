"""`videoalign shards pairs-from-rewards`: preference pairs of videos that a reward model has scored.

From a generator's own samples (a *videos* set), the best against the worst of each prompt, or all that differ by more
than a margin; or a *pairs* set whose labels a reward model replaces, as the paper does with its training set (section
5.2). Rewards are kept with each pair, normalised: alignment reads preferences, margins and weights from them.
"""

import math
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from .. import VideoAlignError
from ..datamodules.addresses import is_address, short_name
from ..datamodules.contents import Content
from ..datamodules.judgements import Weights
from ..datamodules.ratings import WORDS
from ..datamodules.sample_images import image_of
from ..datamodules.set_index import shape_by_side
from ..datamodules.shards import SIDES, ShardSet, ShardWriter
from ..datamodules.uploads import claims_set
from ..models.dimensions import DIMENSIONS, OVERALL
from ..models.finite import require_finite
from .reward_judge import RewardJudge

MODES = ("best-worst", "margin", "relabel")

Video = tuple[Content, str]
"""A sample of a set and which of its sides: ``a`` or ``b``, empty in a *videos* set."""


@claims_set
def pairs_from_rewards(
    judge: RewardJudge, data: str, out: str, mode: str, weights: Weights, margin: float
) -> str | None:
    """Score a set's videos and write pairs of them.

    Args:
        judge: The reward model that labels.
        data: Folder of a *videos* set; ``relabel`` takes a *pairs* set.
        out: Folder or address to write; the rewards of an interrupted run are in :func:`rewards_beside` it and are
            taken up.
        mode: One of :data:`MODES`.
        weights: Weights of the dimensions in what "better" means.
        margin: Pairs whose weighted rewards differ by no more are left out.

    Returns:
        Numbers of pairs and mean rewards as text; None on every process but the first.
    """
    if not (math.isfinite(margin) and margin >= 0):
        raise VideoAlignError(f"--margin must be a number from 0 on, got {margin}")
    shards = ShardSet(data)
    want = "pairs" if mode == "relabel" else "videos"
    if shards.index.kind != want or shards.index.media != "mp4":
        raise VideoAlignError(
            f"{data} holds {shards.index.kind} as {shards.index.media}; --mode {mode} needs {want} with mp4 files"
        )
    rewards = _rewards(judge, shards, rewards_beside(out))
    if rewards is None:
        return None
    contents = {content.key: content for content in shards.contents()}
    if mode == "relabel":
        chosen = [((content, "a"), (content, "b")) for content in contents.values()]
    else:
        chosen = _choose(contents, rewards, weights, mode, margin)
    with ShardWriter(out, "pairs") as writer:
        written = 0
        for number, (a, b) in enumerate(chosen):
            both = torch.stack([rewards[_name(*a)], rewards[_name(*b)]])
            if abs(float(weights(both).diff())) > margin:
                key = a[0].key if mode == "relabel" else f"{number:06d}"
                record = _record(a[0], b[0], both, mode)
                writer.write(key, {"a": _media(*a), "b": _media(*b)}, record, image_of(a[0]))
                written += 1
    means = zip(DIMENSIONS, torch.stack(list(rewards.values())).mean(0).tolist())
    return (
        f"{written} pairs of {len(contents)} samples, {len(chosen) - written} left out with a margin of at most "
        f"{margin}; mean reward {', '.join(f'{dimension} {mean:+.3f}' for dimension, mean in means)}"
    )


def rewards_beside(out: str) -> Path:
    """Folder of the rewards of an output: beside it, or in the current folder where it is an address."""
    place = Path(short_name(out)) if is_address(out) else Path(out)
    return place.with_name(f"{place.name}.rewards")


def _rewards(judge: RewardJudge, shards: ShardSet, folder: Path) -> dict[str, Tensor] | None:
    """Normalised rewards (D,) of all videos of a set by name; None on every process but the first."""
    judge.need_statistics()
    names = [_name(content, side) for content in shards.contents() for side in SIDES[shards.index.kind]]
    raw = judge.score_set(shards, names, folder, progress=True)
    if raw is None:
        return None
    rewards = dict(zip(names, judge.network.normalise(raw)))
    require_finite(f"the rewards of {shards.name}", rewards, f"look at the statistics of {judge.model}")
    return rewards


def _name(content: Content, side: str) -> str:
    """What rewards call a video."""
    return f"{content.key}.{side}".rstrip(".")


def _media(content: Content, side: str) -> bytes:
    """The video's file."""
    return content.read(f"{side}.mp4".lstrip("."))


def _choose(
    contents: dict[str, Content], rewards: dict[str, Tensor], weights: Weights, mode: str, margin: float
) -> list[tuple[Video, Video]]:
    """Pairs of the videos of each prompt and image, in the order of their keys: no side is the better by its place."""
    of_prompt: dict[tuple[str, str], list[Content]] = {}
    for content in contents.values():
        of_prompt.setdefault((content.record["prompt"], content.image_id), []).append(content)
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
            "no prompt has two videos that differ enough (and begin with one image, where they begin with any), so "
            "there is no pair to write; "
            "generate more samples per prompt"
        )
    return chosen


def _record(a: Content, b: Content, rewards: Tensor, mode: str) -> dict:
    """A pair's record: prompt, labels by the sign of each difference, rewards, and the videos' own records."""
    difference = torch.cat([rewards[0] - rewards[1], (rewards[0] - rewards[1]).sum()[None]])
    labels = {column: WORDS[int(sign)] for column, sign in zip((*DIMENSIONS, OVERALL), difference.sign().tolist())}
    kept = {
        "labels": labels,
        "rewards": {side: dict(zip(DIMENSIONS, row)) for side, row in zip("AB", rewards.tolist())},
    }
    if mode == "relabel":
        by_people = ("scores", "votes")  # of the labels that are replaced
        return {**{name: value for name, value in a.record.items() if name not in by_people}, **kept}
    both = dict(zip("AB", (a, b)))
    return {
        "prompt": a.record["prompt"],
        **({"image": a.record["image"]} if "image" in a.record else {}),
        **kept,
        "sources": {s: c.record.get("source", "") for s, c in both.items()},
        "keys": {s: c.key for s, c in both.items()},
        "seeds": {s: c.record.get("seed") for s, c in both.items()},
        "guidance": {s: c.record.get("guidance") for s, c in both.items()},
        **shape_by_side(a.record, b.record),
    }
