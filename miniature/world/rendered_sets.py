"""Writes the miniature world as shards: rated pairs, two benchmarks and captioned clips, all from one seed.

    OUT/train  OUT/val         pairs, all sources mixed
    OUT/recent  OUT/older      benchmarks of the newer and the older sources: each video once, and pairs.csv
    OUT/captions               clips that show what their text says, for the pre-training of miniature backbones
    OUT/clips                  good and flawed clips, for the pre-training of a miniature generator
    OUT/prompts.txt            prompts that the generator is trained on
    OUT/unseen.txt             prompts that it is judged by

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
from .sprites import FPS, FRAMES, SCENES, SOURCES, Flaws, Scene, Source


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


def split_prompts(seed: int) -> dict[str, list[Scene]]:
    """Disjoint scenes per split: 12 for each benchmark, 8 held out, 64 for training.

    The benchmarks' 24 are a Latin square over colour, direction and shape, so that each of these occurs in training in
    many other combinations.
    """
    rng = np.random.default_rng([seed, 1])
    order = rng.permutation(len(sprites.COLOURS))
    colours, shapes, directions = list(sprites.COLOURS), list(sprites.SHAPES), list(sprites.DIRECTIONS)
    unseen, seen = [], []
    for scene in SCENES:
        cell = order[colours.index(scene.colour)] + directions.index(scene.direction) + shapes.index(scene.shape)
        (seen if cell % 4 else unseen).append(scene)
    unseen, seen = ([scenes[i] for i in rng.permutation(len(scenes))] for scenes in (unseen, seen))
    return {"recent": unseen[::2], "older": unseen[1::2], "val": seen[:8], "train": seen[8:]}


GENERATED = [c for c in SCENES if c.colour in ("red", "green", "blue", "yellow") and c.shape in ("bar", "pole")]
"""Scenes that the miniature generator learns: it is too small for all of the world."""


@lru_cache
def generator_prompts(seed: int) -> tuple[list[Scene], list[Scene]]:
    """The 24 scenes that the generator is trained on, and the 8 that it is judged by.

    The 8 are scenes of the benchmarks: neither the generator nor a reward model was trained on them, but each of their
    colours, shapes and directions occurs in training.
    """
    splits = split_prompts(seed)
    unseen = {scene.prompt for scene in splits["recent"] + splits["older"]}
    return [c for c in GENERATED if c.prompt not in unseen], [c for c in GENERATED if c.prompt in unseen]


def _video(scene: Scene, source: Source, rng: np.random.Generator) -> tuple[bytes, np.ndarray]:
    """Renders a source's attempt at a scene: an mp4 and its true quality."""
    flaws = source.sample(rng)
    return encode(sprites.render(sprites.shown(scene, flaws.wrong, rng), flaws, rng), FPS), flaws.quality


def labelled(rating: dict, columns: Iterable[str]) -> dict:
    """Labels of a rating by column, in the words that are stored.

    Args:
        rating: Result of :func:`~.annotators.annotate`.
        columns: Columns to keep, some of VQ, MQ, TA and Overall.
    """
    return {column: rating["labels"][COLUMNS.index(column)] for column in columns}


def _pair(job: tuple[list[int], Scene]) -> tuple[str, dict[str, bytes], dict]:
    """Renders and rates a pair of two different sources at the same prompt."""
    seed, scene = job
    rng = np.random.default_rng(seed)
    a, b = (SOURCES[i] for i in rng.choice(len(SOURCES), 2, replace=False))
    (video_a, quality_a), (video_b, quality_b) = _video(scene, a, rng), _video(scene, b, rng)
    rating = annotate(quality_a, quality_b, rng)
    record = {
        "prompt": scene.prompt,
        "labels": labelled(rating, COLUMNS),
        "votes": rating["votes"],
        "scores": {side: dict(zip(DIMENSIONS, row)) for side, row in zip("AB", rating["scores"])},
        "sources": {"A": a.name, "B": b.name},
        "quality": {"A": quality_a.round(4).tolist(), "B": quality_b.round(4).tolist()},
        "fps": {"A": FPS, "B": FPS},
        "num_frames": {"A": FRAMES, "B": FRAMES},
    }
    return f"{seed[-1]:06d}", {"a": video_a, "b": video_b}, record


def _single(job: tuple[list[int], Scene, Source]) -> tuple[str, dict[str, bytes], dict]:
    """Renders one video of a benchmark."""
    seed, scene, source = job
    video, quality = _video(scene, source, np.random.default_rng(seed))
    record = {
        "prompt": scene.prompt,
        "source": source.name,
        "fps": FPS,
        "num_frames": FRAMES,
        "quality": quality.round(4).tolist(),
    }
    return f"{seed[-1]:06d}", {"": video}, record


def _caption(job: tuple[list[int], Scene]) -> tuple[str, dict[str, bytes], dict]:
    """Renders one clip with any source's flaws, and says what it shows: words, wrong words, and where the sprite is."""
    seed, scene = job
    rng = np.random.default_rng(seed)
    flaws = SOURCES[rng.integers(len(SOURCES))].sample(rng)
    frames, track = sprites.tracked(scene, flaws, rng)
    wrong = [sprites.shown(scene, tuple(row), rng) for row in np.eye(3, dtype=bool)]
    record = {
        "prompt": scene.prompt,
        "negatives": [other.prompt for other in wrong],
        "details": [[own, other.details[i]] for i, (own, other) in enumerate(zip(scene.details, wrong))],
        "track": track.round(1).tolist(),
        "fps": FPS,
        "num_frames": FRAMES,
    }
    return f"{seed[-1]:06d}", {"": encode(frames, FPS)}, record


def _attempt(scene: Scene, taught: Sequence[Scene], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Renders one clip of the generator's training, and says its true quality.

    Its flaws are those that a small autoencoder keeps, about as strong as an average source's.
    """
    fade, freeze = rng.random(2) < (0.5, 0.4)
    strength = rng.uniform(0.3, 1.0, 2)
    jump = not freeze and rng.random() < 0.25
    # a held-out scene is never shown, whatever the prompt says
    shown = []
    while not shown:
        wrong = tuple(bool(w) for w in rng.random(3) < 0.2)
        shown = [c for c in taught if _differences(c, scene) == wrong]
    seen = shown[rng.integers(len(shown))]
    flaws = Flaws(fade=strength[0] * fade, freeze=strength[1] * freeze, jump=strength[1] * jump, wrong=wrong)
    return sprites.render(seen, flaws, rng, spread=1.0), flaws.quality


def _clip(job: tuple[list[int], Scene]) -> tuple[str, dict[str, bytes], dict]:
    """Encodes one clip of the generator's training."""
    seed, scene = job
    video, quality = _attempt(scene, generator_prompts(seed[0])[0], np.random.default_rng(seed))
    record = {"prompt": scene.prompt, "fps": FPS, "num_frames": FRAMES, "quality": quality.round(4).tolist()}
    return f"{seed[-1]:06d}", {"": encode(video, FPS)}, record


def held_out_clips(count: int, seed: int = 0) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Clips like those of the generator's training, but none of them.

    Args:
        count: Number of clips, N.
        seed: Seed of the world; clips differ from its training clips.

    Returns:
        uint8 clips (N, T, H, W, 3), their prompts, and their true qualities (N, 3).
    """
    rng, taught = np.random.default_rng([seed, 51]), generator_prompts(seed)[0]
    asked = [taught[i % len(taught)] for i in range(count)]
    videos, qualities = zip(*(_attempt(scene, taught, rng) for scene in asked))
    return np.stack(videos), [scene.prompt for scene in asked], np.stack(qualities)


def _differences(a: Scene, b: Scene) -> tuple[bool, bool, bool]:
    """Which of colour, shape and direction differ."""
    return a.colour != b.colour, a.shape != b.shape, a.direction != b.direction


def _benchmark_pairs(videos: list[tuple[str, dict]], count: int, rng: np.random.Generator) -> list[dict]:
    """Rates pairs of different sources at the same prompt, each at most once."""
    candidates = [
        (a, b)
        for a, b in combinations(videos, 2)
        if a[1]["prompt"] == b[1]["prompt"] and a[1]["source"] != b[1]["source"]
    ]
    if not candidates or count < 1:
        raise VideoAlignError(
            f"{len(videos)} benchmark videos and {count} pairs make no benchmark: there must be videos of different "
            "sources at the same prompt, and at least one pair of them"
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


Job = tuple[Callable, list]
"""A function that renders one sample, and its arguments, one per sample."""


def _jobs(size: WorldSize, seed: int) -> dict[str, Job]:
    """What is rendered for each set. Every sample has a seed of its own, so that it depends on no other."""
    splits, taught = split_prompts(seed), generator_prompts(seed)[0]
    jobs: dict[str, Job] = {}
    for number, (name, count) in enumerate((("train", size.train), ("val", size.val))):
        jobs[name] = _pair, [([seed, 10 + number, i], splits[name][i % len(splits[name])]) for i in range(count)]
    for number, name in enumerate(("recent", "older")):
        scenes, sources = splits[name], [s for s in SOURCES if s.recent == (name == "recent")]
        turns = ((i, *divmod(i, len(sources))) for i in range(size.benchmark_videos))
        jobs[name] = _single, [([seed, 20 + number, i], scenes[a % len(scenes)], sources[b]) for i, a, b in turns]
    jobs["captions"] = _caption, [([seed, 30, i], SCENES[i % len(SCENES)]) for i in range(size.captions)]
    jobs["clips"] = _clip, [([seed, 50, i], taught[i % len(taught)]) for i in range(size.clips)]
    return jobs


def write_world(
    out: str | Path, size: WorldSize, seed: int = 0, pool: Executor | None = None
) -> Iterator[tuple[str, int, int]]:
    """Write all sets, and yield (set, samples done, samples in all) after each sample.

    Args:
        out: Folder to write.
        size: Numbers of samples.
        seed: Seed of everything that is drawn.
        pool: Processes that render; None renders in this one.
    """
    with new_folder(out) as folder:
        for name, scenes in zip(("prompts", "unseen"), generator_prompts(seed)):
            (folder / f"{name}.txt").write_text("".join(f"{scene.prompt}\n" for scene in scenes))
        for number, (name, (function, work)) in enumerate(_jobs(size, seed).items()):
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
    """Accuracies of a judge that knows the true qualities: annotators disagree, so that no judge reaches 1.

    Args:
        benchmark: Benchmark whose records hold true qualities.
    """
    quality = {raw.key: raw.record()["quality"] for raw in benchmark.shards}
    true = torch.tensor([quality[key] for key in benchmark.keys])  # (videos, 3)
    metric = PreferenceAccuracy(resamples=0, sync_on_compute=False)
    metric.update(true[benchmark.ends[:, 0]] - true[benchmark.ends[:, 1]], benchmark.labels)
    return metric.compute()
