"""Folders and files that appear whole or not at all, and that never replace anything else.

All outputs are written in one way: under a lock, to a temporary neighbour, synced to disk, and renamed. Temporary files
of a killed process are removed by the next process that writes into the folder.
"""

import contextlib
import errno
import functools
import inspect
import json
import math
import os
import pwd
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from .. import VideoAlignError
from .locks import abandoned, explained, held, idle, real, temporary
from .renames import entries, move, remove, replace, sync, take_name
from .yaml_text import check_yaml


@contextlib.contextmanager
def new_folder(path: str | Path, replaces: str | None = None) -> Iterator[Path]:
    """Give a temporary folder to fill; it takes its name when the block succeeds, and is removed when it fails.

    The name is locked during the block. Whatever appears under it meanwhile stays unchanged: the finished folder is
    then moved beside it, to ``NAME.finished``.

    Args:
        path: Folder to write. It must not exist yet, except as an empty folder.
        replaces: Name of a file, such as ``reward.json``. A folder that holds it is an earlier output of the same kind,
            and is replaced at the end.

    Yields:
        The temporary folder.

    Raises:
        VideoAlignError: Where something else exists at ``path``, or another process writes it.
    """
    with held(path):
        check_free(path, replaces)
        with explained(path):
            place = real(path)
            place.parent.mkdir(parents=True, exist_ok=True)
            sweep(place.parent)
            known = entries(place) if place.exists() else None
            partial = temporary(place)
            partial.mkdir()
        try:
            yield partial
            with explained(path):
                settle(partial)
                put_folder(partial, place, replaces, known)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def put_folder(partial: Path, place: Path, replaces: str | None, known: set[str] | None) -> None:
    """Give a finished folder its name, unless something has appeared there.

    Args:
        partial: The finished folder.
        place: Its final path.
        replaces: Name of a file that marks an earlier output of the same kind, which may be replaced.
        known: Names of all entries of the folder at ``place`` when the work began; None if there was no such folder.

    Raises:
        VideoAlignError: Where something has appeared; the finished folder is moved to ``NAME.finished``.
    """
    try:
        if known:
            replace(partial, place, replaces, known)
        else:
            take_name(partial, place, known is not None)
    except FileExistsError:
        finished = _set_aside(partial, place)
        raise VideoAlignError(
            f"output {place}: something has appeared there while it was being written, and is left as it is. "
            f"The output is whole and stands in {finished}; move it where you want it"
        ) from None
    sync(place.parent)


def _set_aside(partial: Path, place: Path) -> Path:
    for number in range(1, 1000):
        finished = place.with_name(f"{place.name[:200]}.finished" + (f"-{number}" if number > 1 else ""))
        with contextlib.suppress(FileExistsError):
            move(partial, finished)
            return finished
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(place))


def check_free(path: str | Path, replaces: str | None = None) -> None:
    """Refuse an output that :func:`new_folder` would refuse, before long work begins.

    Args:
        path: Folder that is to be written.
        replaces: Name of a file that marks an earlier output of the same kind, which may be replaced.

    Raises:
        VideoAlignError: Where something else exists at ``path``, or another process writes it.
    """
    with held(path):
        place = real(path)
        if replaces and (place / replaces).is_file():
            return
        with explained(path):
            there = os.path.lexists(place) and not (place.is_dir() and not any(place.iterdir()))
        if there:
            raise VideoAlignError(f"output {path} exists already; name a new folder or remove it first")


def claims_out(function: Callable) -> Callable:
    """Decorate a function that writes the folder ``out``: the folder is checked first, and locked during the call."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def claiming(*args: Any, **kwargs: Any) -> Any:
        out = signature.bind(*args, **kwargs).arguments["out"]
        with held(out):
            check_free(out)
            return function(*args, **kwargs)

    return claiming


@contextlib.contextmanager
def scratch_folder(path: str | Path) -> Iterator[Path]:
    """Give a temporary folder beside an output, on its file system, that is removed after the block."""
    with explained(path):
        place = real(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        sweep(place.parent)
        folder = temporary(place)
        folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def new_file(path: str | Path, follow: bool = True) -> Iterator[Path]:
    """Give a temporary file to write; it replaces ``path`` when the block succeeds, and is removed when it fails.

    Args:
        path: File to write. Its folder is created if it is missing.
        follow: Whether the target of a symbolic link at ``path`` is replaced. Otherwise the link itself is replaced.

    Yields:
        The temporary file.

    Raises:
        VideoAlignError: Where the file cannot be written.
    """
    with explained(path):
        place = real(path) if follow else real(Path(path).parent) / Path(path).name
        if place.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(place))
        place.parent.mkdir(parents=True, exist_ok=True)
        sweep(place.parent)
        partial = temporary(place)
        file = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        mode = os.fstat(file).st_mode & 0o777  # as the umask grants it
        os.close(file)
    try:
        yield partial
        with explained(path):
            _grant(partial, mode)
            sync(partial)
            os.replace(partial, place)
            sync(place.parent)
    finally:
        partial.unlink(missing_ok=True)


def settle(folder: Path) -> None:
    """Sync everything in a folder to the disk, and give it the access that the umask grants.

    Some libraries (safetensors, tempfile) create files that only their owner may read.
    """
    mode = folder.stat().st_mode & 0o777
    for top, folders, files in os.walk(folder):
        for name in files:
            if not os.path.islink(path := os.path.join(top, name)):
                _grant(path, mode & 0o666)
                sync(path)
        for name in folders:
            if not os.path.islink(path := os.path.join(top, name)):
                _grant(path, mode)
        sync(top)


def _grant(path: str | Path, mode: int) -> None:
    now = os.stat(path).st_mode
    if now & 0o777 != mode:
        with contextlib.suppress(PermissionError):  # a file system without modes
            os.chmod(path, (now & 0o7000) | mode)


def sweep(folder: Path) -> None:
    """Remove the unfinished files of ended processes of this machine from a folder, and print what was removed."""
    with os.scandir(folder) as entries:
        left = [(Path(entry.path), found) for entry in entries if (found := abandoned(Path(entry.path)))]
    for path, found in left:
        with contextlib.suppress(OSError), idle(path.with_name(f".{found['stem']}.lock")) as alone:
            if alone:
                _tidy(path, path.with_name(found["stem"]), found)


def _tidy(path: Path, earlier: Path, found: re.Match[str]) -> None:
    if found["kind"] == "old" and not os.path.lexists(earlier):
        os.rename(path, earlier)
        print(f"videoalign: {earlier} is back: process {found['pid']} ended while replacing it", file=sys.stderr)
        return
    remove(path)
    print(f"videoalign: removed {path}, which process {found['pid']} left unfinished", file=sys.stderr)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON through :func:`new_file`. JSON has no NaN: an undefined number becomes null."""
    value = json.loads(json.dumps(value), parse_constant=lambda name: None)
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8 through :func:`new_file`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes through :func:`new_file`."""
    with new_file(path) as partial:
        partial.write_bytes(content)


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file that must exist.

    Args:
        path: JSON file.
        what: Kind of its folder, for messages, such as "a reward model's folder".

    Raises:
        VideoAlignError: Where the file is missing or cannot be read.
    """
    return parse_json(read_bytes(path, what), path, what)


def read_bytes(path: Path, what: str) -> bytes:
    """Read a file that must exist, see :func:`read_json`."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise VideoAlignError(f"{path.parent} is not {what}: it has no {path.name}") from None
    except PermissionError:
        raise VideoAlignError(_denied(path)) from None
    except OSError as error:
        raise VideoAlignError(f"{path}: {what} needs it, but it cannot be read ({error})") from None


def parse_json(content: bytes, name: str | Path, what: str) -> Any:
    """Parse JSON.

    Args:
        content: Content of a file.
        name: What to call the file in messages.
        what: Kind of its folder, for messages.

    Raises:
        VideoAlignError: Where it is no JSON in UTF-8.
    """
    try:
        return json.loads(content.decode("utf-8"))
    except ValueError as error:
        raise VideoAlignError(f"{name}: {what} needs it, but it cannot be read ({error})") from None


def read_results(path: Path, what: str) -> Any:
    """Read numbers by name through :func:`read_json`, with NaN for every null that :func:`write_json` wrote for it."""

    def undefined(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: undefined(one) for name, one in value.items()}
        if isinstance(value, list) and all(isinstance(one, int | float | None) for one in value):
            return [math.nan if one is None else one for one in value]
        return value

    return undefined(read_json(path, what))


def read_yaml(path: str | Path, option: str) -> Any:
    """Read a YAML file of the user's.

    Args:
        path: YAML file.
        option: Option that names the file, for messages.

    Raises:
        VideoAlignError: Where the file is missing, no YAML, or refused by :func:`.yaml_text.check_yaml`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        check_yaml(text, f"{option} {path}")
        return yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:  # an impossible date is a ValueError
        raise VideoAlignError(f"{option} {path} cannot be read ({str(error).splitlines()[0]})") from None


def check_readable(path: str | Path) -> None:
    """Refuse a file, or a folder with a file, that this user may not read, before a library calls it damaged.

    Args:
        path: File or folder. One that does not exist passes: the function that loads it refuses it.

    Raises:
        VideoAlignError: Where a file is not readable; names its owner and mode.
    """
    try:
        for file in _files(path) if os.path.isdir(path) else [path]:
            with open(file, "rb"):
                pass
    except PermissionError as error:
        raise VideoAlignError(_denied(Path(error.filename or path))) from None
    except OSError:
        pass


def _files(folder: str | Path) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise error

    for top, _, names in os.walk(folder, onerror=refuse):
        yield from (os.path.join(top, name) for name in names)


def _denied(path: Path) -> str:
    steps = [*reversed(path.absolute().parents), path]
    closed = next((p for p in steps if not os.access(p, os.R_OK if p == path else os.X_OK, effective_ids=True)), path)
    info = closed.stat()
    try:
        owner = pwd.getpwuid(info.st_uid).pw_name
    except KeyError:
        owner = str(info.st_uid)
    return (
        f"{path} is not damaged, but you have no permission to read it: {closed} belongs to {owner}, with mode "
        f"{info.st_mode & 0o777:o}. Let its owner call chmod a+rX {closed}, or read a copy"
    )
