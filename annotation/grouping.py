"""What is rated in rounds without pairs: single videos, and groups of videos of one prompt to rank."""

import random
from collections.abc import Iterable, Mapping, Sequence

from .. import VideoAlignError
from ..datamodules.contents import Content
from ..datamodules.ratings import prompt_of
from .pairing import Pair, split_prompts


def choose_groups(
    contents: Sequence[Content],
    most: int,
    per_prompt: int | None = None,
    shares: Sequence[float] = (0.0, 0.0),
    seed: int = 0,
    images: Mapping[str, str] | None = None,
) -> list[Pair]:
    """Single videos or groups to rank, in a random order; the same for the same seed.

    No video is in two groups. Groups hold as many different sources as there are, and several videos of one source
    where there are no others (best of n).

    Args:
        contents: Contents of the set, whose records name ``prompt``; ``source`` may be missing.
        most: Largest number of videos in a group; 1 for single videos.
        per_prompt: Largest number of groups of each prompt; None for as many as there are.
        shares: Shares of the prompts for validation and benchmark, see :func:`.pairing.split_prompts`.
        seed: Seed of the draw.
        images: Name of the image that a video was made of, by key; videos of one group have the same image or none.

    Raises:
        VideoAlignError: No prompt has two videos to rank.
    """
    rng, of_prompt, given = random.Random(f"{seed} groups"), {}, images or {}
    for content in sorted(contents, key=lambda content: content.key):
        alike = of_prompt.setdefault(prompt_of(content.record, content.name), {})
        alike.setdefault(given.get(content.key), []).append(content)
    groups = {
        prompt: [group for videos in alike.values() for group in _groups(videos, most, rng)]
        for prompt, alike in sorted(of_prompt.items())
    }
    groups = {prompt: found[:per_prompt] for prompt, found in groups.items() if found}
    if not groups:
        raise VideoAlignError("no prompt has two videos, so there is nothing to rank")
    splits = split_prompts([*groups], shares, seed)
    chosen = [
        Pair(prompt, tuple(c.key for c in group), tuple(map(source_of, group)), splits[prompt])
        for prompt, found in groups.items()
        for group in found
    ]
    rng.shuffle(chosen)
    return chosen


def _groups(videos: Sequence[Content], most: int, rng: random.Random) -> Iterable[list[Content]]:
    """Videos of one prompt and image in groups; what is left of rankings is a smaller group, or nothing."""
    of_source: dict[str, list[Content]] = {}
    for video in rng.sample(videos, len(videos)):
        of_source.setdefault(source_of(video), []).append(video)
    # one of each source in turn: so neighbours differ as long as they can
    turns = [(place, video) for of_one in of_source.values() for place, video in enumerate(of_one)]
    order = [video for _, video in sorted(turns, key=lambda turn: turn[0])]
    groups = [order[start : start + most] for start in range(0, len(order), most)]
    for group in groups:
        rng.shuffle(group)
    return [group for group in groups if len(group) >= min(most, 2)]


def source_of(content: Content) -> str:
    """The model that made a video; empty where the record does not say."""
    return str(content.record.get("source") or "")
