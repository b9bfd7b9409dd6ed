"""Where a new set goes: a local folder that appears when it is whole, or a store that gets each file as it is finished.

In a store the index comes last, and without it there is no set. On local disk lies only the shard that is written.
"""

import contextlib
import functools
import inspect
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .. import VideoAlignError
from ..models.files import check_free, new_folder, scratch_folder
from ..models.locks import held
from .addresses import SCHEMES, is_address, scheme_of
from .attempts import StoreError
from .set_index import INDEX, outside_sets
from .stores import RemoteStore, open_store

PROBE = "writing"
"""Name of an empty file that is written to see whether a store takes files."""


class NewFolder:
    """A set that is written to a local folder.

    Args:
        path: Folder to write files into.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def keep(self, *names: str) -> None:
        """Take files that are finished.

        Args:
            names: Names of files in the folder.
        """


class NewUpload(NewFolder):
    """A set that is written to a store.

    Args:
        path: Local folder to write files into; each leaves it when the store has it.
        store: The store.
    """

    def __init__(self, path: Path, store: RemoteStore) -> None:
        super().__init__(path)
        self.store, self.kept = store, []

    def keep(self, *names: str) -> None:
        """Move finished files to the store."""
        refuse_set(self.store)  # another process may have written one meanwhile
        for name in names:
            self.kept.append(name)
            self.store.put(self.path / name, name)
            (self.path / name).unlink()

    def undo(self) -> None:
        """Remove from the store what was written to it, as far as it lets us; not from a set of another process."""
        with contextlib.suppress(StoreError):
            if INDEX not in self.kept and self.store.has(INDEX):
                return
        for name in reversed(self.kept):
            with contextlib.suppress(StoreError):
                self.store.remove(name)


@contextlib.contextmanager
def new_set(out: str | Path) -> Iterator[NewFolder]:
    """Give a place to write a set to, which appears under its name when the block succeeds.

    Args:
        out: Folder or address.

    Raises:
        VideoAlignError: If something exists there, or the store cannot be written to.
        StoreError: If the store does not take it; nothing is left there then.
    """
    if not is_address(out):
        with new_folder(out) as folder:
            yield NewFolder(folder)
        return
    store = claimed(out)
    with tempfile.TemporaryDirectory(prefix="videoalign-") as folder:
        upload = NewUpload(Path(folder), store)
        try:
            yield upload
        except BaseException:
            upload.undo()
            raise


def writable(out: str | Path) -> RemoteStore:
    """The store of a set that is to be written.

    Raises:
        VideoAlignError: If sets cannot be written there.
    """
    store, scheme = open_store(out), scheme_of(str(out))
    if not SCHEMES[scheme].writes:
        places = ", ".join(f"{name}://" for name, one in SCHEMES.items() if one.writes)
        raise VideoAlignError(
            f"{store.name} cannot be written to: sets are written to local folders and to {places}. Write a folder, "
            "and upload that"
        )
    return store


def refuse_set(store: RemoteStore) -> None:
    """Refuse a store that holds a set already.

    Raises:
        VideoAlignError: If it does.
    """
    if store.has(INDEX):
        raise VideoAlignError(f"output {store.name} holds a set already; name a new address or remove it first")


def claimed(out: str | Path) -> RemoteStore:
    """The store of a new set; writes a file there and removes it, so that long work does not end at a closed door.

    Raises:
        VideoAlignError: If there is a set, or sets cannot be written there.
        StoreError: If the store does not take a file.
    """
    store = writable(out)
    refuse_set(store)
    with tempfile.NamedTemporaryFile(prefix="videoalign-") as file:
        store.put(Path(file.name), PROBE)
    store.remove(PROBE)
    return store


def claims_set(function: Callable) -> Callable:
    """Decorate a function that writes the set ``out``: the place is checked first, and a local one is locked."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def claiming(*args: Any, **kwargs: Any) -> Any:
        out = signature.bind(*args, **kwargs).arguments["out"]
        if is_address(out):
            claimed(out)
            return function(*args, **kwargs)
        with held(out):
            check_free(out)
            outside_sets(out)
            return function(*args, **kwargs)

    return claiming


@contextlib.contextmanager
def scratch_beside(out: str | Path, kind: str) -> Iterator[Path]:
    """Give a temporary folder on the file system of an output, or on this machine's where that is a store.

    Args:
        out: Folder or address of the output.
        kind: Last part of its name.
    """
    if is_address(out):
        with tempfile.TemporaryDirectory(prefix="videoalign-") as folder:
            yield Path(folder)
        return
    with scratch_folder(Path(out).with_name(f"{Path(out).name}.{kind}")) as folder:
        yield folder
