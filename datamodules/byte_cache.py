"""A bounded cache on local disk of bytes that came from stores; any number of processes share it.

The environment variable VIDEOALIGN_CACHE names its folder (default: ``videoalign`` in ``XDG_CACHE_HOME`` or
``~/.cache``), VIDEOALIGN_CACHE_GB its limit in GB (default: 20; 0 keeps nothing). What was not used for longest leaves
first. What is read from it is compared with its checksum by the caller, so damage costs another request and no more.
"""

import contextlib
import hashlib
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import filelock

from .attempts import limit

GB = 20.0
"""Default limit of the cache in GB."""
ROOM = 0.9
"""Share of the limit that is left after what was not used for longest has been removed."""
_LEDGER, _LOCK = "bytes", ".lock"


@dataclass(frozen=True)
class ByteCache:
    """Bytes by key.

    Args:
        folder: Folder of the cache.
        limit: Largest number of bytes of all that is kept; 0 keeps nothing.
    """

    folder: Path
    limit: int

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()  # whatever a foreign index calls its files
        return self.folder / name[:2] / name

    def get(self, key: str, sound: Callable[[bytes], bool]) -> bytes | None:
        """The bytes under a key; None where there are none, or damaged ones.

        Args:
            key: What identifies the bytes.
            sound: Whether bytes are those that were written.
        """
        if not self.limit:
            return None
        path = self._path(key)
        try:
            content = path.read_bytes()
            if sound(content):
                os.utime(path)  # it was used now
                return content
            path.unlink()
        except OSError:
            pass
        return None

    def put(self, key: str, content: bytes) -> None:
        """Keep bytes; where the disk does not take them, they are not kept.

        Args:
            key: What identifies the bytes.
            content: Bytes to keep.
        """
        if not 0 < len(content) <= self.limit:
            return
        path = self._path(key)
        partial = path.with_name(f"{uuid.uuid4().hex}.partial")
        try:
            with self._locked():  # what is written counts before another process looks
                total = self._total() + len(content)
                if total > self.limit:
                    total = self._shrunk(max(0, int(ROOM * self.limit) - len(content))) + len(content)
                (self.folder / _LEDGER).write_text(str(total))
                path.parent.mkdir(exist_ok=True)
                partial.write_bytes(content)
                os.replace(partial, path)
        except (OSError, filelock.Timeout) as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            _tell(str(self.folder), str(error))

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Let one process at a time run a block, so that what several need is fetched once.

        Args:
            name: Name of the work, of letters, digits and ``-``.
        """
        lock = filelock.FileLock(self.folder / f".{name}.lock", poll_interval=0.05, thread_local=False)
        with contextlib.ExitStack() as block:
            if self.limit:
                with contextlib.suppress(OSError):
                    self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                    block.enter_context(lock)
            yield
            with contextlib.suppress(OSError):
                os.unlink(lock.lock_file)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with filelock.FileLock(self.folder / _LOCK, timeout=30, poll_interval=0.002, thread_local=False):
            yield

    def _total(self) -> int:
        """Bytes that are kept, at most: files that others removed still count until the next look at all of them."""
        try:
            return int((self.folder / _LEDGER).read_text())
        except (OSError, ValueError):
            return self._shrunk(self.limit)

    def _shrunk(self, most: int) -> int:
        """Remove what was not used for longest until at most ``most`` bytes are left; how many are left."""
        found = []
        for folder in os.scandir(self.folder):
            if folder.is_dir(follow_symlinks=False):
                for entry in os.scandir(folder.path):
                    with contextlib.suppress(OSError):
                        found.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= most:
                break
            with contextlib.suppress(OSError):
                os.unlink(path)
                total -= size
        return total


def cache() -> ByteCache:
    """The cache that the environment describes.

    Raises:
        VideoAlignError: If its limit is no number.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.environ.get("VIDEOALIGN_CACHE") or os.path.join(home, "videoalign")
    return ByteCache(Path(folder), int(limit("VIDEOALIGN_CACHE_GB", GB, 0) * 1e9))


@lru_cache
def _tell(folder: str, why: str) -> None:
    text = f"videoalign: note: the cache {folder} cannot be written ({why}); what comes from stores is not kept"
    print(text, file=sys.stderr)
