"""Writes the miniature world as shards: rated pairs, two benchmarks and captioned clips, all from one seed.

    OUT/train  OUT/val         pairs, all sources mixed
    OUT/recent  OUT/older      benchmarks of the newer and the older sources: each video once, and pairs.csv
    OUT/captions               clips that show what their text says, for the pre-training of miniature backbones
    OUT/clips                  good and flawed clips, for the pre-training of a miniature generator
    OUT/prompts.txt, OUT/unseen.txt   what the generator is trained on, and what it is judged by

No prompt of one split occurs in another, captions excepted: they stand in for the general knowledge that a
pre-trained video-language model brings along. The generator's world is smaller: four colours and two shapes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from ... import VideoAlignError
from ...datamodules.benchmark import PAIRS, Benchmark
from ...datamodules.parallel import in_order
from ...datamodules.ratings import COLUMNS
from ...datamodules.shards import ShardWriter
from ...datamodules.video import encode
from ...models.dimensions import DIMENSIONS
from ...models.files import new_folder
from ...models.metrics import PreferenceAccuracy
from . import sprites
from .annotators import annotate
from .sprites import CONTENTS, FPS, FRAMES, SOURCES, Content, Flaws, Source


@dataclass(frozen=True, kw_only=True)
class WorldSize:
    """How much of the world is written."""

    train: int = 6000
    """Rated pairs for training."""
    val: int = 400
    """Rated pairs held out."""
    benchmark_videos: int = 480
    """Videos per benchmark."""
    benchmark_pairs: int = 1500
    """Rated pairs per benchmark."""
    captions: int = 3000
    """Captioned clips."""
    clips: int = 4000
    """Clips that a generator is trained on."""


def split_prompts(seed: int) -> dict[str, list[Content]]:
    """Disjoint contents per split: 12 for each benchmark, 8 held out, 64 for training.

    The benchmarks' 24 are a Latin square over colour, direction and shape, so that every one of these occurs in
    training in many other combinations.
    """
    rng = np.random.default_rng([seed, 1])
    order = rng.permutation(len(sprites.COLOURS))
    colours, shapes, directions = list(sprites.COLOURS), list(sprites.SHAPES), list(sprites.DIRECTIONS)
    unseen, seen = [], []
    for content in CONTENTS:
        cell = order[colours.index(content.colour)] + directions.index(content.direction) + shapes.index(content.shape)
        (seen if cell % 4 else unseen).append(content)
    unseen, seen = ([contents[i] for i in rng.permutation(len(contents))] for contents in (unseen, seen))
    return {"recent": unseen[::2], "older": unseen[1::2], "val": seen[:8], "train": seen[8:]}


GENERATED = [c for c in CONTENTS if c.colour in ("red", "green", "blue", "yellow") and c.shape in ("bar", "pole")]
"""What the miniature generator learns: it is too small for all of the world."""


@lru_cache
def generator_prompts(seed: int) -> tuple[list[Content], list[Content]]:
    """What the generator is trained on (24), and what it is judged by (8): combinations of the benchmarks' prompts, which
    neither it nor a reward model was trained on, every part of which occurs in others."""
    splits = split_prompts(seed)
    unseen = {content.prompt for content in splits["recent"] + splits["older"]}
    return [c for c in GENERATED if c.prompt not in unseen], [c for c in GENERATED if c.prompt in unseen]


def _video(content: Content, source: Source, rng: np.random.Generator) -> tuple[bytes, np.ndarray]:
    """An mp4 of a source's attempt at the content, and its true quality."""
    flaws = source.sample(rng)
    return encode(sprites.render(sprites.shown(content, flaws.wrong, rng), flaws, rng), FPS), flaws.quality


def labelled(rating: dict, columns: Iterable[str]) -> dict:
    """Labels of a rating by column."""
    return {column: rating["labels"][COLUMNS.index(column)] for column in columns}


def _pair(job: tuple[list[int], Content]) -> tuple[str, dict[str, bytes], dict]:
    """One rated pair: two different sources at the same prompt."""
    seed, content = job
    rng = np.random.default_rng(seed)
    a, b = (SOURCES[i] for i in rng.choice(len(SOURCES), 2, replace=False))
    (video_a, quality_a), (video_b, quality_b) = _video(content, a, rng), _video(content, b, rng)
    rating = annotate(quality_a, quality_b, rng)
    record = {
        "prompt": content.prompt,
        "labels": labelled(rating, COLUMNS),
        "votes": rating["votes"],
        "scores": {side: dict(zip(DIMENSIONS, row)) for side, row in zip("AB", rating["scores"])},
        "sources": {"A": a.name, "B": b.name},
        "quality": {"A": quality_a.round(4).tolist(), "B": quality_b.round(4).tolist()},
        "fps": {"A": FPS, "B": FPS},
        "num_frames": {"A": FRAMES, "B": FRAMES},
    }
    return f"{seed[-1]:06d}", {"a": video_a, "b": video_b}, record


def _single(job: tuple[list[int], Content, Source]) -> tuple[str, dict[str, bytes], dict]:
    """One video of a benchmark."""
    seed, content, source = job
    video, quality = _video(content, source, np.random.default_rng(seed))
    record = {
        "prompt": content.prompt,
        "source": source.name,
        "fps": FPS,
        "num_frames": FRAMES,
        "quality": quality.round(4).tolist(),
    }
    return f"{seed[-1]:06d}", {"": video}, record


def _caption(job: tuple[list[int], Content]) -> tuple[str, dict[str, bytes], dict]:
    """One clip of any source's look, with words that are true of it, and three that are wrong in one attribute."""
    seed, content = job
    rng = np.random.default_rng(seed)
    flaws = SOURCES[rng.integers(len(SOURCES))].sample(rng)
    video = encode(sprites.render(content, flaws, rng), FPS)
    wrong = [sprites.shown(content, tuple(row), rng).prompt for row in np.eye(3, dtype=bool)]
    record = {"prompt": content.prompt, "negatives": wrong, "fps": FPS, "num_frames": FRAMES}
    return f"{seed[-1]:06d}", {"": video}, record


def _attempt(content: Content, taught: Sequence[Content], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Frames of one clip of the generator's training, an average of sources in what a small autoencoder can keep; its quality."""
    fade, freeze = rng.random(2) < (0.5, 0.4)
    strength = rng.uniform(0.3, 1.0, 2)
    jump = not freeze and rng.random() < 0.25
    # what is shown is never a held-out content, under no words
    shown = []
    while not shown:
        wrong = tuple(bool(w) for w in rng.random(3) < 0.2)
        shown = [c for c in taught if _differences(c, content) == wrong]
    seen = shown[rng.integers(len(shown))]
    flaws = Flaws(fade=strength[0] * fade, freeze=strength[1] * freeze, jump=strength[1] * jump, wrong=wrong)
    return sprites.render(seen, flaws, rng, spread=1.0), flaws.quality


def _clip(job: tuple[list[int], Content]) -> tuple[str, dict[str, bytes], dict]:
    """One clip of the generator's training."""
    seed, content = job
    video, quality = _attempt(content, generator_prompts(seed[0])[0], np.random.default_rng(seed))
    record = {"prompt": content.prompt, "fps": FPS, "num_frames": FRAMES, "quality": quality.round(4).tolist()}
    return f"{seed[-1]:06d}", {"": encode(video, FPS)}, record


def held_out_clips(count: int, seed: int = 0) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Clips like those of the generator's training, but none of them: uint8 (N, T, H, W, 3), prompts, (N, 3) true qualities."""
    rng, taught = np.random.default_rng([seed, 51]), generator_prompts(seed)[0]
    asked = [taught[i % len(taught)] for i in range(count)]
    videos, qualities = zip(*(_attempt(content, taught, rng) for content in asked))
    return np.stack(videos), [content.prompt for content in asked], np.stack(qualities)


def _differences(a: Content, b: Content) -> tuple[bool, bool, bool]:
    """Whether colour, shape and direction differ."""
    return a.colour != b.colour, a.shape != b.shape, a.direction != b.direction


def _benchmark_pairs(videos: list[tuple[str, dict]], count: int, rng: np.random.Generator) -> list[dict]:
    """Rated pairs of different sources at the same prompt, each at most once."""
    candidates = [
        (a, b)
        for a, b in combinations(videos, 2)
        if a[1]["prompt"] == b[1]["prompt"] and a[1]["source"] != b[1]["source"]
    ]
    if not candidates or count < 1:
        raise VideoAlignError(
            f"{len(videos)} benchmark videos and {count} pairs make no benchmark: there must be videos of different sources "
            "at the same prompt, and at least one pair of them"
        )
    rows = []
    for i in sorted(rng.permutation(len(candidates))[:count]):
        (key_a, a), (key_b, b) = candidates[i] if rng.random() < 0.5 else candidates[i][::-1]
        rating = annotate(np.array(a["quality"]), np.array(b["quality"]), rng)
        rows.append(
            {
                "key_A": key_a,
                "key_B": key_b,
                "prompt": a["prompt"],
                "A_model": a["source"],
                "B_model": b["source"],
                **labelled(rating, COLUMNS),
            }
        )
    return rows


def write_world(
    out: str | Path, size: WorldSize, seed: int = 0, pool: Executor | None = None
) -> Iterator[tuple[str, int, int]]:
    """Write all sets; yields (set, samples done, samples in all) as it goes.

    Args:
        out: folder to make. size: numbers of samples. seed: of everything. pool: processes that render.
    """
    splits = split_prompts(seed)
    with new_folder(out) as folder:
        jobs: dict[str, tuple[Callable, list]] = {}
        for number, (name, count) in enumerate((("train", size.train), ("val", size.val))):
            jobs[name] = _pair, [([seed, 10 + number, i], splits[name][i % len(splits[name])]) for i in range(count)]
        for number, name in enumerate(("recent", "older")):
            sources = [s for s in SOURCES if s.recent == (name == "recent")]
            jobs[name] = (
                _single,
                [
                    (
                        [seed, 20 + number, i],
                        splits[name][i // len(sources) % len(splits[name])],
                        sources[i % len(sources)],
                    )
                    for i in range(size.benchmark_videos)
                ],
            )
        jobs["captions"] = _caption, [([seed, 30, i], CONTENTS[i % len(CONTENTS)]) for i in range(size.captions)]
        taught, unseen = generator_prompts(seed)
        jobs["clips"] = _clip, [([seed, 50, i], taught[i % len(taught)]) for i in range(size.clips)]
        for name, contents in (("prompts", taught), ("unseen", unseen)):
            (folder / f"{name}.txt").write_text("".join(f"{content.prompt}\n" for content in contents))
        for number, (name, (function, work)) in enumerate(jobs.items()):
            with ShardWriter(folder / name, "pairs" if function is _pair else "videos", per_shard=500) as writer:
                written = []
                for done, (key, videos, record) in enumerate(in_order(pool, function, work), 1):
                    writer.write(key, videos, record)
                    written.append((key, record))
                    yield name, done, len(work)
                if function is _single:
                    rows = _benchmark_pairs(written, size.benchmark_pairs, np.random.default_rng([seed, 40 + number]))
                    writer.write_table(PAIRS, rows)


def ceiling(benchmark: Benchmark) -> dict[str, dict]:
    """Accuracies of a judge that knows the true qualities: what the annotators' disagreement leaves to be reached."""
    quality = {raw.key: raw.record()["quality"] for raw in benchmark.shards}
    true = torch.tensor([quality[key] for key in benchmark.keys])  # (videos, 3)
    metric = PreferenceAccuracy(resamples=0, sync_on_compute=False)
    metric.update(true[benchmark.ends[:, 0]] - true[benchmark.ends[:, 1]], benchmark.labels)
    return metric.compute()
