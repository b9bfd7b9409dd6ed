"""`videoalign annotate begin`: a new round, from the choice of its pairs to its file of votes."""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from .. import VideoAlignError
from ..datamodules.contents import Content
from ..datamodules.shards import ShardSet
from ..datamodules.video import coding
from ..models.files import read_yaml
from .grouping import choose_groups
from .masking import read_masks
from .pairing import Pair, choose
from .prompt_images import images_in, read_images
from .protocol import RatingProtocol
from .references import read_references
from .shown import new_shown
from .store import Store, new_round
from .vote_file import check_new

PLAYED = ("h264", "vp8", "vp9", "av1")
"""Codecs that browsers play; H.264 only with 8-bit 4:2:0 colours."""
RATED = {"pairs": "pairs", "single": "videos", "ranking": "rankings"}
"""What is rated in each kind of round, in words."""


def begin(
    videos: str,
    db: str,
    per_prompt: int | None = None,
    validation: float = 0.1,
    benchmark: float = 0.1,
    seed: int = 0,
    protocol: str | None = None,
    references: str | None = None,
    select: str = "random",
    model: Sequence[str] = (),
    device: str = "auto",
    mask: Sequence[str] = (),
    masks: str | None = None,
    images: str | None = None,
) -> Store:
    """Begin a round: choose the pairs and write the file of votes.

    Args:
        videos: Folder of a *videos* set with several sources per prompt.
        db: The file to make.
        per_prompt: Number of pairs (by default 3), single videos or rankings (by default all) of each prompt, see
            :func:`.pairing.choose` and :func:`.grouping.choose_groups`.
        validation: Share of the prompts that is held out for validation.
        benchmark: Share of the prompts that is held out for a benchmark.
        seed: Seed of the choice of pairs.
        protocol: YAML file with settings of :class:`.protocol.RatingProtocol` that differ from its defaults.
        references: CSV file of the training round, see :mod:`.references`.
        select: ``random``, or ``uncertain`` to rate the pairs first about which the reward models are least certain.
        model: Folders of one or two reward models for ``uncertain``.
        device: Device on which the reward models compute.
        mask: Boxes over watermarks, each like ``SOURCE=x,y,w,h``, see :mod:`.masking`.
        masks: CSV file of such boxes.
        images: CSV file with the images that the videos were made of, see :mod:`.prompt_images`; those that the set
            holds itself if not given.

    Returns:
        The open file of votes.
    """
    rules = read_protocol(protocol)
    by_models = ranks_by_models(select, model, rules)
    boxes = read_masks(mask, masks)
    check_new(db)
    shards = watchable(videos)
    contents = _played(shards)
    by_key = {content.key: content for content in contents}
    pictures = read_images(images, by_key) if images else images_in(by_key)
    training = read_references(references, by_key, rules) if references else []
    taken = {key for pair, _ in training for key in pair.keys}
    free = [content for content in contents if content.key not in taken]
    named = {key: picture.name for key, picture in pictures.items()}
    pairs = _choose(free, rules, per_prompt, (validation, benchmark), seed, named)
    if by_models:
        pairs = [pairs[i] for i in order_by_models(model, shards, [pair.keys for pair in pairs], db, device)]
    with new_shown(db, by_key, boxes, pictures) as shown, new_round(db, pairs, rules, shards.digest, training, shown):
        pass
    counts = ", ".join(f"{count} {split}" for split, count in Counter(pair.split for pair in pairs).items())
    print(f"{len(pairs)} {RATED[rules.kind]} to rate ({counts}), {len(training)} for the training round: {db}")
    return Store(db)


def _choose(
    contents: Sequence[Content],
    rules: RatingProtocol,
    per_prompt: int | None,
    shares: tuple[float, float],
    seed: int,
    images: Mapping[str, str],
) -> list[Pair]:
    """The pairs, single videos or groups that a round rates."""
    if rules.kind == "pairs":
        return choose(contents, 3 if per_prompt is None else per_prompt, shares, seed, images)
    return choose_groups(contents, rules.most, per_prompt, shares, seed, images)


def ranks_by_models(select: str, model: Sequence[str], rules: RatingProtocol) -> bool:
    """Whether reward models decide which pairs are rated first; refuses options that do not go together."""
    if (select == "uncertain") != bool(model):
        raise VideoAlignError("--select uncertain needs --model, and --model needs --select uncertain")
    if model and rules.kind != "pairs":
        raise VideoAlignError(f"--select uncertain chooses pairs, and the protocol's kind is {rules.kind}")
    return bool(model)


def order_by_models(
    model: Sequence[str], shards: ShardSet, ends: Sequence[tuple[str, ...]], db: str, device: str
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
