"""Simulated annotators rate a miniature generator's own samples.

They perceive the qualities that the oracle reads from the pixels, with an annotator's noise (:mod:`.annotators`).
Only their ratings are written for training: no training sees the oracle's numbers.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations
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
from .sprites import FPS, FRAMES


def judged(shards: ShardSet, oracle: Oracle) -> tuple[list[Content], Tensor]:
    """Samples of a *videos* set, and the oracle's qualities (N, 3) of VQ, MQ and TA.

    Args:
        shards: The set.
        oracle: Oracle that is calibrated for the set's generator.
    """
    contents = list(shards.contents())
    return contents, oracle(clips_of(contents), [content.record["prompt"] for content in contents])


def _pairs(contents: Sequence[Content], count: int, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    """Up to ``count`` different pairs of samples of one prompt and image; each has its turn, sides are drawn."""
    of_prompt: dict[tuple[str, str], list[int]] = {}
    for number, content in enumerate(contents):
        of_prompt.setdefault((content.record["prompt"], content.image_id), []).append(number)
    shares = [list(combinations(group, 2)) for group in of_prompt.values()]
    shares = [[share[i] for i in rng.permutation(len(share))] for share in shares]
    if not any(shares):
        raise VideoAlignError("no prompt has two samples, so there is no pair to rate")
    rounds = (share[turn] for turn in range(max(map(len, shares))) for share in shares if turn < len(share))
    for (a, b), _ in zip(rounds, range(count)):
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
) -> None:
    """Write rated *pairs* of generated samples, shuffled with pairs of another set.

    Args:
        samples: Set of kind *videos* that a generator sampled.
        oracle: Oracle that reads what the annotators perceive.
        out: Folder to write; with ``held_out`` two folders, ``OUT/train`` and ``OUT/val``.
        count: Number of pairs to rate.
        held_out: Number of these pairs that are kept for validation.
        more: Set of kind *pairs* that is shuffled in for training.
        more_count: Number of its pairs that are used.
        seed: Seed of pairs, ratings and order.
    """
    rng = np.random.default_rng([seed, 60])
    contents, quality = judged(samples, oracle)
    entries = []
    for number, (a, b) in enumerate(_pairs(contents, count, rng)):
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
    kept, rest = entries[: len(entries) - held_out], entries[len(entries) - held_out :]
    for content, _ in zip(more.contents() if more else (), range(more_count)):
        kept.append((f"r{content.key}", {side: (content, f"{side}.mp4") for side in "ab"}, content.record))
    kept = [kept[i] for i in rng.permutation(len(kept))]
    for name, chosen in (("train", kept), ("val", rest)) if held_out else (("", kept),):
        with ShardWriter(Path(out) / name, "pairs", per_shard=500) as writer:
            for key, media, record in chosen:
                videos = {side: content.read(member) for side, (content, member) in media.items()}
                writer.write(key, videos, record, image_of(media["a"][0]))


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
    contents, quality = judged(samples, oracle)
    rows = []
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
