"""Publishing a folder on the hub: one commit with all of it and its card, or nothing."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import VideoAlignError
from ..errors import named, sentence
from ..models.files import write_text
from ..models.hub import address_of, bars, quiet, within
from ..models.hub_address import matches
from .card_metrics import measured
from .cards import card_of, training_of, untouched
from .publication import Subject, subject_of

README = "README.md"


@dataclass(frozen=True)
class Wishes:
    """What the user says of a publication.

    Attributes:
        to: Repository, ``ORG/NAME``.
        revision: Branch; None for the default one.
        licence: Licence by its name on the hub.
        base: Hub id of the model that it is built on.
        base_licence: Licence of that model.
        data: Sets that it was trained on.
        metrics: Files of results for the card.
    """

    to: str
    revision: str | None = None
    licence: str | None = None
    base: str | None = None
    base_licence: str | None = None
    data: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()


def push(
    folder: str, wishes: Wishes, private: bool = False, new_card: bool = False, card_only: str | None = None
) -> str | None:
    """Publish a folder: one commit, or none where the hub has the same content already.

    Args:
        folder: Exported model or adapters, or a set.
        wishes: What the user says of it.
        private: Whether a new repository is private.
        new_card: Whether a card that somebody wrote or changed is replaced.
        card_only: File that the card alone is written to, ``-`` for the screen; nothing is published then.

    Returns:
        Address of the commit; None where nothing was published.

    Raises:
        VideoAlignError: Where the folder is not whole, this machine may not write there, or the hub does not answer.
    """
    _check(wishes)
    if card_only not in (None, "-") and os.path.lexists(card_only):
        raise VideoAlignError(f"--card-only {card_only} exists already; name a new file or remove it first")
    api = None if card_only else _api(wishes.to)
    results = [measured(path) for path in wishes.metrics]
    subject = subject_of(Path(folder), wishes.base)
    if not subject.is_data:
        subject.facts["training"] = training = training_of(Path(folder), wishes.data)
        generator = training["generator"]
        if subject.base is None and generator and subject.kind != "reward" and address_of(generator):
            subject.base = generator
    card = card_of(subject, wishes.to, wishes.revision, (wishes.licence, wishes.base_licence), results)
    if api is None:
        if card_only == "-":
            print(card, end="")
        else:
            write_text(Path(str(card_only)), card)
        return None
    for hint in _hints(subject, wishes):
        print(f"note: {hint}", file=sys.stderr)
    with quiet():
        return _publish(api, subject, wishes, private, new_card, card)


def _check(wishes: Wishes) -> None:
    for option, place in (("--to", wishes.to), ("--base", wishes.base)):
        name, at, revision = (place or "ORG/NAME").partition("@")
        if name.count("/") != 1 or address_of(f"hf://models/{name}") is None or (at and not revision):
            raise VideoAlignError(f"{option} {place}: name a repository on the hub, as ORG/NAME")
        if at and option == "--to":
            raise VideoAlignError(f"--to {place}: name the branch with --revision {revision}")


def _hints(subject: Subject, wishes: Wishes) -> list[str]:
    """What the card cannot say, and how it could."""
    lacks = []
    if not wishes.licence:
        lacks.append("the card states no licence, so nobody may use this; name one with --license")
    if subject.kind in ("lora", "transformer") and not subject.base:
        lacks.append("the card names no generator that these weights belong to; name it with --base")
    return lacks


def _api(to: str) -> Any:
    """The hub's client, after a look whether the hub answers and knows this machine's token."""
    from huggingface_hub import HfApi, constants, get_token

    if get_token() is None:
        raise VideoAlignError(
            f"--to {to}: this machine has no token that may write there; `hf auth login` (or HF_TOKEN) gives it one"
        )
    api, limit = HfApi(), float(constants.HF_HUB_ETAG_TIMEOUT)
    try:
        within(limit, api.whoami)
    except Exception as error:
        raise _refusal(error, to, constants.ENDPOINT) from error
    return api


def _publish(api: Any, subject: Subject, wishes: Wishes, private: bool, new_card: bool, card: str) -> str | None:
    """Make the repository and the commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, constants

    kind = "dataset" if subject.is_data else "model"
    page = f"{constants.ENDPOINT}/{'datasets/' if subject.is_data else ''}{wishes.to}"
    try:
        api.create_repo(wishes.to, repo_type=kind, private=private or None, exist_ok=True)
        before = _head(api, wishes, kind)
        if private and not before.private:
            raise VideoAlignError(f"{page} is public already, so nothing was sent: --private makes new ones private")
        contents: dict[str, Any] = {name: str(subject.folder / name) for name in subject.files}
        contents |= subject.changed
        if (text := _card(api, subject, wishes, kind, before.sha, new_card, card)) is not None:
            contents[README] = text.encode()
        operations: list[Any] = [CommitOperationAdd(name, value) for name, value in contents.items()]
        there = [file.rfilename for file in before.siblings or ()]
        left = [n for n in there if n not in contents and any(matches(n, pattern) for pattern in subject.owned)]
        operations += [CommitOperationDelete(name) for name in left]
        print(f"sending {len(contents)} files of {subject.folder} to {page}", file=sys.stderr, flush=True)
        with bars():
            commit = api.create_commit(
                wishes.to,
                operations,
                commit_message=f"{subject.kind} by videoalign push",
                repo_type=kind,
                revision=wishes.revision,
            )
    except VideoAlignError:
        raise
    except Exception as error:  # of huggingface_hub, hf_xet or the network
        raise _refusal(error, wishes.to, constants.ENDPOINT) from error
    if commit.oid == before.sha:
        print(f"{page} holds all of it already; nothing was changed")
        return None
    print(f"published: {page} (commit {commit.oid[:12]})")
    return str(commit.commit_url)


def _head(api: Any, wishes: Wishes, kind: str) -> Any:
    """What the hub says of the branch; the branch is created if it is not there."""
    from huggingface_hub.errors import RevisionNotFoundError

    if wishes.revision:
        try:
            return api.repo_info(wishes.to, repo_type=kind, revision=wishes.revision)
        except RevisionNotFoundError:
            api.create_branch(wishes.to, branch=wishes.revision, repo_type=kind)
    return api.repo_info(wishes.to, repo_type=kind, revision=wishes.revision)


def _card(api: Any, subject: Subject, wishes: Wishes, kind: str, commit: str, new: bool, card: str) -> str | None:
    """The card to send; None where the one on the hub stays, which somebody wrote or changed.

    The folder's own README.md goes before one that is made here.
    """
    from huggingface_hub.errors import EntryNotFoundError

    own = subject.folder / README
    if own.is_file() and not new:
        text = own.read_text(encoding="utf-8")
        if not untouched(text):
            print(f"note: {own} is the card; --new-card sends one that is made from the folder", file=sys.stderr)
            return text
    try:
        there = Path(api.hf_hub_download(wishes.to, README, repo_type=kind, revision=commit)).read_text(
            encoding="utf-8"
        )
    except EntryNotFoundError:
        return card
    if new or untouched(there):
        return card
    print("note: the card on the hub was written by somebody and stays; --new-card replaces it", file=sys.stderr)
    return None


def _refusal(error: Exception, to: str, endpoint: str) -> VideoAlignError:
    """The message for an error of the hub's client; nothing was published then."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    login = "`hf auth login` (or HF_TOKEN) gives this machine another one"
    if status == 401:
        return VideoAlignError(f"--to {to}: the hub does not know this machine's token; {login}")
    if status in (403, 404):
        return VideoAlignError(f"--to {to}: this machine's token may not write there; {login}, with write access")
    if isinstance(error, ValueError) and "metadata" in str(error):
        lines: Sequence[str] = str(error).splitlines()
        return VideoAlignError(f"--to {to}: the hub refuses the card: {' '.join(lines)[:300]}")
    if status is None and named(error, "TransportError", "TimeoutError", "OfflineModeIsEnabled"):
        return VideoAlignError(f"--to {to}: {endpoint} cannot be reached ({sentence(error)}); nothing was published")
    why = f"it answers {status}" if status else sentence(error)
    return VideoAlignError(
        f"--to {to}: the hub did not take all of it ({why}), and nothing was published; the same command sends what is "
        "missing"
    )
