"""Sets of samples on disk: WebDataset tar shards and an index that accounts for them.

A set is a folder:

    index.json      format, version, kind, dimensions, type of the media; per shard its name, samples, bytes and sha256
    000000.tar      members KEY.a.mp4 KEY.b.mp4 KEY.json (kind *pairs*) or KEY.mp4 KEY.json (kind *videos*)
    000000.parquet  its table of contents: the place of every sample, its record and checksums (:mod:`.contents`)
    pairs.csv       only in *videos* sets with ratings: the rated pairs, by key

A sample of *pairs* or *videos* may have a further member KEY.png (or jpg, webp): the image that its videos begin with.
Sets of decoded frames (``videoalign shards encode-frames``) have ``.safetensors`` in place of ``.mp4``. In sets of kind
*latents* KEY.safetensors holds the latents of A and B, or of one video, and the embedding of the prompt. Keys hold no
dots. A set is written to a temporary folder and renamed when complete. Sets of format version 1, which have no tables
of contents, are read too; ``videoalign shards index`` adds them. A set may lie in a local folder or in a store
(:mod:`.stores`).
"""

import contextlib
import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from .addresses import THREADS, short_name, shown
from .contents import Content, Contents, RawSample, ShardError, is_key, misfit, table_name
from .parallel import in_order
from .ratings import COLUMNS
from .sample_images import SampleImage
from .set_index import FORMAT, INDEX, SIDES, Index, Kind, Shard, sha256
from .spreadsheets import exact
from .stored_sets import StoredSet, joined_index
from .stores import open_stores, threads, together
from .tables import sound_rows
from .uploads import new_set

if TYPE_CHECKING:
    from webdataset import TarWriter

__all__ = ["FORMAT", "INDEX", "SIDES", "Index", "Kind", "Shard", "ShardSet", "ShardWriter", "add_contents", "sha256"]


class ShardWriter:
    """Writes a set in a ``with`` block; it appears under its name if the block ends without an error.

    Args:
        out: Folder or address to write.
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
        self._output = new_set(out)
        self._per_shard, self._shard_bytes = per_shard, shard_bytes
        self._keys: set[str] = set()
        self._tar: TarWriter | None = None
        self._closed = 0  # samples in tar files that are closed

    def __enter__(self) -> Self:
        self._folder = self._output.__enter__()
        self.path = self._folder.path
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
        path = Path(self._file.name)
        self.index.shards.append(Shard.closed(path, self.index.members()))
        self._folder.keep(path.name, table_name(path.name))
        self._closed = len(self._keys)

    def write(self, key: str, videos: Mapping[str, bytes], record: dict, image: SampleImage | None = None) -> None:
        """Add a sample.

        Args:
            key: Unique key of letters, digits, ``-`` and ``_``.
            videos: Content by side (``a`` and ``b``, or ``""``).
            record: Content of ``KEY.json``.
            image: Picture that the videos begin with, if there is one.

        Raises:
            ShardError: If the key is invalid or occurs twice, or a member is missing.
        """
        if not is_key(key):
            raise ShardError(f"key {key!r}: only letters, digits, - and _ may occur in a key")
        if key in self._keys:
            raise ShardError(f"key {key!r} was written already; every key occurs once")
        members = {f"{side}.{self.index.media}".lstrip("."): content for side, content in videos.items()}
        members["json"] = json.dumps(record, ensure_ascii=False).encode()
        members |= {image.kind: image.content} if image else {}
        if why := misfit(members, self.index.members()):
            raise ShardError(f"key {key!r} of {self.index.kind} {why}")
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
        with io.StringIO(newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({c: cell(v) if isinstance(v, str) else v for c, v in row.items()} for row in rows)
            self.write_file(name, file.getvalue().encode())

    def write_file(self, name: str, content: bytes) -> None:
        """Add a further file to the set, such as ``null.safetensors``.

        Args:
            name: Name of the file.
            content: Its content.
        """
        (self.path / name).write_bytes(content)
        self.index.tables[name] = sha256(self.path / name)
        self._folder.keep(name)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self._close()
                if not self._keys:
                    raise ShardError("no sample was written, so there is no set to make")
                self.index.save(self.path)
                self._folder.keep(INDEX)
            elif self._tar is not None:  # its content is removed with the folder
                with contextlib.suppress(OSError), self._file:
                    self._tar.close()
        except BaseException as failure:
            self._output.__exit__(type(failure), failure, failure.__traceback__)
            raise
        self._output.__exit__(kind, error, trace)


class ShardSet:
    """A set, or several that are read as one; sizes of local files are compared with the index when it is opened.

    Args:
        path: Folder or address of the set; ``{0..3}`` or ``{a,b}`` in it names several sets, whose samples follow each
            other. They must be alike in all but their samples.
        kind: Kind that the set must have; any kind if not given.
        check_sizes: Refuse a set whose files have other sizes than the index says.

    Raises:
        ShardError: If there is no such set, if it is damaged, or if several sets do not fit together.
        StoreError: If a store does not give it.
    """

    def __init__(self, path: str | Path, kind: Kind | None = None, check_sizes: bool = True) -> None:
        self.name = shown(path)
        self.parts = list(together(StoredSet, open_stores(path)))
        self.index = joined_index(self.parts, self.name)
        if kind and self.index.kind != kind:
            raise ShardError(f"{self.name} holds {self.index.kind}, but {kind} are needed here")
        for part in self.parts if check_sizes else ():
            if problems := part.size_problems():
                raise ShardError(f"{part.name}: {problems[0]}. `videoalign shards verify {part.name}` lists all damage")

    @property
    def path(self) -> Path:
        """Folder of a set that lies in one local folder.

        Raises:
            ShardError: If it does not.
        """
        if len(self.parts) > 1 or self.parts[0].store.remote:
            raise ShardError(f"{self.name}: one local folder is needed here; `videoalign shards copy` makes one")
        return self.parts[0].store.path

    @cached_property
    def digest(self) -> str:
        """Hex digest that identifies the content of the set, wherever it lies: the sha256 of ``index.json``."""
        digests = [part.digest for part in self.parts]
        return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()

    def __len__(self) -> int:
        return self.index.samples

    def __iter__(self) -> Iterator[RawSample]:
        """Undecoded samples in order, each compared with its checksums; from a store they are read ahead."""
        contents = self.contents()
        if not contents.remote:
            yield from map(Content.raw, contents)
            return
        yield from in_order(threads(), Content.raw, contents, ahead=THREADS)

    def contents(self) -> Contents:
        """The table of contents: place and record of every sample.

        Reads no media, except in local sets of version 1, where it walks through the shards.

        Raises:
            ShardError: If a table of contents or a shard differs from the index, or a key occurs twice.
            StoreError: If a store does not give it.
        """
        return self._contents

    @cached_property
    def _contents(self) -> Contents:
        several = len(self.parts) > 1
        files = [file for part in self.parts for file in part.files(short_name(part.name) if several else "")]
        contents = Contents(files, [table for part in self.parts for table in part.tables()])
        if (key := contents.repeated()) is not None:
            again = "; sets that are read as one must have different keys" if several else ""
            raise ShardError(
                f"{self.name}: key {key!r} occurs twice{again}. `videoalign shards verify {self.name}` lists all damage"
            )
        return contents

    def file(self, name: str) -> bytes:
        """Content of a further file of the set, such as ``null.safetensors``; sets that are read as one share it.

        Args:
            name: Name of the file.

        Raises:
            ShardError: If there is none, or a damaged one.
        """
        return self.parts[0].file(name)

    def table(self, name: str) -> list[dict[str, str]]:
        """Rows of a CSV file of the set.

        Args:
            name: Name of the file.
        """
        if name not in self.index.tables and not self.parts[0].has(name):
            raise ShardError(f"{self.name} has no {name}: it holds videos, but no rated pairs of them")
        return [
            row
            for part in self.parts
            for _, row in sound_rows(part.file(name), name=f"{part.name}/{name}", optional=COLUMNS)
        ]


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
    place, fresh = shards.path, []
    for shard in shards.index.shards:
        path = place / shard.name
        if sha256(path) != shard.sha256:
            raise ShardError(
                f"{path}: its sha256 is not the index's; the content has changed, so no table is made of it"
            )
        fresh.append(Shard.closed(path, shards.index.members()))
        if fresh[-1].samples != shard.samples:
            raise ShardError(f"{path} holds {fresh[-1].samples} samples, the index says {shard.samples}")
    shards.index.shards = fresh
    shards.index.save(place)
    return shards.index.samples
