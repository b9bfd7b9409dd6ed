"""Which videos are rated against each other: of different sources, at the same prompt, in balance.

Single videos and groups to rank, which other kinds of rounds rate, are in :mod:`.grouping`.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from .. import VideoAlignError
from ..datamodules.contents import Content
from ..datamodules.ratings import prompt_of

SPLITS = ("train", "validation", "benchmark")


@dataclass(frozen=True)
class Pair:
    """Two videos of one prompt; in other kinds of rounds, one video or several.

    Attributes:
        prompt: The prompt of all.
        keys: Keys of A and B (and so on).
        sources: Sources of A and B (and so on).
        split: One of :data:`SPLITS`, the same for all pairs of a prompt.
    """

    prompt: str
    keys: tuple[str, ...]
    sources: tuple[str, ...]
    split: str


def split_prompts(prompts: Sequence[str], shares: Sequence[float], seed: int) -> dict[str, str]:
    """The split of each prompt; no prompt is in two.

    Args:
        prompts: The prompts, each once.
        shares: Shares of validation and benchmark; the rest is for training. A share above 0 gets at least one prompt.
        seed: Seed of the draw.

    Raises:
        VideoAlignError: The shares leave nothing for training, or there are too few prompts.
    """
    validation, benchmark = shares
    if not (min(shares) >= 0 and sum(shares) < 1):  # NaN is refused, too
        raise VideoAlignError(
            f"shares of validation and benchmark {tuple(shares)} must not be negative, and leave some for training"
        )
    order = sorted(prompts)
    random.Random(f"{seed} split").shuffle(order)
    counts = [max(1, round(share * len(order))) if share else 0 for share in (validation, benchmark)]
    if sum(counts) >= len(order):
        raise VideoAlignError(
            f"{len(order)} prompts are too few for a training, a validation and a benchmark split; set shares to 0"
        )
    return {
        prompt: "validation" if i < counts[0] else "benchmark" if i < sum(counts) else "train"
        for i, prompt in enumerate(order)
    }


def choose(
    contents: Sequence[Content],
    per_prompt: int,
    shares: Sequence[float] = (0.0, 0.0),
    seed: int = 0,
    images: Mapping[str, str] | None = None,
) -> list[Pair]:
    """Pairs to rate of a *videos* set, in a random order; the same for the same seed.

    Prompts are split first. Within a prompt, the pair comes first whose two sources were paired least often so far in
    the split, and among equals the one whose videos were used least. So all pairs of sources, and all videos, are
    rated about equally often in each split. No two videos are paired twice.

    Args:
        contents: Contents of the set, whose records name ``prompt`` and ``source``.
        per_prompt: Number of pairs of each prompt; fewer where it has too few videos.
        shares: Shares of the prompts for validation and benchmark, see :func:`split_prompts`.
        seed: Seed of the draw.
        images: Name of the image that a video was made of, by key; videos of one pair have the same image or none.

    Raises:
        VideoAlignError: No prompt has videos of two sources.
    """
    if per_prompt < 1:
        raise VideoAlignError(f"pairs per prompt must be at least 1, got {per_prompt}")
    rng = random.Random(f"{seed} pairs")
    candidates = _candidates(contents, rng, images or {})
    splits = split_prompts([prompt for prompt, pairs in candidates.items() if pairs], shares, seed)
    paired, used = Counter(), Counter()
    chosen: list[Pair] = []
    # one pair of each prompt at a time: that is better balanced than all of one prompt after the other
    for _ in range(per_prompt):
        order = [prompt for prompt, pairs in candidates.items() if pairs]
        rng.shuffle(order)
        for prompt in order:
            split = splits[prompt]
            a, b = min(candidates[prompt], key=lambda p: (paired[_sources(*p, split)], used[p[0].key] + used[p[1].key]))
            candidates[prompt].remove((a, b))
            paired[_sources(a, b, split)] += 1
            used.update((a.key, b.key))
            a, b = (a, b) if rng.random() < 0.5 else (b, a)
            chosen.append(Pair(prompt, (a.key, b.key), (_source(a), _source(b)), split))
    rng.shuffle(chosen)
    return chosen


def _candidates(
    contents: Sequence[Content], rng: random.Random, images: Mapping[str, str]
) -> dict[str, list[tuple[Content, Content]]]:
    """All pairs of two sources and one image, in a random order, by prompt."""
    of_prompt: dict[str, list[Content]] = {}
    for content in contents:
        of_prompt.setdefault(prompt_of(content.record, content.name), []).append(content)
    candidates = {}
    for prompt in sorted(of_prompt):
        group = sorted(of_prompt[prompt], key=lambda content: content.key)
        pairs = [
            (a, b)
            for a, b in combinations(group, 2)
            if _source(a) != _source(b) and images.get(a.key) == images.get(b.key)
        ]
        rng.shuffle(pairs)
        candidates[prompt] = pairs
    if not any(candidates.values()):
        raise VideoAlignError("no prompt has videos of two different sources, so there is nothing to compare")
    return candidates


def _source(content: Content) -> str:
    """The model that made a video; without it nobody knows whether two videos have different sources."""
    source = content.record.get("source")
    if not isinstance(source, str) or not source:
        raise VideoAlignError(f"{content.name}: the record names no source, which pairs to rate must differ in")
    return source


def _sources(a: Content, b: Content, split: str) -> tuple[str, ...]:
    """The split and the two sources of a pair, whichever of them is A."""
    return (split, *sorted((_source(a), _source(b))))
