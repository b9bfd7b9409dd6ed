"""Reading a set again, all of it: is every sample there, once, sound and usable?"""

import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from .. import VideoAlignError
from ..models.sampling import FrameSampling
from .frames import load_frames
from .latent_files import load_latents
from .ratings import COLUMNS, LABELS, labels_of, prompt_of, scores_of, sources_of
from .shards import SIDES, RawSample, ShardSet, sha256
from .video import decode

# A light look at each clip: few frames, no enlargement.
GLANCE = FrameSampling(fps=None, num_frames=4, min_pixels=0, max_pixels=64 * 64)


def open_damaged(folder: str) -> ShardSet:
    """Open a set for :func:`verify`, which reports what opening would refuse."""
    return ShardSet(folder, check_sizes=False)


def verify(shards: ShardSet) -> Iterator[str]:
    """All damage of a set, a line each; nothing where it is sound.

    Reads every byte (sha256), every member and every record, and decodes every clip.
    """
    yield from shards.size_problems()
    index = shards.index
    listed = {shard.name for shard in index.shards} | set(index.tables) | {"index.json"}
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
        yield from _members(path, shard.name, index.members())
        try:
            for sample in shards.read(shard):
                keys[sample.key] += 1
                yield from _sample(sample, shards)
        except VideoAlignError as error:
            yield str(error)
    yield from (f"key {key!r} occurs {count} times" for key, count in keys.items() if count > 1)
    for name, digest in index.tables.items():
        yield from _file(shards, name, digest)
        if name.endswith(".csv") and (shards.path / name).is_file():
            yield from _table(shards, name, set(keys))


def _members(path: Path, name: str, extensions: set[str]) -> Iterator[str]:
    """Members that have no place in a shard: links, folders, other names and types, and names that lead out of it."""
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                if not member.isreg():
                    yield f"{name}: member {member.name!r} is no regular file"
                elif not key or "/" in member.name or ".." in member.name:
                    yield f"{name}: member name {member.name!r} is not a plain name"
                elif extension not in extensions or key.startswith("__"):
                    yield f"{name}: member {member.name!r} has no place in a sample; they are KEY. and {sorted(extensions)}"
    except (tarfile.TarError, OSError) as error:
        yield f"{name} is no sound tar file ({error})"


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
