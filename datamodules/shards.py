"""Sets of samples on disk: WebDataset tar shards and an index that accounts for them.

A set is a folder:

    index.json   format, version, kind, dimensions, what the media are; per shard its name, samples, bytes and sha256
    000000.tar   members KEY.a.mp4 KEY.b.mp4 KEY.json (kind *pairs*) or KEY.mp4 KEY.json (kind *videos*)
    pairs.csv    only in *videos* sets with ratings: the rated pairs, by key

Frames that were decoded once (``videoalign shards encode-frames``) stand as ``.safetensors`` in place of ``.mp4``. In sets
of kind *latents* KEY.safetensors holds the latents of A and B, or of one video, and the embedding of the prompt.
Keys hold no dots. A set is written to a temporary folder and renamed when whole.
"""

import csv
import hashlib
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import webdataset as wds
from webdataset import tariterators

from .. import VideoAlignError
from ..models.files import new_folder, read_json, write_json
from ..models.preference import DIMENSIONS
from .tables import sound_rows

FORMAT, VERSION = "videoalign-shards", 1
Kind = Literal["pairs", "videos", "latents"]
SIDES: dict[str, tuple[str, ...]] = {"pairs": ("a", "b"), "videos": ("",), "latents": ("",)}
"""The media of a sample of each kind, by the part of the member's name before its type."""
_KEY = re.compile(r"[A-Za-z0-9_-]+")
_FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


class ShardError(VideoAlignError):
    """A damaged or foreign set; the message names the shard and key."""


@dataclass(frozen=True)
class Shard:
    """One tar file as the index records it."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass
class Index:
    """What ``index.json`` says."""

    kind: Kind
    dimensions: list[str] = field(default_factory=lambda: list(DIMENSIONS))
    media: str = "mp4"
    """Type of the video members: ``mp4``, or ``safetensors`` for decoded frames."""
    frames: dict | None = None
    """Sampling and patch factor of decoded frames."""
    latents: dict | None = None
    """What latents were made with: the generator's identity, frames and size, and whether of pairs or videos."""
    shards: list[Shard] = field(default_factory=list)
    tables: dict[str, str] = field(default_factory=dict)
    """sha256 of further files of the set, by name."""

    @property
    def samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    def check(self) -> None:
        """Refuse an index that is well-formed JSON, but means nothing.

        Raises:
            ValueError: with the reason.
        """
        names = [shard.name for shard in self.shards] + list(self.tables)
        if self.kind not in SIDES or self.media not in ("mp4", "safetensors"):
            raise ValueError(f"kind {self.kind!r} or media {self.media!r} is unknown")
        if not isinstance(self.tables, dict) or not all(isinstance(name, str) for name in names):
            raise ValueError("shards and tables must have names")
        if not all(type(n) is int and n >= 0 for shard in self.shards for n in (shard.samples, shard.bytes)):
            raise ValueError("samples and bytes must be numbers from 0")

    def save(self, folder: Path) -> None:
        """Write ``index.json``."""
        write_json(folder / "index.json", {"format": FORMAT, "version": VERSION, **asdict(self)})

    def members(self) -> set[str]:
        """Extensions that every sample has, such as ``{"a.mp4", "b.mp4", "json"}``."""
        return {f"{side}.{self.media}".lstrip(".") for side in SIDES[self.kind]} | {"json"}


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ShardWriter:
    """Writes a set; it appears under its name when the block ends well, otherwise nothing stays.

    Args:
        out: folder to make. kind: of the samples. media, frames: see :class:`Index`.
        per_shard: most samples in a tar file. shard_bytes: a tar file is closed once it reaches this size.
    """

    def __init__(
        self, out: str | Path, kind: Kind, media: str = "mp4", frames: dict | None = None, per_shard: int = 512,
        shard_bytes: float = 1e9,
    ) -> None:  # fmt: skip
        self.index = Index(kind, media=media, frames=frames)
        self._folder = new_folder(out)
        self._limits = {"maxcount": per_shard, "maxsize": shard_bytes}
        self._keys: set[str] = set()

    def __enter__(self) -> Self:
        self.path = self._folder.__enter__()
        # mtime fixed: the same samples make the same bytes
        self._tar = wds.ShardWriter(
            str(self.path / "%06d.tar"), verbose=0, mtime=0, encoder=False, post=self._closed, **self._limits
        )
        self._written = 0
        return self

    def _closed(self, name: str) -> None:
        path, count = Path(name), len(self._keys) - self._written
        self._written = len(self._keys)
        if count:
            self.index.shards.append(Shard(path.name, count, path.stat().st_size, sha256(path)))
        else:
            path.unlink()

    def write(self, key: str, videos: Mapping[str, bytes], record: dict) -> None:
        """Add a sample.

        Args:
            key: unique, of letters, digits, ``-`` and ``_``. videos: content by side (``a`` and ``b``, or ``""``).
            record: becomes ``KEY.json``.
        """
        if not _KEY.fullmatch(key):
            raise ShardError(f"key {key!r}: only letters, digits, - and _ may occur in a key")
        if key in self._keys:
            raise ShardError(f"key {key!r} was written already; every key occurs once")
        members = {f"{side}.{self.index.media}".lstrip("."): content for side, content in videos.items()}
        members["json"] = json.dumps(record, ensure_ascii=False).encode()
        if members.keys() != self.index.members():
            raise ShardError(
                f"key {key!r} has members {sorted(members)}, but {self.index.kind} need {sorted(self.index.members())}"
            )
        self._tar.write({"__key__": key, **members})
        self._keys.add(key)

    def write_table(self, name: str, rows: list[dict]) -> None:
        """Add a CSV file to the set, its columns those of the first row."""
        if not rows:
            raise ShardError(f"{name} would have no rows")
        with open(self.path / name, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        self.index.tables[name] = sha256(self.path / name)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._tar.close()
            if error is None:
                if not self._keys:
                    raise ShardError("no sample was written, so there is no set to make")
                self.index.save(self.path)
        except BaseException as failure:
            self._folder.__exit__(type(failure), failure, failure.__traceback__)
            raise
        self._folder.__exit__(kind, error, trace)


class ShardSet:
    """A set on disk, opened and checked against its index as far as sizes tell.

    Args:
        path: the folder. kind: what it must hold, if given.
        check_sizes: refuse a set whose files have other sizes than the index says.
    """

    def __init__(self, path: str | Path, kind: Kind | None = None, check_sizes: bool = True) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ShardError(f"{self.path}: there is no such folder of shards")
        record = read_json(self.path / "index.json", "a folder of shards")
        try:
            found = record.pop("format", None), record.pop("version", None)
            if found != (FORMAT, VERSION):
                raise ShardError(
                    f"{self.path}: index.json is of format {found}, this release reads {(FORMAT, VERSION)}"
                )
            self.index = Index(**{**record, "shards": [Shard(**shard) for shard in record["shards"]]})
            self.index.check()
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ShardError(f"{self.path / 'index.json'} is no index of shards ({error})") from None
        if kind and self.index.kind != kind:
            raise ShardError(f"{self.path} holds {self.index.kind}, but {kind} are needed here")
        if check_sizes and (problems := self.size_problems()):
            raise ShardError(f"{self.path}: {problems[0]}. `videoalign shards verify {self.path}` lists all damage")

    def size_problems(self) -> list[str]:
        """Shards that are missing, misplaced or of another size than the index says."""
        names = [shard.name for shard in self.index.shards]
        problems = [
            f"{name} is listed {names.count(name)} times" for name in sorted(set(names)) if names.count(name) > 1
        ]
        problems += [f"{name}: a table must be a plain file in the set's folder"
                     for name in self.index.tables if not _FILE.fullmatch(name)]  # fmt: skip
        for shard in self.index.shards:
            path = self.path / shard.name
            if not _FILE.fullmatch(shard.name) or path.is_symlink():
                problems.append(f"{shard.name}: a shard must be a plain file in the set's folder")
            elif not path.is_file():
                problems.append(f"{shard.name} is missing")
            elif path.stat().st_size != shard.bytes:
                problems.append(
                    f"{shard.name} has {path.stat().st_size} bytes, the index says {shard.bytes}: it was cut short or changed"
                )
        return problems

    def read(self, shard: Shard, start: int = 0, stop: int | None = None) -> Iterator["RawSample"]:
        """Undecoded samples of one shard in order, from number ``start`` to before ``stop``.

        Raises:
            ShardError: where the shard is not what the index says.
        """
        stop = shard.samples if stop is None else stop
        held: RawSample | None = None  # the last sample is handed out once the shard's end is known to be sound
        for count, sample in enumerate(self._grouped(shard)):
            if count >= stop:
                if stop == shard.samples:
                    raise ShardError(f"{shard.name} holds more samples than the {shard.samples} that the index says")
                break
            if held:
                yield held
                held = None
            if start <= count:
                held = sample
        if held:
            yield held

    def _grouped(self, shard: Shard) -> Iterator["RawSample"]:
        """All samples of a shard, checked against the index."""
        members, keys = self.index.members(), set()
        try:
            with open(self.path / shard.name, "rb") as file:
                files = ({**m, "__url__": shard.name} for m in tariterators.tar_file_iterator(file))
                for sample in tariterators.group_by_keys(files):
                    key = sample.pop("__key__")
                    sample.pop("__url__")
                    if not _KEY.fullmatch(key):
                        raise ShardError(f"{shard.name}: member name {key!r} is not a plain key")
                    if key in keys:
                        raise ShardError(f"{shard.name}: key {key!r} occurs twice")
                    if sample.keys() != members:
                        raise ShardError(
                            f"{shard.name}, key {key!r}: has members {sorted(sample)}, needs {sorted(members)}"
                        )
                    keys.add(key)
                    yield RawSample(key, shard.name, sample)
        except (OSError, tarfile.TarError, ValueError) as error:
            raise ShardError(
                f"{shard.name} cannot be read past sample {len(keys)} ({str(error).splitlines()[0]})"
            ) from None
        if len(keys) != shard.samples:
            raise ShardError(f"{shard.name} holds {len(keys)} samples, the index says {shard.samples}")

    def __iter__(self) -> Iterator["RawSample"]:
        for shard in self.index.shards:
            yield from self.read(shard)

    def contents(self) -> Iterator["Content"]:
        """Where every sample stands, and its record; reads tables of contents and records, no media.

        Raises:
            ShardError: where a shard is not what the index says.
        """
        keys: set[str] = set()
        for shard in self.index.shards:
            path, found = self.path / shard.name, {}
            try:
                with tarfile.open(path) as tar:
                    for member in tar:
                        key, _, extension = member.name.partition(".")
                        sample = found.setdefault(key, Content(key, path))
                        if extension == "json":
                            content = tar.extractfile(member).read()
                            sample.record = RawSample(key, shard.name, {"json": content}).record()
                        sample.spans[extension] = (member.offset_data, member.size)
            except (OSError, tarfile.TarError, AttributeError) as error:
                raise ShardError(f"{path} cannot be read ({str(error).splitlines()[0]})") from None
            whole = all(sample.spans.keys() == self.index.members() for sample in found.values())
            if not whole or len(found) != shard.samples or keys & found.keys():
                raise ShardError(
                    f"{path} does not hold what the index says. `videoalign shards verify {self.path}` lists all damage"
                )
            keys |= found.keys()
            yield from found.values()

    def table(self, name: str) -> list[dict[str, str]]:
        """Rows of one of the set's CSV files."""
        if not (self.path / name).exists():
            raise ShardError(f"{self.path} has no {name}: it holds videos, but no rated pairs of them")
        return [row for _, row in sound_rows(self.path / name)]


class Kept:
    """Some samples of a set, as a :class:`~videoalign.datamodules.stream.ShardStream` reads them; nothing else is read.

    Args:
        shards: the set. contents: what is kept of it, in the order of :meth:`ShardSet.contents`.
    """

    def __init__(self, shards: ShardSet, contents: Iterable["Content"]) -> None:
        self.path = shards.path
        self.of_shard: dict[str, list[Content]] = {}
        for content in contents:
            self.of_shard.setdefault(content.path.name, []).append(content)
        kept = [replace(s, samples=len(self.of_shard[s.name])) for s in shards.index.shards if s.name in self.of_shard]
        self.index = replace(shards.index, shards=kept)

    def read(self, shard: Shard, start: int = 0, stop: int | None = None) -> Iterator["RawSample"]:
        """Kept samples of one shard, from number ``start`` to before ``stop``."""
        for content in self.of_shard[shard.name][start:stop]:
            try:
                members = {extension: content.read(extension) for extension in content.spans}
            except OSError as error:
                raise ShardError(f"{content.name} cannot be read ({error})") from None
            yield RawSample(content.key, shard.name, members)


@dataclass
class Content:
    """Where a sample stands.

    Attributes:
        path: of the shard. record: its JSON. spans: first byte and size in the shard, by extension.
    """

    key: str
    path: Path
    record: dict = field(default_factory=dict)
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.path.name}, key {self.key!r}"

    def read(self, extension: str) -> bytes:
        """One member's content."""
        start, size = self.spans[extension]
        with open(self.path, "rb") as file:
            file.seek(start)
            return file.read(size)


@dataclass
class RawSample:
    """A sample as it stands on disk.

    Attributes:
        key: its key. shard: where it is. members: content by extension.
    """

    key: str
    shard: str
    members: dict[str, bytes]

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.shard}, key {self.key!r}"

    def record(self) -> dict:
        """The JSON member."""
        try:
            record = json.loads(self.members["json"])
            if not isinstance(record, dict):
                raise ValueError("not an object")
            return record
        except ValueError as error:
            raise ShardError(f"{self.name}: its .json is not valid ({error})") from None
