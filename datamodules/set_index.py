"""The index of a set: what ``index.json`` says about its samples and files."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from .. import VideoAlignError
from ..models.dimensions import DIMENSIONS
from ..models.files import parse_json, read_json, write_json
from ..models.locks import real
from .contents import ShardError, packed, table_name, walk

INDEX, WHAT = "index.json", "a folder of shards"
FORMAT, VERSION = "videoalign-shards", 2
READ_VERSIONS = (1, VERSION)
Kind = Literal["pairs", "videos", "latents"]
SIDES: dict[str, tuple[str, ...]] = {"pairs": ("a", "b"), "videos": ("",), "latents": ("",)}
"""Names of a sample's media by kind: the part of the member's name between key and type."""
SHAPE = ("fps", "num_frames", "height", "width")
"""What a record tells of a video, or of both videos of a pair by side."""
PLAIN = "{name}: a shard must be a plain file in the set's folder"
_FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


def shape_by_side(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """:data:`SHAPE` for the record of a pair; None where a video's own record does not tell it.

    Args:
        a: Record of A.
        b: Record of B.
    """
    return {name: {"A": a.get(name), "B": b.get(name)} for name in SHAPE}


@dataclass(frozen=True)
class Shard:
    """The entry of a tar file in the index."""

    name: str
    """File name."""
    samples: int
    """Number of samples."""
    bytes: int
    """Size of the file in bytes."""
    sha256: str
    """Hex digest of the file."""
    contents: str | None = None
    """Hex sha256 of its table of contents; None in sets of version 1."""

    @classmethod
    def closed(cls, path: Path, members: set[str]) -> "Shard":
        """Write the table of contents of a complete shard, and return the shard's entry.

        Args:
            path: Path of the tar file.
            members: Extensions that every sample has.
        """
        table, contents = walk(path, members), path.parent / table_name(path.name)
        contents.write_bytes(packed(table))
        return cls(path.name, len(table), path.stat().st_size, sha256(path), sha256(contents))


@dataclass
class Index:
    """Content of ``index.json``."""

    kind: Kind
    """Kind of the samples: ``pairs``, ``videos`` or ``latents``."""
    dimensions: list[str] = field(default_factory=lambda: list(DIMENSIONS))
    """Dimensions that samples are rated in."""
    media: str = "mp4"
    """Type of the media: ``mp4``, or ``safetensors`` for decoded frames and latents."""
    frames: dict | None = None
    """Sampling and patch factor of decoded frames."""
    latents: dict | None = None
    """Settings of latents: the generator's identity, frames and size, and the kind of the videos."""
    shards: list[Shard] = field(default_factory=list)
    """Entries of the tar files."""
    tables: dict[str, str] = field(default_factory=dict)
    """Hex sha256 of further files of the set, by name."""

    @property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    def check(self) -> None:
        """Refuse an index that is well-formed JSON with meaningless values.

        Raises:
            ValueError: If a value is wrong; the message says which one.
        """
        names = [shard.name for shard in self.shards] + list(self.tables)
        if not isinstance(self.shards, list) or not self.shards:
            raise ValueError("it lists no shard")
        for name in ("frames", "latents"):
            if not isinstance(getattr(self, name), dict | None):
                raise ValueError(f"{name} must be an object")
        if self.kind not in SIDES or self.media not in ("mp4", "safetensors"):
            raise ValueError(f"kind {self.kind!r} or media {self.media!r} is unknown")
        if not isinstance(self.tables, dict) or not all(isinstance(name, str) for name in names):
            raise ValueError("shards and tables must have names")
        if not all(type(n) is int and n >= 0 for shard in self.shards for n in (shard.samples, shard.bytes)):
            raise ValueError("samples and bytes must be numbers from 0")
        if small := [shard.name for shard in self.shards if not 0 < 1024 * shard.samples <= shard.bytes]:
            raise ValueError(f"{small[0]} cannot hold so many samples in its bytes, or holds none")

    @classmethod
    def parse(cls, content: bytes, folder: str) -> "Index":
        """Read ``index.json``.

        Args:
            content: Content of the file.
            folder: What to call its folder in messages.

        Raises:
            VideoAlignError: If it is no JSON.
            ShardError: If it is no index of shards, or one of another release.
        """
        record = parse_json(content, f"{folder}/{INDEX}", WHAT)
        try:
            kind_of_file, version = record.pop("format", None), record.pop("version", None)
            if kind_of_file != FORMAT or version not in READ_VERSIONS:
                have = f"format {kind_of_file!r} version {version!r}"
                reads = f"{FORMAT!r} versions {READ_VERSIONS}"
                raise ShardError(f"{folder}: {INDEX} is of {have}, this release reads {reads}")
            index = cls(**{**record, "shards": [Shard(**shard) for shard in record["shards"]]})
            index.check()
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ShardError(f"{folder}/{INDEX} is no index of shards ({error})") from None
        return index

    def name_problems(self) -> list[str]:
        """Messages on files that are listed twice, or whose names lead out of the set's folder."""
        names = Counter(shard.name for shard in self.shards)
        problems = [f"{name} is listed {count} times" for name, count in sorted(names.items()) if count > 1]
        tables = [name for name in self.tables if not is_plain(name)]
        problems += [f"{name}: a table must be a plain file in the set's folder" for name in tables]
        return problems + [PLAIN.format(name=name) for name in names if not is_plain(name)]

    def files(self) -> Iterator[tuple[str, str, int | None]]:
        """Every file that the index lists: name, sha256, and size in bytes where it is stated."""
        for shard in self.shards:
            yield shard.name, shard.sha256, shard.bytes
            if shard.contents is not None:
                yield table_name(shard.name), shard.contents, None
        for name, digest in self.tables.items():
            yield name, digest, None

    def save(self, folder: Path) -> None:
        """Write ``index.json`` to a folder."""
        write_json(folder / INDEX, {"format": FORMAT, "version": VERSION, **asdict(self)})

    def members(self) -> set[str]:
        """Extensions that every sample has, such as ``{"a.mp4", "b.mp4", "json"}``; it may hold an image besides."""
        return {f"{side}.{self.media}".lstrip(".") for side in SIDES[self.kind]} | {"json"}


def is_plain(name: str) -> bool:
    """Whether a text is the name of a file in the set's own folder."""
    return bool(_FILE.fullmatch(name))


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def outside_sets(out: str | Path) -> None:
    """Refuse an output that is a set, or lies in one: files that its index does not list damage a set.

    Args:
        out: Local folder that is to be written.

    Raises:
        VideoAlignError: Where a set is there, or above.
    """
    place = real(out)
    for folder in (place, *place.parents):
        try:
            is_set = read_json(folder / INDEX, WHAT).get("format") == FORMAT if (folder / INDEX).is_file() else False
        except (VideoAlignError, AttributeError, OSError):
            continue  # an index of something else
        if is_set:
            raise VideoAlignError(f"output {out} lies in the set {folder}, which would be damaged; name another folder")
