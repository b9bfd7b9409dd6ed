"""Renaming of files and folders that never destroys anything it was not told to replace."""

import ctypes
import errno
import functools
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from .locks import temporary

_NOREPLACE, _EXCHANGE = 1, 2
"""Flags of Linux's renameat2."""


def take_name(partial: Path, place: Path, empty: bool) -> None:
    """Rename a finished folder to a free name.

    Args:
        partial: The finished folder.
        place: Its final path.
        empty: Whether an empty folder existed at ``place`` when the work began, which may be replaced.

    Raises:
        FileExistsError: Where anything else exists at ``place``.
    """
    try:
        # the system replaces an empty folder and nothing else
        os.rename(partial, place) if empty else move(partial, place)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR):
            raise _exists(place) from None
        raise


def replace(partial: Path, place: Path, replaces: str | None, known: set[str]) -> None:
    """Replace an earlier folder by a finished one; the earlier one is restored if it has changed meanwhile.

    Args:
        partial: The finished folder.
        place: Path of the earlier folder.
        replaces: Name of a file that the earlier folder must hold.
        known: Names of all entries of the earlier folder when the work began.

    Raises:
        FileExistsError: Where the folder at ``place`` is of another kind, or holds new entries.
    """

    def as_it_was(folder: Path) -> bool:
        return bool(replaces) and (folder / replaces).is_file() and entries(folder) <= known

    if not os.path.lexists(place):
        move(partial, place)
        return
    if not as_it_was(place):
        raise _exists(place)
    if _renameat2(partial, place, _EXCHANGE):  # at no moment is the name free
        if not as_it_was(partial):
            _renameat2(partial, place, _EXCHANGE)
            raise _exists(place)
        shutil.rmtree(partial, ignore_errors=True)
        return
    aside = temporary(place, "old")
    os.rename(place, aside)
    try:
        move(partial, place)
    except BaseException:
        if not os.path.lexists(place):
            os.rename(aside, place)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def swap_in(partial: Path, place: Path) -> None:
    """Give a folder a name, and remove the file or folder that had it.

    Args:
        partial: The finished folder.
        place: Its final path.
    """
    if not os.path.lexists(place):
        os.rename(partial, place)
    elif _renameat2(partial, place, _EXCHANGE):
        remove(partial)
    else:
        aside = temporary(place, "old")
        os.rename(place, aside)
        os.rename(partial, place)
        remove(aside)
    sync(place.parent)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all that it holds."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _exists(path: Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


def entries(folder: Path) -> set[str]:
    """Relative paths of everything in a folder, at any depth."""
    paths = (os.path.join(top, name) for top, *kinds in os.walk(folder) for names in kinds for name in names)
    return {os.path.relpath(path, folder) for path in paths}


def move(source: Path, target: Path) -> None:
    """Rename a file or folder within a file system, to a free name.

    Args:
        source: Path of the file or folder.
        target: Its new path.

    Raises:
        FileExistsError: Where anything exists at ``target``, even a broken link or an empty folder.
    """
    if _renameat2(source, target, _NOREPLACE):
        return
    if os.path.lexists(target):
        raise _exists(target)
    if source.is_dir():
        os.rename(source, target)  # fails if the target is a file or a folder that is not empty
        return
    os.link(source, target)  # fails if the target exists; rename would replace a file that has just appeared
    source.unlink()


@functools.cache
def _call() -> Any:
    """The C library's function renameat2; None where the library has none."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if function:
        function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return function


def _renameat2(source: Path, target: Path, flag: int) -> bool:
    """Rename in one atomic step; False where the system or the file system does not support it."""
    here = -100  # AT_FDCWD: paths are relative to the current folder
    if not (function := _call()) or function(here, os.fsencode(source), here, os.fsencode(target), flag) == 0:
        return bool(function)
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))


def sync(path: str | Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot sync folders
            raise
    finally:
        os.close(file)
