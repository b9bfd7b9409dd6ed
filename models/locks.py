"""Who is writing an output: locks that end with their process, and names that say whose a temporary file is."""

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

HOST = re.sub(r"[^A-Za-z0-9_.]", "_", socket.gethostname())[:64]
"""Name of this machine, as temporary names hold it."""
_TEMPORARY = re.compile(r"\.(?P<stem>.+)\.(?P<kind>partial|old)-(?P<host>[^-]+)-(?P<pid>\d+)-(?P<start>\d+)-\d+", re.S)
_LONGEST = 150
"""Bytes of a name from which on it is cut in the names beside it: file systems take 255."""
_numbers = itertools.count()
_mine: set[tuple[int, Path]] = set()
"""Process and lock of the blocks that are open; a forked process has none of its parent's locks."""


def beside(path: Path, kind: str) -> Path:
    """The hidden neighbour of an output that serves it as ``kind``, such as its lock."""
    name, raw = path.name, os.fsencode(path.name)
    if len(raw) > _LONGEST:
        name = f"{name[:20]}-{hashlib.sha256(raw).hexdigest()[:16]}"
    return path.with_name(f".{name}.{kind}")


def temporary(path: Path, kind: str = "partial") -> Path:
    """A name beside an output that no other process uses, and that tells which one does."""
    return beside(path, f"{kind}-{HOST}-{os.getpid()}-{_started(os.getpid()) or 0}-{next(_numbers)}")


def abandoned(path: Path) -> re.Match[str] | None:
    """The parts of a temporary name whose process has ended; None for anything else, and for other machines' files."""
    found = _TEMPORARY.fullmatch(path.name)
    if found and found["host"] == HOST and not _running(int(found["pid"]), int(found["start"])):
        return found
    return None


def _started(pid: int) -> int | None:
    """When a process began, in the kernel's ticks; None where it has ended, or where the system does not tell."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])


def _running(pid: int, start: int) -> bool:
    if Path("/proc/self/stat").exists():  # a number that came to another process since does not count
        return _started(pid) == start
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def first_process() -> bool:
    """Whether this is the process of a run that writes for all of them."""
    if "RANK" in os.environ:  # torchrun
        return os.environ["RANK"] == "0"
    names = ("LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    return all(os.environ.get(name, "0") == "0" for name in names)


@contextlib.contextmanager
def held(path: str | Path, every: bool = False) -> Iterator[None]:
    """Keep an output for this process for the time of the block. The system ends the lock of a process that dies.

    Blocks of one process may be nested. Processes of a run other than the first take part in its lock without one of
    their own.

    Args:
        path: File or folder that will be written; its folder is made where it is missing.
        every: The output is this process's alone, whichever of its run it is.

    Raises:
        VideoAlignError: At once, where another process holds the output.
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
    """Keeps an output from one call to another, as the hooks of a run need it; :func:`held` is for a block."""

    _open: ClassVar[weakref.WeakSet] = weakref.WeakSet()

    def __init__(self) -> None:
        self._blocks = contextlib.ExitStack()
        self._open.add(self)

    def take(self, path: str | Path, every: bool = False) -> None:
        """Enter a block of :func:`held`, leaving an earlier one; the same arguments."""
        self.drop()
        self._blocks.enter_context(held(path, every))

    def drop(self) -> None:
        """Leave the block, if one was entered."""
        self._blocks.close()

    @classmethod
    def drop_all(cls) -> None:
        """Leave all blocks of this process: a command that fails does not come to the hooks that would."""
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
            f"output {path} is being written by another process ({_holder(place)}). Wait until it has ended, or name another output"
        )
    try:
        yield
    finally:
        release(lock)
        with contextlib.suppress(OSError):  # where nothing came of it
            for folder in made:
                folder.rmdir()


def taken(place: Path) -> filelock.BaseFileLock | None:
    """The lock of that file, with this process's name in it; None where somebody else has it."""
    lock = filelock.FileLock(place, thread_local=False)
    try:
        lock.acquire(timeout=0.2, poll_interval=0.02)  # a moment: somebody may be tidying up
    except filelock.Timeout:
        if not place.exists():  # filelock waits for a file that cannot be made; let the system say why
            probe = temporary(place)
            probe.touch()
            probe.unlink()
        return None
    with contextlib.suppress(OSError):  # the lock holds without it; only the message to others says less
        place.write_text(f"PID {os.getpid()} on {socket.gethostname()}")
    return lock


def release(lock: filelock.BaseFileLock) -> None:
    """Give a lock back and remove its file, which nobody else can have taken meanwhile."""
    with contextlib.suppress(OSError):
        os.unlink(lock.lock_file)
    lock.release()


@contextlib.contextmanager
def idle(place: Path) -> Iterator[bool]:
    """Whether no other process holds the lock of that file; nobody takes it for the time of the block."""
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
    """Where an output really stands: links are followed, so that all its names share one lock and one file system.

    Raises:
        VideoAlignError: For a name that cannot be a file's, or a link that leads to itself.
    """
    text = os.fspath(path)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise VideoAlignError(f"output {text!r}: the name is not UTF-8; choose another one") from None
    if "\0" in text:
        raise VideoAlignError(f"output {text!r}: a name cannot hold the character NUL; choose another one")
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
    """Turn what the operating system says of an output into a message for the user."""
    try:
        yield
    except OSError as error:
        where = f", {error.filename}" if error.filename and str(error.filename) != str(path) else ""
        raise VideoAlignError(
            f"output {path} cannot be written ({error.strerror or error}{where}). Name an output in a folder that you "
            "may write to, on a disk with room, with a shorter name if it is too long"
        ) from None
