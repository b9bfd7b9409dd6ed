"""Tables of contents: the place of every sample of a set, its record, and a checksum of each of its files.

Beside each shard ``000000.tar`` is a file ``000000.parquet`` with a row per sample: its key, its record (the text of
``KEY.json``), and for every member, such as ``a.mp4``, its offset in the shard, its size and its CRC-32C. With it a set
opens without walking through its shards, any sample can be read alone, and a flipped bit is noticed when it is read.
A sample may hold one member more than its set asks for: the image that its videos begin with (:data:`IMAGES`).
"""

import io
import json
import re
import tarfile
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .. import VideoAlignError
from .attempts import StoreError
from .stores import StoredFile
from .tar_members import compression, plain_files

_KEY = re.compile(r"[A-Za-z0-9_-]+")
IMAGES = ("jpg", "png", "webp")
"""Extensions of the image that a sample may hold: the picture that its videos begin with (image-to-video)."""


class ShardError(VideoAlignError):
    """A damaged or foreign set; the message names the shard and key."""


def is_key(key: str) -> bool:
    """Whether a text may be the key of a sample: letters, digits, ``-`` and ``_``, no dots."""
    return bool(_KEY.fullmatch(key))


def misfit(members: Collection[str], needed: Collection[str]) -> str | None:
    """Why a sample cannot have these members; None if it can: those that its set needs, and at most one image.

    Args:
        members: Extensions of the sample's members.
        needed: Extensions that every sample of the set has.
    """
    if {*members} - {*IMAGES} != {*needed}:
        return f"has members {sorted(members)}, needs {sorted(needed)}"
    if len(images := sorted({*members} & {*IMAGES})) > 1:
        return f"has {len(images)} images ({', '.join(images)}), but a sample begins with one"
    return None


def table_name(shard: str) -> str:
    """Name of the table of contents beside a shard."""
    return f"{Path(shard).stem}.parquet"


@dataclass(frozen=True)
class Span:
    """The bytes of a member in its shard.

    Attributes:
        start: Offset of the first byte.
        size: Number of bytes.
        crc32c: Checksum of the content; -1 in sets of an earlier release, which have none.
    """

    start: int
    size: int
    crc32c: int


@dataclass
class RawSample:
    """An undecoded sample.

    Attributes:
        key: Key of the sample.
        shard: Name of the shard that holds it.
        members: Content by extension.
    """

    key: str
    shard: str
    members: dict[str, bytes]

    @property
    def name(self) -> str:
        """What to call the sample in messages."""
        return f"{self.shard}, key {self.key!r}"

    def record(self) -> dict:
        """The parsed JSON member."""
        return parse_record(self.members["json"], self.name)


def parse_record(text: str | bytes, name: str) -> dict:
    """Parse the record of a sample.

    Args:
        text: JSON text.
        name: What to call the sample in messages.

    Raises:
        ShardError: If the text is no JSON object.
    """
    try:
        record = json.loads(text.decode() if isinstance(text, bytes) else text)  # of bytes it would guess an encoding
        if not isinstance(record, dict):
            raise ValueError("not an object")
        return record
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{name}: its .json is not valid ({error})") from None


@dataclass
class Content:
    """One sample of a table of contents; its media stay where they are until :meth:`read`.

    Attributes:
        key: Key of the sample.
        file: The shard that holds it.
        row: Number of the sample in the shard.
        table: The shard's table of contents, as Parquet.
        spans: Bytes of its members in the shard, by extension.
    """

    key: str
    file: StoredFile
    row: int
    table: bytes
    spans: dict[str, Span]

    @property
    def name(self) -> str:
        """What to call the sample in messages."""
        return f"{self.file}, key {self.key!r}"

    @property
    def image(self) -> str | None:
        """Extension of the image that the sample begins with; None where it holds none."""
        return next((extension for extension in IMAGES if extension in self.spans), None)

    @property
    def image_id(self) -> str:
        """What tells the sample's image from all others without reading it; empty where it holds none."""
        span = self.spans[self.image] if self.image else None
        return f"{span.size}-{span.crc32c & 0xFFFFFFFF:08x}" if span else ""

    @property
    def text(self) -> str:
        """The sample's record, as JSON text."""
        return _records(self.table)[self.row].as_py()

    @cached_property
    def record(self) -> dict:
        """The parsed JSON member."""
        return parse_record(self.text, self.name)

    def read(self, *extensions: str) -> bytes | list[bytes]:
        """Content of one member, or a list for several, compared with their checksums.

        From a store they come at once, from the first byte of the first one to the last byte of the last one.

        Args:
            *extensions: Extensions of the members.

        Raises:
            ShardError: If a member cannot be read from a local disk, or has another checksum.
            StoreError: If a store does not give it.
        """
        spans = [self.spans[extension] for extension in extensions]
        # a request is dear, so that a store gives all in one; of a disk, members cut out of one range are copied twice
        ranges = [spans] if self.file.store.remote else [[span] for span in spans]
        try:
            contents = [member for together in ranges for member in self._read(together)]
        except StoreError as error:
            raise StoreError(f"{error} (needed for {self.name})") from None
        except OSError as error:
            raise ShardError(f"{self.name} cannot be read ({error})") from None
        for extension, member in zip(extensions, contents):
            if member is None:
                raise ShardError(
                    f"{self.name}, {extension}: its bytes are not those that were written (another checksum); the file "
                    f"is damaged. `videoalign shards verify {self.file.store.name}` lists all damage"
                )
        return contents[0] if len(extensions) == 1 else contents

    def _read(self, spans: Sequence[Span]) -> list[bytes | None]:
        start, end = min(span.start for span in spans), max(span.start + span.size for span in spans)
        return _members(self.file.read(start, end, lambda all_: None not in _members(all_, start, spans)), start, spans)

    def raw(self) -> RawSample:
        """The sample with all of its members."""
        extensions = tuple(self.spans)
        return RawSample(self.key, str(self.file), dict(zip(extensions, self.read(*extensions))))


def _members(content: bytes, start: int, spans: Sequence[Span]) -> list[bytes | None]:
    """Members in a range of a shard's bytes that begins at ``start``; None for one with another checksum."""
    found: list[bytes | None] = []
    for span in spans:
        first = span.start - start
        whole = not first and len(content) == span.size
        member = content if whole else content[first : first + span.size]
        changed = span.crc32c >= 0 and google_crc32c.value(member) != span.crc32c
        found.append(None if changed or len(member) != span.size else member)
    return found


class Contents(Sequence[Content]):
    """The samples of a set, in order: a table in a few arrays, so that a million of them take little memory.

    Records stay compressed, as they are in the tables' files, until they are asked for.

    Args:
        files: The shards.
        tables: Their tables of contents, as :func:`read_table` gives them.
    """

    def __init__(self, files: Sequence[StoredFile], tables: Sequence["Table"]) -> None:
        self.files, self._tables = list(files), [table.content for table in tables]
        counts = [len(table.columns) for table in tables]
        self.shard = np.repeat(np.arange(len(files), dtype=np.int32), counts)  # (N,)
        self._rows = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])  # (N,) in its shard
        columns = pa.concat_tables([table.columns for table in tables], promote_options="default")
        self._keys = _one(columns["key"])
        self.extensions = sorted(
            name.removesuffix(".start") for name in columns.column_names if name.endswith(".start")
        )
        self._spans = {
            e: np.stack([columns[column].fill_null(-1).to_numpy() for column in _places(e)], 1) for e in self.extensions
        }  # (N, 3) each; -1 where a sample has no image

    @cached_property
    def remote(self) -> bool:
        """Whether a shard lies in a remote store."""
        return any(file.store.remote for file in self.files)

    def __len__(self) -> int:
        return len(self.shard)

    def __getitem__(self, number: int) -> Content:
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        number %= len(self)
        spans = {e: Span(*rows[number].tolist()) for e, rows in self._spans.items() if rows[number, 0] >= 0}
        shard = self.shard[number]
        return Content(
            self._keys[number].as_py(), self.files[shard], int(self._rows[number]), self._tables[shard], spans
        )

    def keys(self) -> list[str]:
        """Keys of all samples, in order."""
        return self._keys.to_pylist()

    def take(self, numbers: Sequence[int]) -> "Contents":
        """A table of contents of the samples with these numbers."""
        part, chosen = object.__new__(Contents), np.asarray(numbers, dtype=np.int64)
        part.files, part._tables, part.extensions = self.files, self._tables, self.extensions
        part.shard, part._rows, part._keys = self.shard[chosen], self._rows[chosen], self._keys.take(pa.array(chosen))
        part._spans = {e: rows[chosen] for e, rows in self._spans.items()}
        return part

    def repeated(self) -> str | None:
        """The key that occurs most often, if one occurs more than once."""
        if len(self._keys.unique()) == len(self._keys):
            return None
        values = self._keys.value_counts()
        return values.field("values")[int(values.field("counts").to_numpy().argmax())].as_py()


@lru_cache(maxsize=64)
def _records(table: bytes) -> pa.Array:
    """Records of a shard; those of the last few shards are kept, because samples are mostly asked for in order."""
    return _one(pq.ParquetFile(pa.BufferReader(table)).read(["record"], use_threads=False)["record"])


def _one(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


def walk(path: Path, members: Iterable[str], checksums: bool = True) -> pa.Table:
    """Compute the table of contents of a shard from its tar file.

    Args:
        path: Path of the tar file.
        members: Extensions that every sample has; an image may be there besides.
        checksums: Read every byte for the CRC-32C; otherwise it is -1.

    Raises:
        ShardError: If the tar file is damaged, if a member is no plain file, or if a sample lacks members, holds two
            images, occurs twice or lies apart from its other members.
    """
    rows: dict[str, dict] = {}
    last = None
    try:
        with tarfile.open(path, "r:") as tar:  # places in a file that is compressed would be those of the unpacked one
            for member, content in plain_files(tar, path, checksums):
                key, _, extension = member.name.partition(".")
                if not is_key(key):
                    raise ShardError(f"{path.name}: member name {member.name!r} is not a plain key and a type")
                if extension in rows.get(key, {}):
                    raise ShardError(f"{path.name}: key {key!r} occurs twice")
                if key in rows and key != last:
                    raise ShardError(f"{path.name}: the members of key {key!r} do not stand together")
                crc = google_crc32c.value(content) if checksums else -1
                row, last = rows.setdefault(key, {}), key
                row[extension] = member.offset_data, member.size, crc
                if extension == "json":
                    row["record"] = _text(content, f"{path.name}, key {key!r}")
    except (OSError, tarfile.TarError, ValueError) as error:
        if packed := compression(path):
            raise ShardError(f"{path.name} is compressed ({packed}); unpack it, shards are plain tar files") from None
        raise ShardError(f"{path.name} cannot be read past sample {len(rows)} ({_short(error)})") from None
    for key, row in rows.items():
        if why := misfit(row.keys() - {"record"}, members):
            raise ShardError(f"{path.name}, key {key!r}: {why}")
    columns: dict[str, pa.Array] = {"key": pa.array(list(rows), pa.string())}
    for e in [*sorted(members), *(image for image in IMAGES if any(image in row for row in rows.values()))]:
        for place, column in enumerate(_places(e)):
            columns[column] = pa.array([row[e][place] if e in row else None for row in rows.values()], pa.int64())
    columns["record"] = pa.array([row["record"] for row in rows.values()], pa.large_string())
    return pa.table(columns)


def _text(content: bytes, name: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ShardError(f"{name}: its .json is not valid ({error})") from None


def _short(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def packed(table: pa.Table) -> bytes:
    """A table of contents as Parquet."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


@dataclass(frozen=True)
class Table:
    """The table of contents of a shard.

    Attributes:
        content: The whole table as Parquet.
        columns: Keys, and places and checksums of the members, without the records.
    """

    content: bytes
    columns: pa.Table


def _places(extension: str) -> list[str]:
    """Columns that say where the members with an extension are."""
    return [f"{extension}.{part}" for part in ("start", "size", "crc32c")]


def read_table(content: bytes, name: str, members: Iterable[str], samples: int) -> Table:
    """Read a table of contents, without its records.

    Args:
        content: The table as Parquet.
        name: Name of its file, for messages.
        members: Extensions that every sample has; columns of images may be there besides.
        samples: Number of samples according to the index.

    Raises:
        ShardError: If it is no such table, or has other members or another number of samples.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        there, rows = set(file.schema_arrow.names), file.metadata.num_rows
        extensions = [*sorted(members), *(image for image in IMAGES if there & {*_places(image)})]
        wanted = ["key", *(column for extension in extensions for column in _places(extension))]
        columns = file.read(wanted, use_threads=False) if there == {*wanted, "record"} and rows == samples else None
    except (OSError, pa.ArrowException) as error:
        raise ShardError(f"{name} cannot be read ({_short(error)}); `videoalign shards index` makes it anew") from None
    if columns is None:
        raise ShardError(
            f"{name} is not the table of contents that the index says ({rows} samples, the index says {samples}); "
            "`videoalign shards index` makes it anew"
        )
    return Table(content, columns)
