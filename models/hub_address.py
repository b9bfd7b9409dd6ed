"""Addresses on the Hugging Face hub, and patterns of the files that are wanted there."""

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from .. import VideoAlignError

Kind = Literal["model", "dataset"]
_ID = re.compile(r"[\w.-]+/[\w.-]+(@.+)?")
_MANY = 4
"""Patterns up to this number are spelled out in a command to type; more would hide it."""


@dataclass(frozen=True)
class Address:
    """A place on the hub.

    Attributes:
        kind: Kind of the repository.
        id: Its name, ``ORG/NAME``.
        revision: Branch, tag or commit; None for the default branch.
        path: Folder or file inside; empty for the whole.
        given: The place as the user wrote it.
    """

    kind: Kind
    id: str
    revision: str | None = None
    path: str = ""
    given: str = field(default="", compare=False)

    def command(self, parts: Sequence[str] | None) -> str:
        """The line that fetches it on a machine with a network.

        Args:
            parts: Patterns of the files that are needed, relative to ``path``; None for all.
        """
        words = ["hf", "download", self.id, "--revision", self.revision or "main"]
        words += ["--repo-type", "dataset"] if self.kind == "dataset" else []
        inside = f"{self.path}/" if self.path else ""
        if inside and (parts is None or len(parts) > _MANY):
            words += ["--include", f"{inside}*"]
        elif parts is not None and len(parts) <= _MANY:
            words += [word for part in parts for word in ("--include", inside + re.sub("/$", "/*", part))]
        return shlex.join(words)


def address_of(place: str | Path, kind: Kind = "model") -> Address | None:
    """The place on the hub that a text names; None where it names something on this machine.

    Args:
        place: Folder, file, or address on the hub. What exists on this machine is never on the hub.
        kind: Kind of repository that a name without ``hf://`` means.

    Raises:
        VideoAlignError: Where it begins as an address of the hub and is none.
    """
    text = re.sub(r"^hf:/(?!/)", "hf://", str(place))  # as pathlib writes it
    if "://" not in text:
        if Path(text).expanduser().exists() or text[:1] in ("", ".", "/", "~") or not _ID.fullmatch(text):
            return None
        text = f"hf://{kind}s/{text}"
    elif not text.startswith("hf://"):
        return None
    from huggingface_hub import parse_hf_uri
    from huggingface_hub.errors import HfUriError

    try:
        found = parse_hf_uri(text)
    except HfUriError as error:
        if "://" not in str(place):
            return None
        raise VideoAlignError(f"{place} is no address on the hub ({error.msg}); write hf://ORG/NAME@REVISION") from None
    if found.type not in ("model", "dataset"):
        raise VideoAlignError(f"{place} is a {found.type} of the hub; models and data sets alone are read")
    return Address(found.type, found.id, found.revision, found.path_in_repo.strip("/"), str(place))


def matches(name: str, pattern: str) -> bool:
    """Whether a file's path fits a pattern, folder by folder.

    Args:
        name: Path of the file, with slashes.
        pattern: ``*`` stands for anything but a slash; a slash at the end, for everything below that folder.
    """
    if pattern.endswith("/"):
        return name.startswith(pattern)
    names, patterns = name.split("/"), pattern.split("/")
    return len(names) == len(patterns) and all(map(fnmatchcase, names, patterns))


def in_cache(file: Path) -> bool:
    """Whether a file is a link that the hub's client made: from a snapshot in its cache to the contents beside it.

    Args:
        file: Path of the file.
    """
    if not file.is_symlink():
        return False
    file = Path(os.path.abspath(file))
    target = Path(os.path.normpath(file.parent / os.readlink(file)))
    repositories = [parent.parent for parent in file.parents if parent.name == "snapshots"]
    return any(target.parent == repository / "blobs" for repository in repositories)
