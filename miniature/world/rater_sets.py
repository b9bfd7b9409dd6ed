"""Rendered pairs rated anew, by raters whose levels and spreads have a given size.

Whatever the bias, the same raters are asked about the same pairs, perceive and vote the same, and draw the same noise:
sets of several biases have equal labels, and differ in scores alone.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...datamodules.ratings import COLUMNS
from ...datamodules.shards import ShardSet, ShardWriter
from ...models.dimensions import DIMENSIONS
from ...models.files import new_folder
from .annotators import POOL, Rater, annotate, difficulties, rater_pool
from .rendered_sets import labelled

ASKED = 4
"""Raters of a pool who are asked about a pair: three who vote and score, and one who decides."""
PAIRS_OF_A_RATER = 60
"""Pairs that a rater scores at least; a small set has a smaller pool."""


def pool_size(pairs: int) -> int:
    """Raters of a pool: :data:`.annotators.POOL`, or fewer where pairs are few.

    Args:
        pairs: Number of pairs that they score.
    """
    return max(ASKED, min(POOL, (ASKED - 1) * pairs // PAIRS_OF_A_RATER))


def rate_anew(
    train: ShardSet, val: ShardSet, out: str | Path, bias: float, pairs: int, held_out: int, seed: int
) -> None:
    """Write ``OUT/train`` and ``OUT/val``: pairs of two rendered sets with the ratings of one pool of raters.

    Media are copied as they are, so that decoded frames need not be decoded again.

    Args:
        train: Rendered pairs, with mp4 files or decoded frames.
        val: Rendered pairs of other prompts.
        out: Folder to write.
        bias: Standard deviation of the raters' levels, in points, see :func:`.annotators.rater_pool`.
        pairs: Number of training pairs that are used, the first ones.
        held_out: Number of held-out pairs that are used, the first ones.
        seed: Seed of raters, prompts and ratings.
    """
    chosen = {"train": (train, pairs), "val": (val, held_out)}
    contents = {name: [c for c, _ in zip(shards.contents(), range(count))] for name, (shards, count) in chosen.items()}
    raters = rater_pool(bias, np.random.default_rng([seed, 80]), pool_size(len(contents["train"])))
    prompts = [content.record["prompt"] for name in chosen for content in contents[name]]
    hard, rng = difficulties(prompts, np.random.default_rng([seed, 81])), np.random.default_rng([seed, 82])
    with new_folder(out) as folder:
        for name, (shards, _) in chosen.items():
            media = shards.index.media
            with ShardWriter(folder / name, "pairs", media, shards.index.frames, per_shard=500) as writer:
                for content in contents[name]:
                    asked = [raters[i] for i in rng.choice(len(raters), ASKED, replace=False)]
                    record = _rated(content.record, asked, hard[content.record["prompt"]], rng)
                    writer.write(content.key, {side: content.read(f"{side}.{media}") for side in "ab"}, record)


def _rated(record: dict, asked: Sequence[Rater], difficulty: float, rng: np.random.Generator) -> dict:
    """A record with new ratings of its true qualities."""
    qualities = (np.array(record["quality"][side]) for side in "AB")
    rating = annotate(*qualities, rng, asked, difficulty)
    return {
        **record,
        "labels": labelled(rating, COLUMNS),
        "votes": rating["votes"],
        "scores": {side: dict(zip(DIMENSIONS, row)) for side, row in zip("AB", rating["scores"])},
    }
