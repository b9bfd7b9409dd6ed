"""Sets of samples on disk: WebDataset tar shards and an index that accounts for them.

A set is a folder:

    index.json      format, version, kind, dimensions, type of the media; per shard its name, samples, bytes and sha256
    000000.tar      members KEY.a.mp4 KEY.b.mp4 KEY.json (kind *pairs*) or KEY.mp4 KEY.json (kind *videos*)
    000000.parquet  its table of contents: the place of every sample, its record and checksums (:mod:`.contents`)
    pairs.csv       only in *videos* sets with ratings: the rated pairs, by key

Sets of decoded frames (``videoalign shards encode-frames``) have ``.safetensors`` in place of ``.mp4``. In sets of kind
*latents* KEY.safetensors holds the latents of A and B, or of one video, and the embedding of the prompt. Keys hold no
dots. A set is written to a temporary folder and renamed when complete. Sets of format version 1, which have no tables
of contents, are read too; ``videoalign shards index`` adds them.
"""

import contextlib
import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

import pyarrow as pa

from ..models.dimensions import DIMENSIONS
from ..models.files import new_folder, read_json, write_json
from .contents import Contents, RawSample, ShardError, is_key, joined, read_table, table_name, walk, write_table
from .spreadsheets import exact
from .tables import sound_rows

if TYPE_CHECKING:
    from webdataset import TarWriter

FORMAT, VERSION = "videoalign-shards", 2
READ_VERSIONS = (1, VERSION)
Kind = Literal["pairs", "videos", "latents"]
SIDES: dict[str, tuple[str, ...]] = {"pairs": ("a", "b"), "videos": ("",), "latents": ("",)}
"""Names of a sample's media by kind: the part of the member's name between key and type."""
_FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


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
        write_table(contents, table)
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

    def save(self, folder: Path) -> None:
        """Write ``index.json`` to a folder."""
        write_json(folder / "index.json", {"format": FORMAT, "version": VERSION, **asdict(self)})

    def members(self) -> set[str]:
        """Extensions that every sample has, such as ``{"a.mp4", "b.mp4", "json"}``."""
        return {f"{side}.{self.media}".lstrip(".") for side in SIDES[self.kind]} | {"json"}


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ShardWriter:
    """Writes a set in a ``with`` block; it appears under its name if the block ends without an error.

    Args:
        out: Folder to write.
        kind: Kind of the samples.
        media: Type of the media, see :class:`Index`.
        frames: Sampling and patch factor of decoded frames, see :class:`Index`.
        per_shard: Largest number of samples in a tar file.
        shard_bytes: Size in bytes at which a tar file is closed.
    """

    def __init__(
        self,
        out: str | Path,
        kind: Kind,
        media: str = "mp4",
        frames: dict | None = None,
        per_shard: int = 512,
        shard_bytes: float = 1e9,
    ) -> None:
        self.index = Index(kind, media=media, frames=frames)
        self._folder = new_folder(out)
        self._per_shard, self._shard_bytes = per_shard, shard_bytes
        self._keys: set[str] = set()
        self._tar: TarWriter | None = None
        self._closed = 0  # samples in tar files that are closed

    def __enter__(self) -> Self:
        self.path = self._folder.__enter__()
        return self

    def _open(self) -> None:
        """Begin the next tar file."""
        self._bytes = 0
        self._file = open(self.path / f"{len(self.index.shards):06d}.tar", "xb")
        # a fixed mtime, so that the same samples give the same bytes; an open file, because WebDataset takes a name for
        # an address
        from webdataset import TarWriter  # it imports torch, which readers of records do without

        self._tar = TarWriter(self._file, encoder=False, mtime=0)

    def _close(self) -> None:
        """Close the current tar file, if there is one."""
        if self._tar is None:
            return
        tar, self._tar = self._tar, None
        with self._file:
            tar.close()
        self.index.shards.append(Shard.closed(Path(self._file.name), self.index.members()))
        self._closed = len(self._keys)

    def write(self, key: str, videos: Mapping[str, bytes], record: dict) -> None:
        """Add a sample.

        Args:
            key: Unique key of letters, digits, ``-`` and ``_``.
            videos: Content by side (``a`` and ``b``, or ``""``).
            record: Content of ``KEY.json``.

        Raises:
            ShardError: If the key is invalid or occurs twice, or a member is missing.
        """
        if not is_key(key):
            raise ShardError(f"key {key!r}: only letters, digits, - and _ may occur in a key")
        if key in self._keys:
            raise ShardError(f"key {key!r} was written already; every key occurs once")
        members = {f"{side}.{self.index.media}".lstrip("."): content for side, content in videos.items()}
        members["json"] = json.dumps(record, ensure_ascii=False).encode()
        needed = self.index.members()
        if members.keys() != needed:
            have = f"key {key!r} has members {sorted(members)}"
            raise ShardError(f"{have}, but {self.index.kind} need {sorted(needed)}")
        if self._tar is None:
            self._open()
        self._bytes += self._tar.write({"__key__": key, **members})
        self._keys.add(key)
        if len(self._keys) - self._closed >= self._per_shard or self._bytes >= self._shard_bytes:
            self._close()

    def write_table(self, name: str, rows: list[dict], cell: Callable[[str], str] = exact) -> None:
        """Add a CSV file to the set.

        Args:
            name: Name of the file.
            rows: Cells by column; the first row has all columns.
            cell: Writes a text as a cell: :func:`.spreadsheets.exact`, or :func:`.spreadsheets.plain` for people.
        """
        if not rows:
            raise ShardError(f"{name} would have no rows")
        with open(self.path / name, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({c: cell(v) if isinstance(v, str) else v for c, v in row.items()} for row in rows)
        self.index.tables[name] = sha256(self.path / name)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self._close()
                if not self._keys:
                    raise ShardError("no sample was written, so there is no set to make")
                self.index.save(self.path)
            elif self._tar is not None:  # its content is removed with the folder
                with contextlib.suppress(OSError), self._file:
                    self._tar.close()
        except BaseException as failure:
            self._folder.__exit__(type(failure), failure, failure.__traceback__)
            raise
        self._folder.__exit__(kind, error, trace)


class ShardSet:
    """A set on disk; file sizes are compared with the index when it is opened.

    Args:
        path: Folder of the set.
        kind: Kind that the set must have; any kind if not given.
        check_sizes: Refuse a set whose files have other sizes than the index says.

    Raises:
        ShardError: If the folder is no such set, or is damaged.
    """

    def __init__(self, path: str | Path, kind: Kind | None = None, check_sizes: bool = True) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ShardError(f"{self.path}: there is no such folder of shards")
        record = read_json(self.path / "index.json", "a folder of shards")
        try:
            kind_of_file, version = record.pop("format", None), record.pop("version", None)
            if kind_of_file != FORMAT or version not in READ_VERSIONS:
                have = f"format {kind_of_file!r} version {version!r}"
                reads = f"{FORMAT!r} versions {READ_VERSIONS}"
                raise ShardError(f"{self.path}: index.json is of {have}, this release reads {reads}")
            self.index = Index(**{**record, "shards": [Shard(**shard) for shard in record["shards"]]})
            self.index.check()
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ShardError(f"{self.path / 'index.json'} is no index of shards ({error})") from None
        if kind and self.index.kind != kind:
            raise ShardError(f"{self.path} holds {self.index.kind}, but {kind} are needed here")
        if check_sizes and (problems := self.size_problems()):
            raise ShardError(f"{self.path}: {problems[0]}. `videoalign shards verify {self.path}` lists all damage")

    def size_problems(self) -> list[str]:
        """Messages on shards that are missing, misplaced or of another size than the index says."""
        names = Counter(shard.name for shard in self.index.shards)
        problems = [f"{name} is listed {count} times" for name, count in sorted(names.items()) if count > 1]
        problems += [
            f"{name}: a table must be a plain file in the set's folder"
            for name in self.index.tables
            if not _FILE.fullmatch(name)
        ]
        for shard in self.index.shards:
            path = self.path / shard.name
            if not _FILE.fullmatch(shard.name) or path.is_symlink():
                problems.append(f"{shard.name}: a shard must be a plain file in the set's folder")
            elif not path.is_file():
                problems.append(f"{shard.name} is missing")
            elif (size := path.stat().st_size) != shard.bytes:
                sizes = f"{size} bytes, the index says {shard.bytes}"
                problems.append(f"{shard.name} has {sizes}: it was cut short or changed")
        return problems

    def __len__(self) -> int:
        return self.index.samples

    def __iter__(self) -> Iterator[RawSample]:
        """Undecoded samples in order, each compared with its checksums."""
        for content in self.contents():
            yield content.raw()

    def contents(self) -> Contents:
        """The table of contents: place and record of every sample.

        Reads no media, except in sets of version 1, where it walks through the shards.

        Raises:
            ShardError: If a table of contents or a shard differs from the index.
        """
        return self._contents

    @cached_property
    def _contents(self) -> Contents:
        tables = []
        for shard in self.index.shards:
            try:
                tables.append(self._table_of(shard))
            except ShardError as error:
                raise ShardError(
                    f"{self.path}: {error}. `videoalign shards verify {self.path}` lists all damage"
                ) from None
        shards = self.index.shards
        contents = Contents([self.path / s.name for s in shards], [s.samples for s in shards], joined(tables))
        if (key := contents.repeated()) is not None:
            raise ShardError(
                f"{self.path}: key {key!r} occurs twice. `videoalign shards verify {self.path}` lists all damage"
            )
        return contents

    def _table_of(self, shard: Shard) -> pa.Table:
        if shard.contents is None:
            table = walk(self.path / shard.name, self.index.members(), checksums=False)
            if len(table) != shard.samples:
                raise ShardError(f"{shard.name} holds {len(table)} samples, the index says {shard.samples}")
            return table
        path = self.path / table_name(shard.name)
        if not path.is_file():
            raise ShardError(
                f"{path.name}, the table of contents of {shard.name}, is missing; "
                "`videoalign shards index` makes it anew"
            )
        if sha256(path) != shard.contents:
            raise ShardError(
                f"{path.name} is not the table of contents that was written for {shard.name} (another sha256)"
            )
        return read_table(path, self.index.members(), shard.samples)

    def table(self, name: str) -> list[dict[str, str]]:
        """Rows of a CSV file of the set.

        Args:
            name: Name of the file.
        """
        if not (self.path / name).exists():
            raise ShardError(f"{self.path} has no {name}: it holds videos, but no rated pairs of them")
        return [row for _, row in sound_rows(self.path / name)]


def add_contents(folder: str | Path) -> int:
    """Write the tables of contents of a set from its shards, as `videoalign shards index` does.

    Args:
        folder: Folder of the set.

    Returns:
        Number of samples.

    Raises:
        ShardError: If a shard differs from the index; nothing is changed then.
    """
    shards = ShardSet(folder)
    fresh = []
    for shard in shards.index.shards:
        path = shards.path / shard.name
        if sha256(path) != shard.sha256:
            raise ShardError(
                f"{path}: its sha256 is not the index's; the content has changed, so no table is made of it"
            )
        fresh.append(Shard.closed(path, shards.index.members()))
        if fresh[-1].samples != shard.samples:
            raise ShardError(f"{path} holds {fresh[-1].samples} samples, the index says {shard.samples}")
    shards.index.shards = fresh
    shards.index.save(shards.path)
    return shards.index.samples
