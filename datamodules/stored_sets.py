"""One set where it lies, in a folder or in a store, and the index of several that are read as one."""

import hashlib
import stat
from collections.abc import Iterator, Sequence
from functools import partial

from . import byte_cache
from .attempts import StoreError
from .contents import ShardError, Table, packed, read_table, table_name, walk
from .set_index import INDEX, PLAIN, WHAT, Index, Shard
from .stores import LocalStore, Store, StoredFile, together


class StoredSet:
    """A set in one place.

    Args:
        store: Where it lies.

    Raises:
        ShardError: If there is no such set, or its index is damaged.
        StoreError: If a store does not give the index.
    """

    def __init__(self, store: Store) -> None:
        self.store, self.name = store, store.name
        if isinstance(store, LocalStore) and not store.path.is_dir():
            raise ShardError(f"{self.name}: there is no such folder of shards")
        self.content = store.small(INDEX, WHAT)  # always anew: it says which other files are the right ones
        self.index, self.digest = Index.parse(self.content, self.name), hashlib.sha256(self.content).hexdigest()

    def size_problems(self) -> list[str]:
        """Messages on shards that are missing, misplaced or of another size than the index says.

        Sizes in a remote store are not looked at: that would take a request for each shard, and reading tells as well.
        """
        problems = self.index.name_problems()
        if isinstance(self.store, LocalStore):
            bad = {problem.partition(":")[0] for problem in problems}
            problems += [text for shard in self.index.shards if shard.name not in bad and (text := self._size(shard))]
        return problems

    def _size(self, shard: Shard) -> str | None:
        try:
            info = (self.store.path / shard.name).lstat()
        except OSError:
            return f"{shard.name} is missing"
        if stat.S_ISLNK(info.st_mode):
            return PLAIN.format(name=shard.name)
        if not stat.S_ISREG(info.st_mode):
            return f"{shard.name} is missing"
        if info.st_size != shard.bytes:
            sizes = f"{info.st_size} bytes, the index says {shard.bytes}"
            return f"{shard.name} has {sizes}: it was cut short or changed"
        return None

    def has(self, name: str) -> bool:
        """Whether the set has a further file; a remote one, whether the index lists it."""
        return self.store.has(name) if isinstance(self.store, LocalStore) else name in self.index.tables

    def files(self, prefix: str = "") -> list[StoredFile]:
        """The shards.

        Args:
            prefix: Name of the set in messages, where several are read as one.
        """
        label = f"{prefix}/" if prefix else ""
        return [StoredFile(self.store, shard.name, shard.sha256, f"{label}{shard.name}") for shard in self.index.shards]

    def tables(self) -> list[Table]:
        """The tables of contents of all shards.

        Raises:
            ShardError: If one is missing or differs from the index.
            StoreError: If a store does not give one.
        """
        if self.store.remote and any(shard.contents is None for shard in self.index.shards):
            raise ShardError(
                f"{self.name} is of format version 1, without tables of contents, so every shard would be read to open "
                f"it. Call `videoalign shards copy {self.name} FOLDER` and `videoalign shards index FOLDER`"
            )
        try:
            if not self.store.remote:
                return list(together(self._table, self.index.shards))
            with byte_cache.cache().alone(self.digest):  # other processes of a run then find them in the cache
                return list(together(self._table, self.index.shards))
        except ShardError as error:
            raise ShardError(f"{self.name}: {error}. `videoalign shards verify {self.name}` lists all damage") from None

    def _table(self, shard: Shard) -> Table:
        members, name = self.index.members(), table_name(shard.name)
        if shard.contents is None:
            table = walk(self.store.path / shard.name, members, checksums=False)
            if len(table) != shard.samples:
                raise ShardError(f"{shard.name} holds {len(table)} samples, the index says {shard.samples}")
            return read_table(packed(table), name, members, shard.samples)
        content = self.small(name, shard.contents)
        if content is None:
            raise ShardError(
                f"{name}, the table of contents of {shard.name}, is missing; `videoalign shards index` makes it anew"
            )
        if not is_content(shard.contents, content):
            raise ShardError(f"{name} is not the table of contents that was written for {shard.name} (another sha256)")
        return read_table(content, name, members, shard.samples)

    def small(self, name: str, digest: str) -> bytes | None:
        """Content of a small file, which may be damaged; None where it is missing.

        Args:
            name: Name of the file.
            digest: Hex sha256 that it should have.

        Raises:
            ShardError: If a local file cannot be read.
            StoreError: If a store does not give it for another reason than that it is missing.
        """
        try:
            return StoredFile(self.store, name, digest).read(0, None, partial(is_content, digest))
        except StoreError as error:
            if error.missing:
                return None
            raise
        except (FileNotFoundError, IsADirectoryError):
            return None
        except OSError as error:
            raise ShardError(f"{name} cannot be read ({error})") from None

    def file(self, name: str) -> bytes:
        """Content of a further file of the set.

        Args:
            name: Name of the file.

        Raises:
            ShardError: If there is no such file, or a remote one is damaged. A local one is returned as it is, because
                a table of pairs may be edited by hand; `videoalign shards verify` tells.
        """
        digest = self.index.tables.get(name, "")
        content = self.small(name, digest) if self.has(name) else None
        if content is None:
            raise ShardError(f"{self.name}/{name} is missing")
        if self.store.remote and not is_content(digest, content):
            raise ShardError(f"{self.name}/{name} is not the file that was written (another sha256)")
        return content


def is_content(digest: str, content: bytes) -> bool:
    """Whether bytes have a SHA-256 checksum, given as hexadecimal digits."""
    return hashlib.sha256(content).hexdigest() == digest


def joined_index(parts: Sequence[StoredSet], name: str) -> Index:
    """The index of sets that are read as one.

    Args:
        parts: The sets.
        name: What to call them in messages.

    Raises:
        ShardError: If they differ in more than their samples.
    """
    first = parts[0].index
    if len(parts) == 1:
        return first
    for part in parts[1:]:
        if why := next(_differences(first, part.index), None):
            raise ShardError(f"{name}: {parts[0].name} and {part.name} cannot be read as one: {why}")
    shards = [shard for part in parts for shard in part.index.shards]
    return Index(first.kind, first.dimensions, first.media, first.frames, first.latents, shards, first.tables)


def _differences(first: Index, other: Index) -> Iterator[str]:
    for field in ("kind", "dimensions", "media", "frames", "latents"):
        if (a := getattr(first, field)) != (b := getattr(other, field)):
            yield f"their {field} differ: {a}, {b}"
    if lacking := set(first.tables) ^ set(other.tables):
        yield f"only one has {', '.join(sorted(lacking))}"
    for table in sorted(set(first.tables) & set(other.tables)):
        if not table.endswith(".csv") and first.tables[table] != other.tables[table]:
            yield f"their {table} differ"
