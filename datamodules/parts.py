"""Sets that several processes write, each its own shards; an interrupted run continues with the shards that it closed.

While it grows, a set is a folder ``.NAME.parts`` beside its final place: closed tar files, each with a JSON file of its
keys, and ``making.json`` with the settings that the samples depend on. When all samples are written, the first process
writes the index and gives the folder its name.
"""

import contextlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import webdataset as wds

from .. import VideoAlignError
from ..models.files import check_free, read_json, settle, sweep, write_bytes, write_json
from ..models.locks import Hold, beside, explained, held, real
from ..models.renames import sync, take_name
from .contents import ShardError, misfit
from .shards import Index, Shard, sha256

MAKING = "making.json"
LATER = frozenset({"weights"})
"""Entries of the settings that earlier releases did not write: their parts are gone on with."""


class Parts:
    """A set under construction.

    One run at a time works on it. The first process holds the name of the set from :meth:`begin` to :meth:`release`;
    every writer holds its own part, because a process may outlive the first one of its run.

    Args:
        out: Folder to write.
        index: Kind and media of the set.
        making: Settings that the samples depend on; parts that were written with others are refused.
        expected: Number of samples of the set, unusable ones included.
    """

    def __init__(self, out: str | Path, index: Index, making: dict[str, Any], expected: int) -> None:
        self.out, self.place, self.index, self.expected = Path(out), real(out), index, expected
        self.making = json.loads(json.dumps(making))
        self.folder = beside(self.place, "parts")
        self._name = Hold()

    def begin(self) -> None:
        """Create the folder, or check that an existing one was begun with the same settings. First process only.

        Raises:
            VideoAlignError: If another run works on the set, began it with other settings, or its name is taken.
        """
        self._name.take(self.out)
        check_free(self.out)
        self._empty = self.place.is_dir()
        sweep(self.place.parent)
        for part in self.folder.glob(".r*.lock"):  # of processes that outlived the first one of their run
            with held(part.with_name(part.name.removeprefix(".").removesuffix(".lock"))):
                pass
        if not self._closed():  # nothing is there that other settings have made, but what a refused run left
            write_json(self.folder / MAKING, self.making)
        found = read_json(self.folder / MAKING, "a set under construction")
        found = {name: self.making[name] for name in LATER & self.making.keys()} | found
        if different := _different(found, self.making):
            raise VideoAlignError(
                f"{self.folder} holds parts of another run ({', '.join(different)} differ). "
                "Finish that one, or remove the folder."
            )

    def release(self) -> None:
        """Let other runs work on the set. First process only."""
        self._name.drop()

    def _closed(self) -> list[Path]:
        return sorted(self.folder.glob("r*-*.json"))

    def done(self) -> set[str]:
        """Keys of the samples in closed shards."""
        return {key for path in self._closed() for key in read_json(path, "a part")["keys"]}

    def writer(self, rank: int, per_shard: int = 64) -> "PartWriter":
        """The writer of one process.

        Args:
            rank: Rank of the process.
            per_shard: Number of samples after which a shard is closed.
        """
        return PartWriter(self, rank, per_shard)

    def finish(self, files: dict[str, bytes] | None = None, dropped: int = 0) -> None:
        """Join the parts to a set. First process only, after all writers have closed.

        Args:
            files: Content of further files of the set, by name.
            dropped: Number of samples that could not be used.

        Raises:
            ShardError: If samples are missing.
            VideoAlignError: If the name of the set was taken in the meantime.
        """
        closed = self._closed()
        if not closed:
            raise ShardError("no sample was written, so there is no set to make")
        if (count := len(self.done())) + dropped != self.expected:
            raise ShardError(
                f"{count} samples were written and {dropped} left out, but {self.expected} were asked for; "
                f"{self.folder} keeps the parts"
            )
        whole = {path.with_suffix(".tar") for path in closed}
        for left in [path for path in self.folder.glob("*.tar") if path not in whole]:
            left.unlink()  # it was closed without its keys, so its samples were written again
            left.with_suffix(".parquet").unlink(missing_ok=True)
        for path in closed:
            self.index.shards.append(Shard(**read_json(path, "a part")["shard"]))
        for name, content in (files or {}).items():
            write_bytes(self.folder / name, content)
            self.index.tables[name] = sha256(self.folder / name)
        self.index.save(self.folder)
        with explained(self.out):
            settle(self.folder)
            try:
                take_name(self.folder, self.place, self._empty)
            except FileExistsError:
                raise VideoAlignError(
                    f"output {self.out}: something has appeared there while it was being made, and is left as it is. "
                    f"Move it away and call the command again; {self.folder} keeps all parts"
                ) from None
            sync(self.place.parent)
        # the set is complete now; the rest only tidies up
        for path in [*(self.out / path.name for path in closed), *self.out.glob(".*"), self.out / MAKING]:
            path.unlink()


def _different(found: dict[str, Any], making: dict[str, Any]) -> list[str]:
    """Names of the entries that differ; of entries of `weights`, also whose they are."""
    names = sorted(k for k in {*found, *making} if found.get(k) != making.get(k))
    if "weights" in names:
        ours, theirs = making.get("weights", {}), found.get("weights", {})
        whose = sorted(k for k in {*ours, *theirs} if ours.get(k) != theirs.get(k))
        names[names.index("weights")] = f"weights of {' and '.join(whose)}"
    return names


class PartWriter:
    """Writes the shards of one process; an interruption costs no sample of a closed shard.

    Args:
        parts: The set under construction.
        rank: Rank of the process.
        per_shard: Number of samples after which a shard is closed.
    """

    def __init__(self, parts: Parts, rank: int, per_shard: int) -> None:
        self.parts, self.rank, self.per_shard = parts, rank, per_shard
        self._lock = Hold()
        self._lock.take(parts.folder / f"r{rank:04d}", every=True)
        self.number = len(list(parts.folder.glob(f"r{rank:04d}-*.json")))
        self.keys: list[str] = []
        self.tar: wds.TarWriter | None = None

    @property
    def _open_path(self) -> Path:
        return self.parts.folder / f".r{self.rank:04d}.open"

    def write(self, key: str, members: dict[str, bytes], record: dict) -> None:
        """Add a sample.

        Args:
            key: Key of the sample.
            members: Content by extension.
            record: Content of ``KEY.json``.
        """
        members = {**members, "json": json.dumps(record, ensure_ascii=False).encode()}
        if why := misfit(members, self.parts.index.members()):
            raise ShardError(f"key {key!r} {why}")
        if self.tar is None:
            self._file = open(self._open_path, "wb")
            self.tar = wds.TarWriter(self._file, encoder=False, mtime=0)
        try:
            self.tar.write({"__key__": key, **members})
        except BaseException:  # a full disk, a signal: the shard may end in half a sample
            self._give_up()
            raise
        self.keys.append(key)
        if len(self.keys) >= self.per_shard:
            self._end_shard()

    def _end_shard(self) -> None:
        if self.tar is None:
            return
        try:
            self.tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except BaseException:
            self._give_up()
            raise
        path = self.parts.folder / f"r{self.rank:04d}-{self.number:05d}.tar"
        self._open_path.rename(path)
        shard = Shard.closed(path, self.parts.index.members())
        write_json(path.with_suffix(".json"), {"keys": self.keys, "shard": asdict(shard)})
        self.number, self.keys, self.tar = self.number + 1, [], None

    def _give_up(self) -> None:
        """Remove the open shard; the next run writes its samples again."""
        tar, self.tar, self.keys = self.tar, None, []
        with contextlib.suppress(OSError), self._file:
            tar.close()
        self._open_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the current shard and release the part."""
        try:
            self._end_shard()
        finally:
            self._lock.drop()
