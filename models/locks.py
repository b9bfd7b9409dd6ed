"""Locks for outputs, which end with their process, and names of temporary files that identify the process."""

import contextlib
import hashlib
import itertools
import os
import re
import socket
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import filelock

from .. import VideoAlignError
from ..redaction import redacted

HOST = re.sub(r"[^A-Za-z0-9_.]", "_", socket.gethostname())[:64]
"""Name of this machine in the names of temporary files."""
_TEMPORARY = re.compile(r"\.(?P<stem>.+)\.(?P<kind>partial|old)-(?P<host>[^-]+)-(?P<pid>\d+)-(?P<start>\d+)-\d+", re.S)
_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:/")
"""The beginning of an address such as ``s3://bucket``, also where a Path has made one slash of two."""
_HOME = re.compile(r"~[^/]*/")
"""The beginning of a path in a home folder, which a shell replaces, but not behind ``=`` or in YAML."""
_LONGEST = 150
"""Largest number of bytes of a name that is used whole in names beside it: file systems allow 255."""
_numbers = itertools.count()
_mine: set[tuple[int, Path]] = set()
"""Process and lock file of every open block; a forked process holds none of its parent's locks."""


def beside(path: Path, kind: str) -> Path:
    """Path of a hidden neighbour of an output.

    Args:
        path: Path of the output.
        kind: Purpose of the neighbour, the last part of its name, such as ``lock``.
    """
    name, raw = path.name, os.fsencode(path.name)
    if len(raw) > _LONGEST:
        name = f"{name[:20]}-{hashlib.sha256(raw).hexdigest()[:16]}"
    return path.with_name(f".{name}.{kind}")


def temporary(path: Path, kind: str = "partial") -> Path:
    """Path beside an output that no other process uses, and whose name identifies this process.

    Args:
        path: Path of the output.
        kind: ``partial`` for an unfinished output, ``old`` for an earlier one that is being replaced.
    """
    return beside(path, f"{kind}-{HOST}-{os.getpid()}-{_started(os.getpid()) or 0}-{next(_numbers)}")


def abandoned(path: Path) -> re.Match[str] | None:
    """Parse the name of a temporary file whose process has ended; None for other names and other machines' files."""
    found = _TEMPORARY.fullmatch(path.name)
    if found and found["host"] == HOST and not _running(int(found["pid"]), int(found["start"])):
        return found
    return None


def _started(pid: int) -> int | None:
    """Start time of a process in the kernel's ticks; None where it has ended, or where the system does not say."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])


def _running(pid: int, start: int) -> bool:
    if Path("/proc/self/stat").exists():  # the number may belong to another, later process by now
        return _started(pid) == start
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def first_process() -> bool:
    """Whether this is the first process of a run, which writes for all of them."""
    if "RANK" in os.environ:  # torchrun
        return os.environ["RANK"] == "0"
    names = ("LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    return all(os.environ.get(name, "0") == "0" for name in names)


@contextlib.contextmanager
def held(path: str | Path, every: bool = False) -> Iterator[None]:
    """Lock an output during a block. The system releases the lock of a process that dies.

    Blocks of one process may be nested. In a distributed run the first process holds the lock for all.

    Args:
        path: File or folder that will be written; its parent folder is created if it is missing.
        every: Whether each process of a run writes an output of its own, and so takes a lock of its own.

    Raises:
        VideoAlignError: Where another process holds the output; there is no waiting.
    """
    if not every and not first_process():
        yield
        return
    place = real(path)
    key = os.getpid(), beside(place, "lock")
    if key in _mine:
        yield
        return
    with _acquired(path, key[1]):
        _mine.add(key)
        try:
            yield
        finally:
            _mine.discard(key)


class Hold:
    """A lock on an output from one call to another, as the hooks of a run need it; :func:`held` is for a block."""

    _open: ClassVar[weakref.WeakSet] = weakref.WeakSet()

    def __init__(self) -> None:
        self._blocks = contextlib.ExitStack()
        self._open.add(self)

    def take(self, path: str | Path, every: bool = False) -> None:
        """Lock an output, and release the one that was locked before.

        Args:
            path: File or folder that will be written.
            every: Whether each process of a run takes a lock of its own.

        Raises:
            VideoAlignError: Where another process holds the output.
        """
        self.drop()
        self._blocks.enter_context(held(path, every))

    def drop(self) -> None:
        """Release the lock, if one is held."""
        self._blocks.close()

    @classmethod
    def drop_all(cls) -> None:
        """Release all locks of this process: a command that fails does not reach the hooks that would release them."""
        for hold in [*cls._open]:
            hold.drop()


@contextlib.contextmanager
def _acquired(path: str | Path, place: Path) -> Iterator[None]:
    with explained(path):
        made = [folder for folder in place.parents if not folder.exists()]
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = taken(place)
    if lock is None:
        raise VideoAlignError(
            f"output {path} is being written by another process ({_holder(place)}). Wait until it has ended, or name "
            "another output"
        )
    try:
        yield
    finally:
        release(lock)
        with contextlib.suppress(OSError):  # folders that hold something now stay
            for folder in made:
                folder.rmdir()


def taken(place: Path) -> filelock.BaseFileLock | None:
    """Take the lock of a lock file and write this process's number into it; None where another process holds it."""
    lock = filelock.FileLock(place, thread_local=False)
    try:
        lock.acquire(timeout=0.2, poll_interval=0.02)  # a moment: another process may hold it to tidy up
    except filelock.Timeout:
        if not place.exists():  # filelock waits for a file that cannot be created; let the system say why
            probe = temporary(place)
            probe.touch()
            probe.unlink()
        return None
    with contextlib.suppress(OSError):  # the lock holds without it; only the message to others says less
        place.write_text(f"PID {os.getpid()} on {socket.gethostname()}")
    return lock


def release(lock: filelock.BaseFileLock) -> None:
    """Release a lock and remove its file first, while no other process can hold it."""
    with contextlib.suppress(OSError):
        os.unlink(lock.lock_file)
    lock.release()


@contextlib.contextmanager
def idle(place: Path) -> Iterator[bool]:
    """Try to keep other processes from an output during a block.

    Args:
        place: Lock file of the output.

    Yields:
        Whether no other process holds the lock; if so, none can take it during the block.
    """
    if (os.getpid(), place) in _mine:
        yield True
        return
    lock = taken(place)
    try:
        yield lock is not None
    finally:
        if lock:
            release(lock)


def _holder(place: Path) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if text := place.read_text().strip():
            return text
    return "it has not said which"


def real(path: str | Path) -> Path:
    """Resolve the path of an output: links are followed, so that all its names share one lock and one file system.

    Args:
        path: Path of the output, as the user named it.

    Raises:
        VideoAlignError: Where it is no possible file name, the root folder, or a link that leads to itself.
    """
    text = os.fspath(path)
    if not text:
        raise VideoAlignError("the output has no name; name a new folder")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise VideoAlignError(f"output {text!r}: the name is not UTF-8; choose another one") from None
    if "\0" in text:
        raise VideoAlignError(f"output {text!r}: a name cannot hold the character NUL; choose another one")
    if _HOME.match(text) and not os.path.lexists(text.split("/")[0]):
        raise VideoAlignError(
            f"output {text}: a shell has left ~ as it is, and a folder of that name is hardly meant; write "
            f"{os.path.expanduser(text)}"
        )
    if _ADDRESS.match(text):
        raise VideoAlignError(
            f"output {redacted(text)}: this is written to a local folder; name one, and copy it then with `videoalign "
            "shards copy` if it is a set"
        )
    with explained(path):
        place = Path(os.path.realpath(text))
        looping = place.is_symlink()
    if not place.name:
        raise VideoAlignError(f"output {path} is the root of the file system; name a folder in it")
    if looping:
        raise VideoAlignError(f"output {path} is a symbolic link that leads to itself; name another output")
    return place


@contextlib.contextmanager
def explained(path: str | Path) -> Iterator[None]:
    """Turn an error of the operating system in a block into a message for the user.

    Args:
        path: Output that the block writes, as the user named it.

    Raises:
        VideoAlignError: Where the block raises an OSError.
    """
    try:
        yield
    except OSError as error:
        where = f", {error.filename}" if error.filename and str(error.filename) != str(path) else ""
        raise VideoAlignError(
            f"output {path} cannot be written ({error.strerror or error}{where}). Name an output in a folder that you "
            "may write to, on a disk with room, with a shorter name if it is too long"
        ) from None
