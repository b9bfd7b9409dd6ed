"""Which videos are rated against each other: of different sources, at the same prompt, in balance."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from .. import VideoAlignError
from ..datamodules.ratings import prompt_of
from ..datamodules.shards import Content

SPLITS = ("train", "validation", "benchmark")


@dataclass(frozen=True)
class Pair:
    """Two videos of one prompt.

    Attributes:
        keys, sources: of A and B. split: one of :data:`SPLITS`, the same for all pairs of a prompt.
    """

    prompt: str
    keys: tuple[str, str]
    sources: tuple[str, str]
    split: str


def split_prompts(prompts: Sequence[str], shares: Sequence[float], seed: int) -> dict[str, str]:
    """The split of each prompt; no prompt is in two.

    Args:
        prompts: each once. shares: of validation and benchmark; the rest is for training. A share above 0 gets at least one
            prompt. seed: of the draw.
    """
    validation, benchmark = shares
    if min(shares) < 0 or sum(shares) >= 1:
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
    contents: Sequence[Content], per_prompt: int, shares: Sequence[float] = (0.0, 0.0), seed: int = 0
) -> list[Pair]:
    """Pairs to rate of a *videos* set, in a random order; the same for the same seed.

    Prompts are split first. Within a prompt, pairs of sources that were met least often so far in its split come first, then videos
    that were used least: so all pairs of sources, and all videos, are rated about equally often, in each split. No two videos meet twice.

    Args:
        contents: of the set; records name ``prompt`` and ``source``. per_prompt: pairs of each prompt, fewer where it has too few
            videos. shares, seed: see :func:`split_prompts`.

    Raises:
        VideoAlignError: where no prompt has videos of two sources.
    """
    if per_prompt < 1:
        raise VideoAlignError(f"pairs per prompt must be at least 1, got {per_prompt}")
    of_prompt: dict[str, list[Content]] = {}
    for content in contents:
        of_prompt.setdefault(prompt_of(content.record, content.name), []).append(content)
    rng = random.Random(f"{seed} pairs")
    met, used = Counter(), Counter()
    chosen: list[tuple[str, Content, Content]] = []
    # from round to round, so that few pairs of every prompt are better balanced than all of one prompt after the other
    candidates = {}
    for prompt in sorted(of_prompt):
        group = sorted(of_prompt[prompt], key=lambda content: content.key)
        pairs = [(a, b) for a, b in combinations(group, 2) if _source(a) != _source(b)]
        rng.shuffle(pairs)
        candidates[prompt] = pairs
    if not any(candidates.values()):
        raise VideoAlignError("no prompt has videos of two different sources, so there is nothing to compare")
    splits = split_prompts([prompt for prompt, pairs in candidates.items() if pairs], shares, seed)
    for _ in range(per_prompt):
        order = [prompt for prompt, pairs in candidates.items() if pairs]
        rng.shuffle(order)
        for prompt in order:
            a, b = min(
                candidates[prompt], key=lambda p: (met[_sources(*p, splits[prompt])], used[p[0].key] + used[p[1].key])
            )
            candidates[prompt].remove((a, b))
            met[_sources(a, b, splits[prompt])] += 1
            used.update((a.key, b.key))
            chosen.append((prompt, *((a, b) if rng.random() < 0.5 else (b, a))))
    rng.shuffle(chosen)
    return [Pair(prompt, (a.key, b.key), (_source(a), _source(b)), splits[prompt]) for prompt, a, b in chosen]


def _source(content: Content) -> str:
    """What made a video; without it nobody knows whether two are of different sources."""
    source = content.record.get("source")
    if not isinstance(source, str) or not source:
        raise VideoAlignError(f"{content.name}: the record names no source, which pairs to rate must differ in")
    return source


def _sources(a: Content, b: Content, split: str) -> tuple[str, ...]:
    return (split, *sorted((_source(a), _source(b))))
