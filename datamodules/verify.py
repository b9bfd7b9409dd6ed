"""Verification of a set: reads all of it, and reports samples that are missing, repeated, damaged or unusable."""

from collections import Counter
from collections.abc import Iterator

import pyarrow as pa
from safetensors import SafetensorError

from .. import VideoAlignError
from ..models.frame_sampling import FrameSampling
from .contents import Contents, RawSample, ShardError, read_table, table_name, walk
from .frames import load_frames
from .latent_files import load_latents
from .ratings import COLUMNS, LABELS, labels_of, prompt_of, scores_of, sources_of
from .shards import SIDES, Shard, ShardSet, sha256
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
    """
    yield from shards.size_problems()
    index = shards.index
    listed = {shard.name for shard in index.shards} | set(index.tables) | {"index.json"}
    listed |= PUBLISHED
    listed |= {table_name(shard.name) for shard in index.shards if shard.contents}
    yield from (
        f"{p.name} is in the folder, but not in the index"
        for p in sorted(shards.path.iterdir())
        if p.name not in listed
    )
    keys: Counter[str] = Counter()
    for shard in index.shards:
        path = shards.path / shard.name
        if "/" in shard.name or not path.is_file():
            continue
        if sha256(path) != shard.sha256:
            yield f"{shard.name}: its sha256 is not the index's; the content has changed"
        try:
            table = walk(path, index.members())
        except ShardError as error:
            yield str(error)
            continue
        if len(table) != shard.samples:
            yield f"{shard.name} holds {len(table)} samples, the index says {shard.samples}"
        yield from _contents(shards, shard, table)
        for content in Contents([path], [len(table)], table):
            keys[content.key] += 1
            yield from _sample(content.raw(), shards)
    yield from (f"key {key!r} occurs {count} times" for key, count in keys.items() if count > 1)
    for name, digest in index.tables.items():
        yield from _file(shards, name, digest)
        if name.endswith(".csv") and (shards.path / name).is_file():
            yield from _table(shards, name, set(keys))


def _contents(shards: ShardSet, shard: Shard, table: pa.Table) -> Iterator[str]:
    """Differences between the table of contents beside a shard and the shard itself."""
    if shard.contents is None:
        return
    path = shards.path / table_name(shard.name)
    if not path.is_file():
        yield f"{path.name} is missing; `videoalign shards index {shards.path}` makes it anew"
        return
    if sha256(path) != shard.contents:
        yield f"{path.name}: its sha256 is not the index's; the content has changed"
    try:
        written = read_table(path, shards.index.members(), shard.samples)
    except ShardError as error:
        yield str(error)
        return
    if not written.select(table.column_names).equals(table):
        there, here = (dict(zip(t["key"].to_pylist(), t.to_pylist())) for t in (written, table))
        different = sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key))
        changed = f"{len(different)} samples are not as they were written"
        yield f"{shard.name}: {changed}, the first of them key {different[:1]}"


def _sample(sample: RawSample, shards: ShardSet) -> Iterator[str]:
    try:
        record = sample.record()
        prompt_of(record, sample.name)
        if shards.index.kind == "pairs":
            labels_of(record, sample.name)
            scores_of(record, sample.name)
            sources_of(record, sample.name)
    except VideoAlignError as error:
        yield str(error)
    for side in SIDES[shards.index.kind]:
        member = f"{side}.{shards.index.media}".lstrip(".")
        name = f"{sample.name}, {member}"
        try:
            if shards.index.kind == "latents":
                load_latents(sample.members[member], name)
            elif shards.index.media == "mp4":
                decode(sample.members[member], GLANCE, 2, name)
            else:
                load_frames(sample.members[member], name)
        except (VideoAlignError, SafetensorError) as error:
            yield str(error)


def _file(shards: ShardSet, name: str, digest: str) -> Iterator[str]:
    path = shards.path / name
    if not path.is_file():
        yield f"{name} is missing"
    elif sha256(path) != digest:
        yield f"{name}: its sha256 is not the index's; the content has changed"


def _table(shards: ShardSet, name: str, keys: set[str]) -> Iterator[str]:
    try:
        rows = shards.table(name)
    except VideoAlignError as error:
        yield str(error)
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
