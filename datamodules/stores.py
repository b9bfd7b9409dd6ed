"""Stores: where the files of a set lie. A local folder and an object store give the same bytes by the same calls.

A store gives ranges of bytes. From a remote one they come in one request each, at most :data:`.addresses.THREADS` at
once, repeated where that may help (:mod:`.attempts`), and through a bounded cache on local disk (:mod:`.byte_cache`).
fsspec's own caches, read-ahead and retries are off: a request is for one sample and counted once.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from .. import VideoAlignError
from ..models.files import read_bytes
from . import byte_cache
from .addresses import SCHEMES, THREADS, expanded, is_address, scheme_of, shown, url_of
from .attempts import StoreError, attempted, pause, status_of, timeout
from .parallel import in_order

X, Y = TypeVar("X"), TypeVar("Y")
Sound = Callable[[bytes], bool]
"""Whether bytes are those that were written."""

SAME = 3
"""Times that the same wrong bytes must come before the file itself, and not its way here, is taken to be damaged."""
PIECE = 32 << 20
"""Bytes of a request when a whole file is fetched."""
_filesystems: dict[tuple[int, str], Any] = {}
"""File systems of fsspec by process and scheme: one that was made before a fork does not work after it, and closing it
there would disturb the parent's connections."""
_pools: dict[int, ThreadPoolExecutor] = {}


@dataclass(frozen=True)
class LocalStore:
    """A folder of this machine.

    Args:
        path: The folder.
    """

    path: Path
    remote = False

    @property
    def name(self) -> str:
        """What to call it in messages."""
        return str(self.path)

    def fetch(self, file: str, start: int = 0, end: int | None = None, sound: Sound | None = None) -> bytes:
        """Bytes of a file.

        Args:
            file: Name of the file.
            start: Offset of the first byte.
            end: Offset behind the last one; None reads to the end.
            sound: Whether bytes are sound; a local file is read once, whatever it says.

        Raises:
            OSError: If the file cannot be read.
        """
        with open(self.path / file, "rb") as opened:
            opened.seek(start)
            return opened.read() if end is None else opened.read(end - start)

    def small(self, file: str, what: str) -> bytes:
        """Content of a file that must exist.

        Args:
            file: Name of the file.
            what: Kind of the folder, for messages.

        Raises:
            VideoAlignError: If it is missing or cannot be read.
        """
        return read_bytes(self.path / file, what)

    def has(self, file: str) -> bool:
        """Whether there is such a file."""
        return (self.path / file).is_file()

    def names(self) -> set[str] | None:
        """Names of all that is in the folder."""
        return {path.name for path in self.path.iterdir()}

    def save(self, file: str, size: int | None, path: Path) -> None:
        """Copy a file.

        Args:
            file: Name of the file.
            size: Its size in bytes, where it is known; a remote store then gives it in pieces.
            path: Local file to write.
        """
        shutil.copyfile(self.path / file, path)

    @contextlib.contextmanager
    def whole(self, file: str, size: int) -> Iterator[Path]:
        """The path of a file; a temporary copy where the store is remote.

        Args:
            file: Name of the file.
            size: Its size in bytes.
        """
        yield self.path / file


@dataclass(frozen=True)
class RemoteStore:
    """A folder of an object store or a web server.

    Args:
        address: Its address, which may hold credentials.
    """

    address: str = field(repr=False)
    remote = True

    @property
    def name(self) -> str:
        """What to call it in messages: the address without credentials."""
        return shown(self.address)

    def _call(self, file: str, size: int, method: str, *args: Any, **kwargs: Any) -> Any:
        """Make a request about a file, with the attempts that it needs.

        Args:
            file: Name of the file.
            size: Number of bytes that are moved.
            method: Coroutine of fsspec's file system.
            args: Its arguments before the file's address.
            kwargs: Its further arguments.
        """
        from fsspec.asyn import sync

        scheme, url = scheme_of(self.address), url_of(self.address, file)

        def once() -> Any:
            fs = _filesystem(scheme)
            try:
                return sync(fs.loop, getattr(fs, method), *args, url, **kwargs, timeout=timeout(size))
            except Exception as error:
                if method == "_cat_file" and status_of(error)[0] == 416:
                    return b""  # the file ends before the range begins
                raise

        return attempted(once, f"{self.name}/{file}".rstrip("/"), SCHEMES[scheme].remedy)

    def fetch(self, file: str, start: int = 0, end: int | None = None, sound: Sound | None = None) -> bytes:
        """Bytes of a file, in one request.

        Args:
            file: Name of the file.
            start: Offset of the first byte.
            end: Offset behind the last one; None reads to the end.
            sound: Whether bytes are sound. Others are fetched again; if the store gives the same ones
                :data:`SAME` times, they are returned, because they are damaged there.

        Raises:
            StoreError: If they cannot be fetched, or come differently each time.
        """
        came: list[bytes] = []
        while True:
            content = self._call(file, (end or start) - start, "_cat_file", start=start, end=end)
            if end is not None and len(content) > end - start:
                raise StoreError(f"{self.name}/{file}: the server sends whole files, not the ranges that are asked for")
            if (end is None or len(content) == end - start) and (sound is None or sound(content)):
                return content
            came.append(content)
            if came.count(content) == SAME:
                return content
            if len(came) > 2 * SAME:
                raise StoreError(
                    f"{self.name}/{file}: bytes {start} to {end or 'the end'} came {len(came)} times, differently, and "
                    "never as they were written; the network or the store corrupts them"
                )
            pause(len(came))

    def small(self, file: str, what: str) -> bytes:
        """Content of a file that must exist, see :meth:`LocalStore.small`."""
        try:
            return self.fetch(file)
        except StoreError as error:
            if error.missing:
                raise VideoAlignError(f"{self.name} is not {what}: it has no {file}") from None
            raise

    def has(self, file: str) -> bool:
        """Whether there is such a file."""
        return self.size(file) is not None

    def size(self, file: str) -> int | None:
        """Size of a file in bytes; None if there is no such file."""
        try:
            return self._call(file, 0, "_info")["size"]
        except StoreError as error:
            if error.missing:
                return None
            raise

    def names(self) -> set[str] | None:
        """Names of all files in the folder; None where the store does not list them."""
        if not SCHEMES[scheme_of(self.address)].lists:
            return None
        try:
            found = self._call("", 0, "_ls", detail=False)
        except StoreError as error:
            if error.missing:
                return set()
            raise
        return {path.rstrip("/").rpartition("/")[2] for path in found}

    def put(self, path: Path, file: str) -> None:
        """Write a file, and look whether it has arrived whole.

        Args:
            path: Local file.
            file: Name that it gets.

        Raises:
            StoreError: If it cannot be written.
        """
        size = path.stat().st_size
        self._call(file, size, "_put_file", str(path))
        if (there := self.size(file)) != size:
            raise StoreError(f"{self.name}/{file}: {size} bytes were written, but the store says {there}")

    def remove(self, file: str) -> None:
        """Remove a file, if there is one."""
        with contextlib.suppress(StoreError):
            self._call(file, 0, "_rm_file")

    def save(self, file: str, size: int | None, path: Path) -> None:
        """Fetch a file, see :meth:`LocalStore.save`; of one that is shorter than ``size`` what there is."""
        pieces = [(0, None)] if size is None else [(at, min(at + PIECE, size)) for at in range(0, size, PIECE)]
        with open(path, "wb") as out:
            for content in in_order(threads(), lambda piece: self.fetch(file, *piece), pieces, ahead=4):
                out.write(content)

    @contextlib.contextmanager
    def whole(self, file: str, size: int) -> Iterator[Path]:
        """A temporary copy of a file, see :meth:`LocalStore.whole`."""
        with tempfile.TemporaryDirectory(prefix="videoalign-") as folder:
            self.save(file, size, Path(folder) / file)
            yield Path(folder) / file


Store = LocalStore | RemoteStore


def _filesystem(scheme: str) -> Any:
    key = os.getpid(), scheme
    return _filesystems.get(key) or _filesystems.setdefault(key, SCHEMES[scheme].filesystem())


def open_store(path: str | Path) -> Store:
    """The store of one set.

    Args:
        path: Folder or address.

    Raises:
        VideoAlignError: If there is no such kind of address, or its package is not installed.
    """
    if not is_address(path):
        return LocalStore(Path(path))
    if not str(path).partition("://")[2].strip("/"):
        raise VideoAlignError(f"{path}: the address names no place, such as {path}bucket/set")
    scheme_of(str(path))
    return RemoteStore(str(path).rstrip("/"))


def open_stores(path: str | Path) -> list[Store]:
    """The stores of all sets that a path with braces names, see :func:`.addresses.expanded`."""
    return [open_store(one) for one in expanded(path)]


@dataclass(frozen=True)
class StoredFile:
    """A file of a set whose content is known by its checksum.

    Args:
        store: Where it lies.
        name: Its name there.
        sha256: Hex digest of its content, by which parts of it are cached.
        label: What to call it in messages; its name where a set lies in one folder.
    """

    store: Store
    name: str
    sha256: str = ""
    label: str = ""

    def __str__(self) -> str:
        return self.label or self.name

    def read(self, start: int, end: int | None, sound: Sound) -> bytes:
        """A range of its bytes, from the cache or from the store.

        Args:
            start: Offset of the first byte.
            end: Offset behind the last one; None reads to the end.
            sound: Whether bytes are sound; see :meth:`RemoteStore.fetch` for those that are not.

        Raises:
            StoreError: If a remote store does not give them.
            OSError: If a local file cannot be read.
        """
        if not self.store.remote:
            return self.store.fetch(self.name, start, end)
        cache, key = byte_cache.cache(), f"{self.sha256}-{start}-{'' if end is None else end}"
        if (content := cache.get(key, sound)) is None:
            content = self.store.fetch(self.name, start, end, sound)
            if sound(content):
                cache.put(key, content)
        return content


def threads() -> ThreadPoolExecutor:
    """This process's threads that wait for stores."""
    return _pools.get(os.getpid()) or _pools.setdefault(os.getpid(), ThreadPoolExecutor(THREADS, "store"))


def together(function: Callable[[X], Y], items: Iterable[X]) -> Iterator[Y]:
    """Results of a function in the order of its items, computed by several threads of this process.

    Args:
        function: Function that waits for a store more than it computes.
        items: Arguments of its calls.
    """
    items = list(items)
    if len(items) == 1:
        yield function(items[0])
        return
    futures = [threads().submit(function, item) for item in items]
    try:
        for future in futures:
            yield future.result()
    finally:
        for future in futures:
            future.cancel()
