"""The writing part of every import: new samples become one set, or a set to train on and one that is held out."""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import google_crc32c

from .. import VideoAlignError
from .benchmark import PAIRS
from .media import ImageFile, Media
from .parallel import in_order
from .ratings import prompt_key
from .shards import SIDES, Kind, ShardWriter
from .split_sets import Compared, Shares, content_id, write_rows, written
from .splitting import Item, deal

X = TypeVar("X")
Progress = Callable[[str, int, int], None]
"""Callback for progress: name of the stage, items done, items in all."""


class NewSample(NamedTuple):
    """A sample that is to be written.

    Attributes:
        key: Key of the sample.
        paths: Paths of its videos, as :meth:`.media.Media.find` returns them.
        sources: Names of the models that made them.
        record: Content of ``KEY.json``; the entry of an image is added to it.
        image: Picture that its videos begin with; None for none.
    """

    key: str
    paths: tuple[str, ...]
    sources: tuple[str, ...]
    record: dict[str, Any]
    image: ImageFile | None = None


def shuffled(items: Iterable[X], seed: int) -> list[X]:
    """Items in a random order that depends on the seed alone."""
    return random.Random(seed).sample(items := list(items), len(items))


def write_samples(
    samples: Sequence[NewSample],
    rows: Sequence[Compared],
    media: Media,
    out: str | Path,
    kind: Kind,
    seed: int = 0,
    held_out: float = 0.0,
    pool: Executor | None = None,
    progress: Progress = lambda what, done, of: None,
) -> str:
    """Write samples in a random order, as one set or as two that share no prompt and no video.

    Args:
        samples: All samples.
        rows: Rated pairs of a *videos* set.
        media: Files of the videos.
        out: Folder or address to write.
        kind: Kind of the samples.
        seed: Seed of their order, and of the choice of those that are held out.
        held_out: Share that becomes the set ``val`` in ``out``, the others being ``train`` there; 0 writes one set.
        pool: Processes that compute checksums.
        progress: Callback that is told the progress.

    Returns:
        Counts and label shares of both sets as text; empty for one set.

    Raises:
        VideoAlignError: If the share is none between 0 and 1, or all samples hang together by prompts and videos.
    """
    if not 0 <= held_out < 1:
        raise VideoAlignError(f"--held-out is a share of the samples between 0 and 1, got {held_out}")
    if not held_out:
        with ShardWriter(out, kind) as writer:
            _write(samples, media, kind, seed, [writer] * len(samples), progress)
            if rows:
                writer.write_table(PAIRS, [row.cells for row in rows])
        return ""
    ids = _checksums(media, sorted({path for sample in samples for path in sample.paths}), pool, progress)
    items = [Item(prompt_key(s.record["prompt"]), tuple(ids[path] for path in s.paths), s.sources) for s in samples]
    asked = {"train": 1 - held_out, "val": held_out}
    dealt = deal(items, [(row.a, row.b) for row in rows], "prompt", asked, seed)
    report = Shares(asked, items, dealt)
    for sample, share in zip(samples, dealt):
        if share and "labels" in sample.record:
            report[share].labels.append(sample.record["labels"])
    with written(out, asked, partial(ShardWriter, kind=kind)) as writers:
        _write(samples, media, kind, seed, [writers[share] for share in dealt if share], progress)
        if rows:
            write_rows(rows, dealt, writers, report)
    return report.text()


def _write(
    samples: Sequence[NewSample],
    media: Media,
    kind: Kind,
    seed: int,
    writers: Sequence[ShardWriter],
    progress: Progress,
) -> None:
    """Write every sample through its own writer."""
    for done, (sample, writer) in enumerate(shuffled(zip(samples, writers, strict=True), seed), 1):
        image, record = sample.image and sample.image.read(), sample.record
        record = {**record, "image": image.entry(sample.image.name)} if image else record
        videos = {side: media.read(path) for side, path in zip(SIDES[kind], sample.paths)}
        writer.write(sample.key, videos, record, image)
        progress("samples written", done, len(samples))


def _checksums(media: Media, paths: Sequence[str], pool: Executor | None, progress: Progress) -> Mapping[str, str]:
    """What tells each file from all others, as a table of contents will say it."""
    found = {}
    for done, (path, one) in enumerate(zip(paths, in_order(pool, partial(_checksum, media), paths)), 1):
        found[path] = one
        progress("checksums computed", done, len(paths))
    return found


def _checksum(media: Media, path: str) -> str:
    content = media.read(path)
    return content_id(len(content), google_crc32c.value(content))
