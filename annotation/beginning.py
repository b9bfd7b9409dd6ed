"""`videoalign annotate begin`: a new round, from the choice of its pairs to its file of votes."""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .. import VideoAlignError
from ..datamodules.contents import Content
from ..datamodules.shards import ShardSet
from ..datamodules.video import coding
from ..models.files import read_yaml
from .pairing import choose
from .protocol import RatingProtocol
from .references import read_references
from .store import Store, new_round
from .vote_file import check_new

PLAYED = ("h264", "vp8", "vp9", "av1")
"""Codecs that browsers play; H.264 only with 8-bit 4:2:0 colours."""


def begin(
    videos: str,
    db: str,
    per_prompt: int = 3,
    validation: float = 0.1,
    benchmark: float = 0.1,
    seed: int = 0,
    protocol: str | None = None,
    references: str | None = None,
    select: str = "random",
    model: Sequence[str] = (),
    device: str = "auto",
) -> Store:
    """Begin a round: choose the pairs and write the file of votes.

    Args:
        videos: Folder of a *videos* set with several sources per prompt.
        db: The file to make.
        per_prompt: Number of pairs of each prompt, see :func:`.pairing.choose`.
        validation: Share of the prompts that is held out for validation.
        benchmark: Share of the prompts that is held out for a benchmark.
        seed: Seed of the choice of pairs.
        protocol: YAML file with settings of :class:`.protocol.RatingProtocol` that differ from its defaults.
        references: CSV file of the training round, see :mod:`.references`.
        select: ``random``, or ``uncertain`` to rate the pairs first about which the reward models are least certain.
        model: Folders of one or two reward models for ``uncertain``.
        device: Device on which the reward models compute.

    Returns:
        The open file of votes.
    """
    by_models, rules = ranks_by_models(select, model), read_protocol(protocol)
    check_new(db)
    shards = watchable(videos)
    contents = _played(shards)
    training = read_references(references, {c.key: c for c in contents}, rules) if references else []
    taken = {key for pair, _ in training for key in pair.keys}
    free = [content for content in contents if content.key not in taken]
    pairs = choose(free, per_prompt, (validation, benchmark), seed)
    if by_models:
        pairs = [pairs[i] for i in order_by_models(model, shards, [pair.keys for pair in pairs], db, device)]
    with new_round(db, pairs, rules, shards.digest, training):
        pass
    counts = ", ".join(f"{count} {split}" for split, count in Counter(pair.split for pair in pairs).items())
    print(f"{len(pairs)} pairs to rate ({counts}), {len(training)} for the training round: {db}")
    return Store(db)


def ranks_by_models(select: str, model: Sequence[str]) -> bool:
    """Whether reward models decide which pairs are rated first; refuses one of the two options without the other."""
    if (select == "uncertain") != bool(model):
        raise VideoAlignError("--select uncertain needs --model, and --model needs --select uncertain")
    return bool(model)


def order_by_models(
    model: Sequence[str], shards: ShardSet, ends: Sequence[tuple[str, str]], db: str, device: str
) -> list[int]:
    """Order in which to rate pairs, the least certain one first.

    Args:
        model: Folders of one or two reward models.
        shards: The *videos* set.
        ends: Keys of A and B of each pair.
        db: The file of votes; rewards are kept beside it.
        device: Device on which the reward models compute.

    Returns:
        Places of the pairs in ``ends``.
    """
    from .select import rank

    print(f"ranking {len(ends)} pairs by what {' and '.join(model)} know of them", file=sys.stderr, flush=True)
    uncertainty = rank(model, shards, ends, Path(f"{db}.rewards"), device)
    return uncertainty.argsort(descending=True, stable=True).tolist()


def watchable(path: str) -> ShardSet:
    """A set of videos that people can watch; refuses one of decoded frames."""
    shards = ShardSet(path, "videos")
    if shards.index.media != "mp4":
        raise VideoAlignError(f"--videos {path} holds decoded frames; people need the set with mp4 files")
    return shards


def read_protocol(path: str | None) -> RatingProtocol:
    """The rules in a YAML file; without a file, the paper's."""
    found = read_yaml(path, "--protocol") if path else {}
    if not isinstance(found, dict):
        raise VideoAlignError(f"--protocol {path} holds no settings by name")
    return RatingProtocol.of(found)


def _played(shards: ShardSet) -> list[Content]:
    """The contents of a set; refuses a set with videos that browsers do not play."""
    contents, silent = list(shards.contents()), []
    print(f"looking whether browsers play the {len(contents)} videos of {shards.name}", file=sys.stderr, flush=True)
    for content in contents:
        codec, pixels = coding(content.read("mp4"), content.name)
        if codec not in PLAYED or (codec == "h264" and pixels not in ("yuv420p", "yuvj420p")):
            silent.append(f"{content.key}: {codec} {pixels}")
    if silent:
        raise VideoAlignError(
            f"browsers do not play {len(silent)} of the {len(contents)} videos in {shards.name}, first {silent[0]}; "
            "make H.264 files with 4:2:0 colours of them (ffmpeg -i IN -c:v libx264 -pix_fmt yuv420p OUT) and import "
            "those"
        )
    return contents
