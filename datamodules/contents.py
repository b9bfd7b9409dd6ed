"""Tables of contents: the place of every sample of a set, its record, and a checksum of each of its files.

Beside each shard ``000000.tar`` is a file ``000000.parquet`` with a row per sample: its key, its record (the text of
``KEY.json``), and for every member, such as ``a.mp4``, its offset in the shard, its size and its CRC-32C. With it a set
opens without walking through its shards, any sample can be read alone, and a flipped bit is noticed when it is read.
"""

import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .. import VideoAlignError

_KEY = re.compile(r"[A-Za-z0-9_-]+")


class ShardError(VideoAlignError):
    """A damaged or foreign set; the message names the shard and key."""


def is_key(key: str) -> bool:
    """Whether a text may be the key of a sample: letters, digits, ``-`` and ``_``, no dots."""
    return bool(_KEY.fullmatch(key))


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
        record = json.loads(text)
        if not isinstance(record, dict):
            raise ValueError("not an object")
        return record
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{name}: its .json is not valid ({error})") from None


@dataclass
class Content:
    """One sample of a table of contents; its media stay on disk until :meth:`read`.

    Attributes:
        key: Key of the sample.
        path: Path of the shard that holds it.
        text: Its record, as JSON text.
        spans: Bytes of its members in the shard, by extension.
    """

    key: str
    path: Path
    text: str
    spans: dict[str, Span]

    @property
    def name(self) -> str:
        """What to call the sample in messages."""
        return f"{self.path.name}, key {self.key!r}"

    @cached_property
    def record(self) -> dict:
        """The parsed JSON member."""
        return parse_record(self.text, self.name)

    def read(self, *extensions: str) -> bytes | list[bytes]:
        """Content of one member, or a list for several, compared with their checksums.

        Args:
            *extensions: Extensions of the members.

        Raises:
            ShardError: If a member cannot be read, or has another checksum.
        """
        contents = []
        try:
            with open(self.path, "rb") as file:
                for extension in extensions:
                    span = self.spans[extension]
                    file.seek(span.start)
                    contents.append(content := file.read(span.size))
                    changed = span.crc32c >= 0 and google_crc32c.value(content) != span.crc32c
                    if changed or len(content) != span.size:
                        raise ShardError(
                            f"{self.name}, {extension}: its bytes are not those that were written (another checksum); "
                            f"the file is damaged. `videoalign shards verify {self.path.parent}` lists all damage"
                        )
        except OSError as error:
            raise ShardError(f"{self.name} cannot be read ({error})") from None
        return contents[0] if len(extensions) == 1 else contents

    def raw(self) -> RawSample:
        """The sample with all of its members."""
        extensions = tuple(self.spans)
        return RawSample(self.key, self.path.name, dict(zip(extensions, self.read(*extensions))))


class Contents(Sequence[Content]):
    """The samples of a set, in order: a table in a few arrays, so that a million of them take little memory.

    Args:
        paths: Paths of the shards.
        counts: Number of samples in each shard.
        table: Table with a row per sample, as described at the top of this module.
    """

    def __init__(self, paths: Sequence[Path], counts: Sequence[int], table: pa.Table) -> None:
        self.paths = list(paths)
        self.shard = np.repeat(np.arange(len(paths), dtype=np.int32), counts)  # (N,)
        table = table.combine_chunks()
        self.extensions = [n.removesuffix(".start") for n in table.column_names if n.endswith(".start")]
        self._keys, self._texts = _one(table["key"]), _one(table["record"])
        self._spans = {
            e: np.stack([table[f"{e}.{part}"].to_numpy() for part in ("start", "size", "crc32c")], 1)
            for e in self.extensions
        }  # (N, 3) each

    def __len__(self) -> int:
        return len(self.shard)

    def __getitem__(self, number: int) -> Content:
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        number %= len(self)
        spans = {e: Span(*map(int, rows[number])) for e, rows in self._spans.items()}
        return Content(self._keys[number].as_py(), self.paths[self.shard[number]], self._texts[number].as_py(), spans)

    def keys(self) -> list[str]:
        """Keys of all samples, in order."""
        return self._keys.to_pylist()

    def take(self, numbers: Sequence[int]) -> "Contents":
        """A table of contents of the samples with these numbers."""
        part, chosen = object.__new__(Contents), np.asarray(numbers, dtype=np.int64)
        part.paths, part.extensions, part.shard = self.paths, self.extensions, self.shard[chosen]
        part._keys, part._texts = self._keys.take(pa.array(chosen)), self._texts.take(pa.array(chosen))
        part._spans = {e: rows[chosen] for e, rows in self._spans.items()}
        return part

    def repeated(self) -> str | None:
        """The key that occurs most often, if one occurs more than once."""
        values = self._keys.value_counts()
        counts = values.field("counts").to_numpy()
        return values.field("values")[int(counts.argmax())].as_py() if len(counts) and counts.max() > 1 else None


def _one(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


def walk(path: Path, members: Iterable[str], checksums: bool = True) -> pa.Table:
    """Compute the table of contents of a shard from its tar file.

    Args:
        path: Path of the tar file.
        members: Extensions that every sample has.
        checksums: Read every byte for the CRC-32C; otherwise it is -1.

    Raises:
        ShardError: If the tar file is damaged, if a member is no plain file, or if a sample lacks members, occurs twice
            or lies apart from its other members.
    """
    rows: dict[str, dict] = {}
    last = None
    try:
        with tarfile.open(path) as tar:
            for member, content in _plain_files(tar, path, checksums):
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
        raise ShardError(f"{path.name} cannot be read past sample {len(rows)} ({_short(error)})") from None
    members = sorted(members)
    for key, row in rows.items():
        if (have := sorted(row.keys() - {"record"})) != members:
            raise ShardError(f"{path.name}, key {key!r}: has members {have}, needs {members}")
    columns: dict[str, pa.Array] = {"key": pa.array(list(rows), pa.string())}
    for e in members:
        for place, part in enumerate(("start", "size", "crc32c")):
            columns[f"{e}.{part}"] = pa.array([row[e][place] for row in rows.values()], pa.int64())
    columns["record"] = pa.array([row["record"] for row in rows.values()], pa.large_string())
    return pa.table(columns)


def _text(content: bytes, name: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ShardError(f"{name}: its .json is not valid ({error})") from None


def _plain_files(tar: tarfile.TarFile, path: Path, contents: bool) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Members with their contents; of the records alone unless ``contents`` is set, else empty."""
    for member in tar:
        if not member.isreg():
            raise ShardError(f"{path.name}: member {member.name!r} is no regular file")
        read = contents or member.name.endswith(".json")
        content = tar.extractfile(member).read() if read else b""
        if read and len(content) != member.size:
            raise ShardError(f"{path.name}: member {member.name!r} is cut short")
        yield member, content


def _short(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table of contents as Parquet."""
    with open(path, "wb") as file:  # arrow would take a name for an address
        pq.write_table(table, file, compression="zstd")


def read_table(path: Path, members: Iterable[str], samples: int) -> pa.Table:
    """Read a table of contents.

    Args:
        path: Path of the Parquet file.
        members: Extensions that every sample has.
        samples: Number of samples according to the index.

    Raises:
        ShardError: If the file is no such table, or has other members or another number of samples.
    """
    wanted = {"key", "record", *(f"{e}.{part}" for e in members for part in ("start", "size", "crc32c"))}
    try:
        # an open file, because arrow would take a name for an address (`s3:x`), and a folder like `lr=1` for a column
        with open(path, "rb") as file:
            table = pq.ParquetFile(file).read(use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise ShardError(
            f"{path.name} cannot be read ({_short(error)}); `videoalign shards index` makes it anew"
        ) from None
    if set(table.column_names) != wanted or len(table) != samples:
        raise ShardError(
            f"{path.name} is not the table of contents that the index says ({len(table)} samples, the index says "
            f"{samples}); `videoalign shards index` makes it anew"
        )
    return table


def joined(tables: Sequence[pa.Table]) -> pa.Table:
    """The tables of several shards as one table, in order."""
    return pa.concat_tables(tables)
