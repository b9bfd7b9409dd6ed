"""Copies of sets between folders and stores, compared with the checksums of the index; an interrupted one goes on."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .. import VideoAlignError
from ..models.files import check_free, settle, sweep
from ..models.locks import beside, explained, held, real
from ..models.renames import sync, take_name
from .addresses import expanded, is_address, shown
from .contents import ShardError
from .set_index import INDEX, sha256
from .stored_sets import StoredSet
from .stores import RemoteStore, Store, open_store
from .uploads import writable

Progress = Callable[[str, int, int], None]
"""Callback for progress: name of the stage, things done, things in all."""
Missing = Callable[[], Iterator[int]]
"""Brings the files that are not there yet, one after the other; yields the size that the index states for each."""


def copy(source: str, out: str, progress: Progress = lambda what, done, of: None) -> str:
    """Copy a set; files that an interrupted copy has brought whole are not copied again.

    Args:
        source: Folder or address of the set.
        out: Folder or address to write. The copy appears there when it is whole.
        progress: Callback that is told the progress.

    Returns:
        What was copied, as text.

    Raises:
        VideoAlignError: If something else exists at ``out``, or it cannot be written to.
        ShardError: If a file of the set is not the one that its index lists.
        StoreError: If a store does not give or take a file.
    """
    places = expanded(source)
    if len(places) > 1:
        raise VideoAlignError(f"{shown(source)} names {len(places)} sets; copy each to a place of its own")
    found = StoredSet(open_store(places[0]))
    if problems := found.index.name_problems():
        raise ShardError(f"{found.name}: {problems[0]}")
    target = _upload if is_address(out) else _folder
    with target(out, found) as missing:
        if missing is None:
            return f"{shown(out)} is a copy of {found.name} already"
        index, copied = found.index, 0
        files = list(index.files())
        total = max(1, round(sum(size or 0 for _, _, size in files) / 1e6))
        for size in missing():
            copied += size
            progress("MB copied", min(total, round(copied / 1e6)), total)
    return f"{shown(out)}: {index.samples} {index.kind} in {len(files)} files, each with the checksum of the index"


@contextmanager
def _folder(out: str, found: StoredSet) -> Iterator[Missing | None]:
    """A local folder, which gets its name when all files are in it."""
    with held(out):
        place = real(out)
        if _same(open_store(place), found):
            yield None
            return
        check_free(out)
        with explained(out):
            place.parent.mkdir(parents=True, exist_ok=True)
            sweep(place.parent)
            empty, folder = place.is_dir(), beside(place, "copy")
            folder.mkdir(exist_ok=True)

        def missing() -> Iterator[int]:
            for name, digest, size in found.index.files():
                path = folder / name
                if not (path.is_file() and sha256(path) == digest):
                    partial = folder / f".{name}.partial"
                    _bring(found, name, digest, size, partial)
                    partial.rename(path)
                yield size or 0

        yield missing
        with explained(out):
            listed = {name for name, _, _ in found.index.files()}
            for path in [path for path in folder.iterdir() if path.name not in listed]:
                path.unlink()
            (folder / INDEX).write_bytes(found.content)
            settle(folder)
            take_name(folder, place, empty)
            sync(place.parent)


@contextmanager
def _upload(out: str, found: StoredSet) -> Iterator[Missing | None]:
    """A store, which gets the index when all other files are there."""
    store = writable(out)
    if _same(store, found):
        yield None
        return
    if store.size(INDEX) is not None:
        raise VideoAlignError(f"output {store.name} holds another set; name a new address or remove it first")
    with tempfile.TemporaryDirectory(prefix="videoalign-") as temporary:

        def missing() -> Iterator[int]:
            for name, digest, size in found.index.files():
                if not _is_there(store, name, digest, size, Path(temporary) / name):
                    path = Path(temporary) / name
                    _bring(found, name, digest, size, path)
                    store.put(path, name)
                    path.unlink()
                yield size or 0

        yield missing
        (Path(temporary) / INDEX).write_bytes(found.content)
        store.put(Path(temporary) / INDEX, INDEX)


def _same(store: Store, found: StoredSet) -> bool:
    """Whether a place holds this set's index, and so is a whole copy."""
    return store.has(INDEX) and store.small(INDEX, "a set") == found.content


def _is_there(store: RemoteStore, name: str, digest: str, size: int | None, path: Path) -> bool:
    """Whether a store has a file with this content; it is read back, because stores' own checksums differ."""
    there = store.size(name)
    if there is None or size not in (None, there):
        return False
    store.save(name, there, path)
    same = sha256(path) == digest
    path.unlink()
    return same


def _bring(found: StoredSet, name: str, digest: str, size: int | None, path: Path) -> None:
    for _ in range(2):  # a second time, if its bytes were changed on their way
        try:
            found.store.save(name, size, path)
        except FileNotFoundError:
            raise ShardError(f"{found.name}/{name} is missing") from None
        if sha256(path) == digest:
            return
    path.unlink()
    raise ShardError(
        f"{found.name}/{name} is not the file that was written (another sha256), so it was not copied. `videoalign "
        f"shards verify {found.name}` lists all damage"
    )
