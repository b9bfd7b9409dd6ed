"""Renaming that never destroys what it was not told to replace."""

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
    """Rename a finished folder.

    Args:
        partial: The finished folder.
        place: The name for it.
        empty: An empty folder stood there when the work began, and may go.

    Raises:
        FileExistsError: Where anything else stands there.
    """
    try:
        # the system replaces an empty folder and nothing else
        os.rename(partial, place) if empty else move(partial, place)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR):
            raise _exists(place) from None
        raise


def replace(partial: Path, place: Path, replaces: str | None, known: set[str]) -> None:
    """Put a folder in the place of an earlier one, which comes back if it is not what it was."""

    def as_it_was(folder: Path) -> bool:
        return bool(replaces) and (folder / replaces).is_file() and entries(folder) <= known

    if not os.path.lexists(place):
        move(partial, place)
        return
    if not as_it_was(place):
        raise _exists(place)
    if _renameat2(partial, place, _EXCHANGE):  # no moment in which neither stands there
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
    """Put a folder in the place of whatever has the name, which goes."""
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
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _exists(path: Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


def entries(folder: Path) -> set[str]:
    """Names of everything in a folder, at any depth."""
    return {
        os.path.relpath(os.path.join(top, name), folder) for top, *kinds in os.walk(folder) for k in kinds for name in k
    }


def move(source: Path, target: Path) -> None:
    """Rename a file or folder within a file system.

    Raises:
        FileExistsError: Where anything has the new name, also a broken link or an empty folder.
    """
    if _renameat2(source, target, _NOREPLACE):
        return
    if os.path.lexists(target):
        raise _exists(target)
    if source.is_dir():
        os.rename(source, target)  # fails on a file, and on a folder that is not empty
        return
    os.link(source, target)  # fails on anything; rename would replace a file that has appeared since
    source.unlink()


@functools.cache
def _call() -> Any:
    """The C library's renameat2, None where it has none."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if function:
        function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return function


def _renameat2(source: Path, target: Path, flag: int) -> bool:
    """Rename in one step that the system guards; False where system or file system cannot."""
    here = -100  # AT_FDCWD: relative paths are those of the current folder
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
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot, for folders
            raise
    finally:
        os.close(file)
