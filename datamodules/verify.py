"""Verification of a set: reads all of it, and reports samples that are missing, repeated, damaged or unusable."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError

from .. import VideoAlignError
from ..models.frame_sampling import FrameSampling
from .addresses import short_name
from .benchmark import PAIRS
from .contents import Contents, RawSample, ShardError, packed, read_table, table_name, walk
from .frames import load_frames
from .latent_files import load_latents
from .ratings import COLUMNS, LABELS, labels_of, prompt_of, scores_of, sources_of
from .sample_images import image_of, read_image
from .set_index import INDEX, SIDES, Index, Shard, is_plain, sha256
from .shards import ShardSet
from .stored_sets import StoredSet, is_content
from .stores import LocalStore, StoredFile
from .tables import sound_rows
from .video import decode

GLANCE = FrameSampling(fps=None, num_frames=4, min_pixels=0, max_pixels=64 * 64)
"""Frame sampling of a check: few frames, and no enlargement."""

PUBLISHED = {"README.md", ".gitattributes", ".cache", "LICENSE", "NOTICE"}
"""What a set of the hub has beside its own files: a card, and what the hub and its client add."""


def open_damaged(folder: str) -> ShardSet:
    """Open a set for :func:`verify`, which reports the damage that :class:`ShardSet` would refuse."""
    return ShardSet(folder, check_sizes=False)


def verify(shards: ShardSet) -> Iterator[str]:
    """Find all damage of a set: reads every byte, member and record, and decodes every clip.

    Args:
        shards: The set, opened with :func:`open_damaged`.

    Yields:
        A message for each damage.

    Raises:
        StoreError: If a store does not give a file for another reason than that it is missing.
    """
    keys: Counter[str] = Counter()
    for part in shards.parts:
        prefix = f"{short_name(part.name)}/" if len(shards.parts) > 1 else ""
        yield from (f"{prefix}{problem}" for problem in _part(part, keys))
    yield from (f"key {key!r} occurs {count} times" for key, count in keys.items() if count > 1)
    for part in shards.parts:
        for name, digest in part.index.tables.items():
            yield from _table(part, name, digest, set(keys))


def _part(part: StoredSet, keys: Counter[str]) -> Iterator[str]:
    """Damage of the shards of a set in one place; their keys are counted."""
    yield from part.size_problems()
    index = part.index
    listed = {name for name, _, _ in index.files()} | {INDEX} | PUBLISHED
    there = part.store.names()
    yield from (f"{name} is in the folder, but not in the index" for name in sorted((there or set()) - listed))
    for shard in index.shards:
        if not is_plain(shard.name) or (there is not None and shard.name not in there):
            if is_plain(shard.name) and part.store.remote:
                yield f"{shard.name} is missing"
            continue
        with part.store.whole(shard.name, shard.bytes) as path:
            if path.is_file():
                yield from _shard(part, shard, path, keys)


def _shard(part: StoredSet, shard: Shard, path: Path, keys: Counter[str]) -> Iterator[str]:
    if sha256(path) != shard.sha256:
        yield f"{shard.name}: its sha256 is not the index's; the content has changed"
    try:
        table = walk(path, part.index.members())
    except ShardError as error:
        yield str(error)
        return
    if len(table) != shard.samples:
        yield f"{shard.name} holds {len(table)} samples, the index says {shard.samples}"
    yield from _contents(part, shard, table)
    file, content = StoredFile(LocalStore(path.parent), path.name), packed(table)
    for sample in Contents([file], [read_table(content, shard.name, part.index.members(), len(table))]):
        keys[sample.key] += 1
        try:
            raw = sample.raw()
        except ShardError as error:
            yield str(error)
            continue
        yield from _sample(raw, part.index)


def _contents(part: StoredSet, shard: Shard, table: pa.Table) -> Iterator[str]:
    """Differences between the table of contents beside a shard and the shard itself."""
    if shard.contents is None:
        return
    name = table_name(shard.name)
    content = part.small(name, shard.contents)
    if content is None:
        yield f"{name} is missing; `videoalign shards index {part.name}` makes it anew"
        return
    if not is_content(shard.contents, content):
        yield f"{name}: its sha256 is not the index's; the content has changed"
    try:
        read_table(content, name, part.index.members(), shard.samples)
    except ShardError as error:
        yield str(error)
        return
    written = pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)
    if {*written.column_names} != {*table.column_names} or not written.select(table.column_names).equals(table):
        there, here = (dict(zip(t["key"].to_pylist(), t.to_pylist())) for t in (written, table))
        different = sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key))
        changed = f"{len(different)} samples are not as they were written"
        yield f"{shard.name}: {changed}, the first of them key {different[:1]}"


def _sample(sample: RawSample, index: Index) -> Iterator[str]:
    try:
        record = sample.record()
        prompt_of(record, sample.name)
        if index.kind == "pairs":
            labels_of(record, sample.name)
            scores_of(record, sample.name)
            sources_of(record, sample.name)
    except VideoAlignError as error:
        yield str(error)
    if image := image_of(sample):
        try:
            read_image(image.content, f"{sample.name}, {image.kind}")
        except VideoAlignError as error:
            yield str(error)
    for side in SIDES[index.kind]:
        member = f"{side}.{index.media}".lstrip(".")
        name = f"{sample.name}, {member}"
        try:
            if index.kind == "latents":
                load_latents(sample.members[member], name)
            elif index.media == "mp4":
                decode(sample.members[member], GLANCE, 2, name)
            else:
                load_frames(sample.members[member], name)
        except (VideoAlignError, SafetensorError) as error:
            yield str(error)


def _table(part: StoredSet, name: str, digest: str, keys: set[str]) -> Iterator[str]:
    """Damage of a further file of a set, and of the pairs in it."""
    if not is_plain(name):
        return
    content = part.small(name, digest)
    if content is None:
        yield f"{name} is missing"
        return
    if not is_content(digest, content):
        yield f"{name}: its sha256 is not the index's; the content has changed"
    if name.endswith(".csv"):
        yield from _pairs(content, name, part.name, keys)


def _pairs(content: bytes, name: str, folder: str, keys: set[str]) -> Iterator[str]:
    try:
        rows = [row for _, row in sound_rows(content, name=f"{folder}/{name}")]
    except VideoAlignError as error:
        yield str(error)
        return
    if name != PAIRS:  # a table of single videos, such as scores, or one of what is no video
        yield from (
            f"{name}, line {number}: video {row['key']!r} is not in the set"
            for number, row in enumerate(rows, 2)
            if "key" in row and row["key"] not in keys
        )
        return
    pairs: Counter[tuple] = Counter()
    for number, row in enumerate(rows, 2):
        ends = row.get("key_A"), row.get("key_B")
        pairs[tuple(sorted(map(str, ends)))] += 1
        yield from (f"{name}, line {number}: video {key!r} is not in the set" for key in ends if key not in keys)
        yield from (
            f"{name}, line {number}: unknown label {row[c]!r} in {c}" for c in COLUMNS if row.get(c, "") not in LABELS
        )
    yield from (f"{name}: the pair {pair} occurs {count} times" for pair, count in pairs.items() if count > 1)
