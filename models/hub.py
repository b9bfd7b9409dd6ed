"""Models and data sets of the Hugging Face hub, wherever a folder is taken: the one file that fetches from there.

    ORG/NAME  ORG/NAME@REVISION  hf://ORG/NAME[@REVISION][/PATH]  hf://datasets/ORG/NAME[@REVISION][/PATH]

A folder or file of that name on this machine wins. What is fetched stays in huggingface_hub's own cache, and only the
files that are asked for are fetched. A revision is asked for once in a process, so that all of it reads one commit.
Where the hub does not answer, or ``HF_HUB_OFFLINE`` is set, the cache alone is read, and what it lacks is refused at
once: transformers and diffusers would try again for minutes.
"""

import contextlib
import errno
import functools
import glob
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any

from .. import VideoAlignError
from ..errors import named, sentence
from .hub_address import Address, Kind, address_of, matches

_COMMIT = re.compile(r"[0-9a-f]{40}")
_commits: dict[Address, str] = {}
"""Commits that this process has resolved, by address without its path."""
_silent: list[str] = []
"""Why the hub does not answer; empty as long as it does, or was not asked yet."""


def resolved(
    place: str | Path,
    what: str = "folder",
    kind: Kind = "model",
    parts: Sequence[str] | None = None,
    now: Sequence[str] | None = None,
    file: bool = False,
) -> Path:
    """The folder or file on this machine that a place means; what is on the hub is fetched first.

    Args:
        place: Folder, file, or address on the hub (see the top of this file).
        what: What is asked for, for messages, such as "folder of a reward model".
        kind: Kind of repository that a name without ``hf://`` means.
        parts: Patterns of the files that are needed in all, relative to the place: ``*`` stands for anything but a
            slash, and one that ends in a slash for everything below that folder. All files if not given.
        now: Those of ``parts`` that are fetched by this call; all of them if not given. An index can be looked at
            before gigabytes follow it, and a message names all that will be asked for.
        file: Whether a file on this machine will do too.

    Raises:
        VideoAlignError: Where there is no such thing on this machine or on the hub, it may not be read, the hub does
            not answer and the cache lacks something, or a download failed.
    """
    address = address_of(place, kind)
    if address is None:
        path = Path(place).expanduser()
        if not (path.is_dir() or (file and path.exists())):
            raise VideoAlignError(f"{place}: there is no such {what}")
        return path
    with quiet():
        return _Snapshot(address, what, parts, now).path()


def folders_of(place: str | Path) -> list[str]:
    """Names of the folders at a place that :func:`resolved` has looked at; on the hub also of those not fetched yet.

    Args:
        place: Folder, or address on the hub.
    """
    address = address_of(place)
    if address is None:
        return [path.name for path in Path(place).expanduser().iterdir() if path.is_dir()]
    snapshot = _Snapshot(address, "folder", None, None)
    commit = _commits[replace(address, path="")]
    sizes = snapshot.listing(commit, online=not (_offline() or _silent))
    if sizes is None:
        return [path.name for path in resolved(place, now=()).iterdir() if path.is_dir()]
    inside = f"{address.path}/" if address.path else ""
    return sorted(
        {name[len(inside) :].split("/")[0] for name in sizes if name.startswith(inside) and "/" in name[len(inside) :]}
    )


def commit_of(place: str | Path | None, kind: Kind = "model") -> str | None:
    """The commit that a place on the hub was resolved to in this process; None for anything else.

    Args:
        place: Folder, file, or address on the hub.
        kind: Kind of repository that a name without ``hf://`` means.
    """
    address = address_of(place, kind) if place else None
    return _commits.get(replace(address, path="")) if address else None


def commits_of(**places: str | Path | None) -> dict[str, str]:
    """Commits of the places that are on the hub, as entries ``NAME_revision`` of a record."""
    return {f"{name}_revision": commit for name, place in places.items() if (commit := commit_of(place))}


def at_commit(place: str, commit: str | None) -> str:
    """The address of a recorded place at its recorded commit.

    Args:
        place: Folder, or address on the hub.
        commit: Commit that was recorded beside it; None where none was.
    """
    address = address_of(place) if commit else None
    if address is None:
        return place
    inside = f"/{address.path}" if address.path else ""
    return f"hf://{address.kind}s/{address.id}@{commit}{inside}"


@dataclass
class _Snapshot:
    """One call's files of an address."""

    address: Address
    what: str
    parts: Sequence[str] | None
    now: Sequence[str] | None

    def path(self) -> Path:
        address = self.address
        if address.revision and _COMMIT.fullmatch(address.revision) and (found := self._kept(address.revision)):
            return self._found(found, address.revision)
        if not (_offline() or _silent):
            try:
                return self._fetched(_commits.get(replace(address, path="")) or self._asked())
            except _Unanswered as why:
                _silent.append(str(why))
        return self._cached()

    def _found(self, folder: Path, commit: str) -> Path:
        _commits[replace(self.address, path="")] = commit
        return folder / self.address.path if self.address.path else folder

    # --- the hub ----------------------------------------------------------------------------------------------------

    def _asked(self) -> str:
        """The commit of the revision, from the hub."""
        from huggingface_hub import HfApi, constants

        address, limit = self.address, float(constants.HF_HUB_ETAG_TIMEOUT)
        try:
            return within(
                limit,
                lambda: HfApi().repo_info(address.id, repo_type=address.kind, revision=address.revision, timeout=limit),
            ).sha
        except TimeoutError:
            raise _Unanswered(f"{constants.ENDPOINT} gave no answer within {limit:g} seconds") from None
        except Exception as error:
            raise self._refusal(error, "look") from error

    def _fetched(self, commit: str) -> Path:
        """The files, after a download of those that the cache lacks."""
        from huggingface_hub import snapshot_download

        _commits[replace(self.address, path="")] = commit
        if (found := self._kept(commit)) is not None:
            self._remember(found, commit)
            return self._found(found, commit)
        try:
            sizes = self._wanted(self.listing(commit, online=True))
            if sizes:
                _say(f"fetching {self.address.id}: {len(sizes)} files, {sum(sizes.values()) / 1e9:.2f} GB")
            with bars():
                folder = snapshot_download(
                    self.address.id,
                    repo_type=self.address.kind,
                    revision=commit,
                    allow_patterns=[glob.escape(name) for name in sizes] if self._chosen() else None,
                )
        except VideoAlignError:
            raise
        except Exception as error:  # of huggingface_hub, hf_xet, the network or the disk
            raise self._refusal(error, "fetch") from error
        self._remember(Path(folder), commit)
        return self._found(Path(folder), commit)

    def _remember(self, folder: Path, commit: str) -> None:
        """Write down in the cache which commit a branch is at, for runs without a network."""
        ref = folder.parents[1] / "refs" / (self.address.revision or "main")
        with contextlib.suppress(OSError):  # a cache that is shared may be read-only
            if ref.name != commit and not (ref.is_file() and ref.read_text() == commit):
                ref.parent.mkdir(parents=True, exist_ok=True)
                ref.write_text(commit)

    # --- the cache --------------------------------------------------------------------------------------------------

    def _cached(self) -> Path:
        """The files of the cache alone.

        Raises:
            VideoAlignError: Where it lacks some; with the command that fetches them.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RevisionResolutionError

        address = self.address
        why = _silent[0] if _silent else "HF_HUB_OFFLINE is set"
        try:
            commit = (
                HfApi()
                .resolve_revision(address.id, repo_type=address.kind, revision=address.revision, local_files_only=True)
                .resolved
            )
            found = self._kept(commit, trusting=True)
        except RevisionResolutionError:
            found = None
        if found is None:
            from huggingface_hub import constants

            here = "" if "://" in address.given else f"there is no such {self.what} on this machine, and "
            raise VideoAlignError(
                f"{address.given}: {here}the cache {constants.HF_HUB_CACHE} does not hold all of it "
                f"({why}). On a machine with a network type: {address.command(self.parts)} (and copy that cache "
                "here), or name a local folder"
            )
        if _silent:
            _say(f"note: {address.given} is read from the cache as it is ({why})")
        return self._found(found, commit)

    def _kept(self, commit: str, trusting: bool = False) -> Path | None:
        """The snapshot's folder in the cache; None where it lacks a file that is wanted.

        Args:
            commit: Commit of the snapshot.
            trusting: Whether a snapshot is taken that another program filled, without a list of all files: what it
                lacks shows when it is read.
        """
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        address = self.address
        try:
            folder = Path(
                snapshot_download(
                    address.id, repo_type=address.kind, revision=commit, local_files_only=True, allow_patterns=[]
                )
            )
        except LocalEntryNotFoundError:
            return None
        known = self.listing(commit, online=False)
        if known is None:
            if not trusting:
                return None
            inside = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
            return folder if self._wanted(dict.fromkeys(inside, 0), there=False) else None
        return folder if all((folder / name).exists() for name in self._wanted(known)) else None

    # --- files ------------------------------------------------------------------------------------------------------

    def listing(self, commit: str, online: bool) -> dict[str, int] | None:
        """Sizes of all files of a commit by name; None where the cache has no list of them and the hub is not asked."""
        from huggingface_hub import HfApi, get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError

        address = self.address
        try:
            files = get_cached_repo_tree(address.id, repo_type=address.kind, revision=commit)
        except CachedRepoTreeNotFoundError:
            if not online:
                return None
            files = HfApi().list_repo_tree(address.id, repo_type=address.kind, revision=commit, recursive=True)
        return {file.path: file.size for file in files if hasattr(file, "size")}  # folders have none

    def _chosen(self) -> bool:
        """Whether less than the whole repository is wanted."""
        return bool(self.address.path) or self.parts is not None or self.now is not None

    def _wanted(self, sizes: dict[str, int], there: bool = True) -> dict[str, int]:
        """The files that this call asks for, of all files of a commit.

        Args:
            sizes: Sizes by name.
            there: Whether to refuse a path that names nothing.
        """
        path, patterns = self.address.path, self.parts if self.now is None else self.now
        below = {name: name[len(path) :].lstrip("/") for name in sizes if not path or f"{name}/".startswith(f"{path}/")}
        if path and there and not below:
            at = self.address.revision or "main"
            raise VideoAlignError(f"{self.address.given}: {self.address.id} has no {path} at revision {at}")
        wanted = (
            name
            for name, inner in below.items()
            if not inner or patterns is None or any(matches(inner, pattern) for pattern in patterns)
        )
        return {name: sizes[name] for name in wanted}

    # --- refusals ---------------------------------------------------------------------------------------------------

    def _refusal(self, error: Exception, doing: str) -> Exception:
        """What to raise for an error of the hub's client."""
        from huggingface_hub import constants

        a, status = self.address, getattr(getattr(error, "response", None), "status_code", None)
        page = f"{constants.ENDPOINT}/{'datasets/' if a.kind == 'dataset' else ''}{a.id}"
        login = "`hf auth login` (or HF_TOKEN) gives this machine a token"
        here = "" if "://" in a.given else f"there is no such {self.what} on this machine, and "
        if named(error, "RevisionNotFoundError"):
            return VideoAlignError(f"{a.given}: {a.id} has no revision {a.revision or 'main'}; see {page}/tree/main")
        if named(error, "GatedRepoError"):
            return VideoAlignError(
                f"{a.given} is open to those alone who accepted its terms: accept them at {page}, and {login}"
            )
        if status == 403:
            return VideoAlignError(f"{a.given}: this machine's token may not read {page}; {login} that may")
        if status in (401, 404):
            return VideoAlignError(
                f"{a.given}: {here}the hub has no {a.kind} {a.id} that this machine may read; look how it is spelled. "
                f"If it is private: {login}"
            )
        if number := getattr(error, "errno", None):
            return _disk(a.given, number, str(constants.HF_HUB_CACHE))
        if doing == "look" and (status is None or status == 429 or status >= 500):
            how = f"answers {status}" if status else f"cannot be reached, {sentence(error)}"
            return _Unanswered(f"{constants.ENDPOINT} {how}")
        why = f"the hub answers {status}" if status else sentence(error)
        return VideoAlignError(
            f"{a.given}: the download broke off ({why}); files that arrived whole are kept, and the same command goes "
            "on with the others"
        )


class _Unanswered(Exception):
    """The hub does not answer; the text says how."""


def _disk(given: str, number: int, cache: str) -> VideoAlignError:
    remedy = "let HF_HOME name a folder that can be written"
    if number in (errno.ENOSPC, errno.EDQUOT):
        remedy = "make room, or let HF_HOME name a folder on a larger disk; files that arrived whole are kept"
    return VideoAlignError(f"{given}: the cache {cache} cannot be written ({os.strerror(number)}); {remedy}")


def _offline() -> bool:
    from huggingface_hub import constants

    return constants.is_offline_mode()


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """Result of a call that must end in time; a client's own limits hold for each of a host's addresses anew.

    Args:
        seconds: Seconds that it may take.
        call: What is called, in a thread of its own.

    Raises:
        TimeoutError: Where it takes longer.
    """
    result: Future = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    Thread(target=run, daemon=True).start()
    return result.result(seconds)


@functools.cache
def _say(text: str) -> None:
    """Print a line once, on one process of a run."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"videoalign: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out the client's own warnings: this file says what they say, and they name signed addresses."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def bars() -> contextlib.AbstractContextManager:
    """Show the client's bars on a terminal of one process; anywhere else they would fill a log."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars

    shown = sys.stderr.isatty() and os.environ.get("LOCAL_RANK", "0") == "0"
    return contextlib.nullcontext() if shown or are_progress_bars_disabled() else disable_progress_bars()
