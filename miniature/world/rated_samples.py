"""Simulated annotators rate a miniature generator's own samples.

They perceive the qualities that the oracle reads from the pixels, with an annotator's noise (:mod:`.annotators`).
Only their ratings are written for training: no training sees the oracle's numbers.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations, cycle
from pathlib import Path

import numpy as np
from torch import Tensor

from ... import VideoAlignError
from ...datamodules.benchmark import PAIRS
from ...datamodules.contents import Content
from ...datamodules.encode_list import clips_of
from ...datamodules.ratings import COLUMNS
from ...datamodules.sample_images import image_of
from ...datamodules.shards import ShardSet, ShardWriter
from ...models.dimensions import DIMENSIONS
from .annotators import annotate
from .oracle import Oracle
from .rendered_sets import labelled
from .sprites import BY_PROMPT, FPS, FRAMES


def qualities(contents: Sequence[Content], oracle: Oracle) -> Tensor:
    """The oracle's qualities (N, 3) of VQ, MQ and TA.

    Args:
        contents: Samples of a *videos* set.
        oracle: Oracle that is calibrated for the set's generator.
    """
    return oracle(clips_of(contents), [content.record["prompt"] for content in contents])


def held_out_prompts(prompts: Iterable[str], count: int, seed: int) -> set[str]:
    """Prompts that are kept for validation, unlike each other; every attribute goes on to occur in training.

    Args:
        prompts: Prompts of the miniature world, with or without repetitions.
        count: Number of prompts to keep.
        seed: Seed of the choice.

    Raises:
        VideoAlignError: Where no such choice leaves every colour, shape and direction in training.
    """
    every = sorted(set(prompts))
    order = [every[i] for i in np.random.default_rng([seed, 62]).permutation(len(every))]
    kept: list[str] = []
    for _ in range(count):
        taken = Counter(value for prompt in kept for value in _attributes(prompt))
        left = [prompt for prompt in order if prompt not in kept]
        trained = Counter(value for prompt in left for value in _attributes(prompt))
        able = [prompt for prompt in left if all(trained[value] > 1 for value in _attributes(prompt))]
        if not able:
            raise VideoAlignError(
                f"{count} of {len(every)} prompts cannot be held out: some colour, shape or direction would no longer "
                "be trained on; sample more prompts, or hold out fewer"
            )
        kept.append(min(able, key=lambda prompt: sum(taken[value] for value in _attributes(prompt))))
    return set(kept)


def _attributes(prompt: str) -> tuple[str, str, str]:
    scene = BY_PROMPT[prompt]
    return scene.colour, scene.shape, scene.direction


def _pairs(
    contents: Sequence[Content], count: int, rng: np.random.Generator, again: bool = False
) -> Iterator[tuple[int, int]]:
    """Up to ``count`` pairs of samples of one prompt and image; each has its turn, sides are drawn.

    Where prompts have fewer different pairs, there are fewer pairs, or with ``again`` they have another turn.
    """
    of_prompt: dict[tuple[str, str], list[int]] = {}
    for number, content in enumerate(contents):
        of_prompt.setdefault((content.record["prompt"], content.image_id), []).append(number)
    shares = [list(combinations(group, 2)) for group in of_prompt.values()]
    shares = [[share[i] for i in rng.permutation(len(share))] for share in shares]
    if not any(shares):
        raise VideoAlignError("no prompt has two samples, so there is no pair to rate")
    rounds = [share[turn] for turn in range(max(map(len, shares))) for share in shares if turn < len(share)]
    for (a, b), _ in zip(cycle(rounds) if again else rounds, range(count)):
        yield (a, b) if rng.random() < 0.5 else (b, a)


def rate_pairs(
    samples: ShardSet,
    oracle: Oracle,
    out: str | Path,
    count: int,
    held_out: int = 0,
    more: ShardSet | None = None,
    more_count: int = 0,
    seed: int = 0,
    of_prompt: int | None = None,
) -> None:
    """Write rated *pairs* of generated samples, shuffled with pairs of another set.

    Validation holds out prompts with all of their samples: a model that knows a clip by heart would pass any validation
    on other pairs of the same clips.

    Args:
        samples: Set of kind *videos* that a generator sampled.
        oracle: Oracle that reads what the annotators perceive.
        out: Folder to write; with ``held_out`` two folders, ``OUT/train`` and ``OUT/val``.
        count: Number of pairs to rate. Training and validation have as large a share of them as of the prompts.
        held_out: Number of prompts that are kept for validation, see :func:`held_out_prompts`. Prompts are so few that
            they are chosen to be unlike each other, not by :mod:`~videoalign.datamodules.splitting`.
        more: Set of kind *pairs* that is shuffled in for training; its pairs of held-out prompts are left out.
        more_count: Number of its pairs that are used.
        seed: Seed of the held-out prompts, of pairs, ratings and order.
        of_prompt: Use only so many samples of each prompt, and rate their pairs again until there are ``count``
            ratings; all samples if not given, each pair at most once.
    """
    rng = np.random.default_rng([seed, 60])
    contents = list(samples.contents())
    if of_prompt is not None:
        contents = _first(contents, of_prompt)
    prompts = {content.record["prompt"] for content in contents}
    kept = held_out_prompts(prompts, held_out, seed) if held_out else set()
    rated_val = max(1, round(count * len(kept) / len(prompts))) if kept else 0
    entries: dict[str, list[_Entry]] = {"train": [], "val": []}
    for name, number in (("train", count - rated_val), ("val", rated_val)):
        if number:
            own = [content for content in contents if (content.record["prompt"] in kept) == (name == "val")]
            entries[name] = _rated(own, oracle, number, rng, of_prompt is not None)
    spare = (content for content in (more.contents() if more else ()) if content.record["prompt"] not in kept)
    for content, _ in zip(spare, range(more_count)):
        media = {side: (content, f"{side}.mp4") for side in "ab"}
        entries["train"].append((f"r{content.key}", media, content.record))
    entries["train"] = [entries["train"][i] for i in rng.permutation(len(entries["train"]))]
    for name, chosen in entries.items() if kept else (("", entries["train"]),):
        with ShardWriter(Path(out) / name, "pairs", per_shard=500) as writer:
            for key, media, record in chosen:
                videos = {side: content.read(member) for side, (content, member) in media.items()}
                writer.write(key, videos, record, image_of(media["a"][0]))


def _first(contents: Sequence[Content], count: int) -> list[Content]:
    """The first samples of each prompt and image."""
    seen: Counter[tuple[str, str]] = Counter()
    found = []
    for content in contents:
        place = content.record["prompt"], content.image_id
        seen[place] += 1
        found += [content] if seen[place] <= count else []
    return found


_Entry = tuple[str, dict[str, tuple[Content, str]], dict]
"""A pair to write: its key, where its videos are, and its record."""


def _rated(
    contents: Sequence[Content], oracle: Oracle, count: int, rng: np.random.Generator, again: bool
) -> list[_Entry]:
    """Pairs that annotators rate."""
    quality, entries = qualities(contents, oracle), []
    for number, (a, b) in enumerate(_pairs(contents, count, rng, again)):
        rating = annotate(quality[a].numpy(), quality[b].numpy(), rng)
        record = {
            "prompt": contents[a].record["prompt"],
            "labels": labelled(rating, COLUMNS),
            "votes": rating["votes"],
            "scores": {side: dict(zip(DIMENSIONS, row)) for side, row in zip("AB", rating["scores"])},
            "sources": {"A": "generator", "B": "generator"},
            "fps": {"A": FPS, "B": FPS},
            "num_frames": {"A": FRAMES, "B": FRAMES},
        }
        entries.append((f"g{number:06d}", {"a": (contents[a], "mp4"), "b": (contents[b], "mp4")}, record))
    return entries


def rate_benchmark(samples: ShardSet, oracle: Oracle, out: str | Path, count: int, seed: int = 0) -> None:
    """Write a benchmark of generated samples: every video once, the quality that the oracle reads, and rated pairs.

    Args:
        samples: Set of kind *videos* that a generator sampled.
        oracle: Oracle that reads the qualities.
        out: Folder to write.
        count: Number of pairs to rate.
        seed: Seed of pairs and ratings.
    """
    rng = np.random.default_rng([seed, 61])
    contents = list(samples.contents())
    quality, rows = qualities(contents, oracle), []
    for a, b in _pairs(contents, count, rng):
        rating = annotate(quality[a].numpy(), quality[b].numpy(), rng)
        rows.append(
            {
                "key_A": contents[a].key,
                "key_B": contents[b].key,
                "prompt": contents[a].record["prompt"],
                "A_model": "generator",
                "B_model": "generator",
                **labelled(rating, COLUMNS),
            }
        )
    with ShardWriter(out, "videos", per_shard=500) as writer:
        for content, row in zip(contents, quality.tolist()):
            record = {**content.record, "quality": [round(q, 4) for q in row]}
            writer.write(content.key, {"": content.read("mp4")}, record, image_of(content))
        writer.write_table(PAIRS, rows)
