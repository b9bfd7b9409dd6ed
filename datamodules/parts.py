"""Sets that several processes write, each its own shards, and that an interrupted run goes on with.

While it grows, a set stands as ``.NAME.parts`` beside where it will be: closed tar files, each with a JSON of its keys,
and ``making.json``, which says what it is made of. When all is written, the first process writes the index and gives the
folder its name.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import webdataset as wds

from .. import VideoAlignError
from ..models.files import check_free, read_json, write_json
from .shards import Index, Shard, ShardError, sha256

MAKING = "making.json"


class Parts:
    """A set under construction.

    Args:
        out: folder to make. index: kind and media of the set. making: what the samples depend on; parts that were made
            otherwise are refused. expected: samples that it will have, but for those that could not be used.
    """

    def __init__(self, out: str | Path, index: Index, making: dict[str, Any], expected: int) -> None:
        self.out, self.index, self.expected = Path(out), index, expected
        self.making = json.loads(json.dumps(making))
        self.folder = self.out.parent / f".{self.out.name}.parts"

    def begin(self) -> None:
        """Make the folder, or check that the one that is there was made of the same. First process only."""
        check_free(self.out)
        if not (self.folder / MAKING).exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / MAKING, self.making)
        found = read_json(self.folder / MAKING, "a set under construction")
        if different := sorted(k for k in {*found, *self.making} if found.get(k) != self.making.get(k)):
            raise VideoAlignError(
                f"{self.folder} holds parts of another run ({', '.join(different)} differ). Finish that one, or remove the folder."
            )

    def _closed(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("*.json") if path.name != MAKING)

    def done(self) -> set[str]:
        """Keys that are written."""
        return {key for path in self._closed() for key in read_json(path, "a part")["keys"]}

    def writer(self, rank: int, per_shard: int = 64) -> "PartWriter":
        """A writer for one process."""
        return PartWriter(self, rank, per_shard)

    def finish(self, files: dict[str, bytes] | None = None, dropped: int = 0) -> None:
        """Make the set of its parts. First process only, after all have closed.

        Args:
            files: further files of the set, by name. dropped: samples that could not be used.
        """
        closed = self._closed()
        if not closed:
            raise ShardError("no sample was written, so there is no set to make")
        if (count := len(self.done())) + dropped != self.expected:
            raise ShardError(
                f"{count} samples were written and {dropped} left out, but {self.expected} were asked for; {self.folder} keeps the parts"
            )
        whole = {path.with_suffix(".tar") for path in closed}
        for left in [path for path in self.folder.glob("*.tar") if path not in whole]:
            left.unlink()  # closed without its keys: made again by now
            left.with_suffix(".parquet").unlink(missing_ok=True)
        for path in closed:
            self.index.shards.append(Shard(**read_json(path, "a part")["shard"]))
        for name, content in (files or {}).items():
            (self.folder / name).write_bytes(content)
            self.index.tables[name] = sha256(self.folder / name)
        self.index.save(self.folder)
        if self.out.exists():
            self.out.rmdir()  # empty, or begin would have refused it
        self.folder.rename(self.out)  # from here on it is whole; what follows only tidies up
        for path in [*(self.out / path.name for path in closed), *self.out.glob(".*"), self.out / MAKING]:
            path.unlink()


class PartWriter:
    """One process's shards of a set; each is closed after ``per_shard`` samples, and counts from then on."""

    def __init__(self, parts: Parts, rank: int, per_shard: int) -> None:
        self.parts, self.rank, self.per_shard = parts, rank, per_shard
        self.number = len(list(parts.folder.glob(f"r{rank:04d}-*.json")))
        self.keys: list[str] = []
        self.tar: wds.TarWriter | None = None

    @property
    def _open_path(self) -> Path:
        return self.parts.folder / f".r{self.rank:04d}.open"

    def write(self, key: str, members: dict[str, bytes], record: dict) -> None:
        """Add a sample: members by extension, and its record."""
        if self.tar is None:
            self.tar = wds.TarWriter(str(self._open_path), encoder=False, mtime=0)
        members = {**members, "json": json.dumps(record, ensure_ascii=False).encode()}
        if members.keys() != self.parts.index.members():
            raise ShardError(
                f"key {key!r} has members {sorted(members)}, but needs {sorted(self.parts.index.members())}"
            )
        self.tar.write({"__key__": key, **members})
        self.keys.append(key)
        if len(self.keys) >= self.per_shard:
            self.close()

    def close(self) -> None:
        """Close the current shard."""
        if self.tar is None:
            return
        self.tar.close()
        path = self.parts.folder / f"r{self.rank:04d}-{self.number:05d}.tar"
        self._open_path.rename(path)
        shard = Shard.closed(path, self.parts.index.members())
        write_json(path.with_suffix(".json"), {"keys": self.keys, "shard": asdict(shard)})
        self.number, self.keys, self.tar = self.number + 1, [], None
