"""Finding the video of a set that another program names by a path, an address, or a key of the set.

A name fits a video by *path* where it ends in the path of the video's record, or is an end of that path; the longest
end counts. It fits by *key* where its file name is ``KEY`` or ``KEY.mp4``, as files are called that were unpacked from
shards. Numbered files look like keys, and one file name may occur in many folders. So nothing is guessed where two
readings mean different videos, unless a folder agrees too: no key has one.
"""

import base64
import binascii
import posixpath
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote, unquote_plus, urlsplit

from .. import VideoAlignError

NAMES = ("both", "paths", "keys", "files")
"""What names may be: paths or keys of the records (where only one of the two fits), paths alone, keys alone, or file
names in whatever folder."""
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_PREFIX = re.compile(r"\A[0-9a-f]{8}-(?=.)")
"""Prefix that Label Studio puts before the name of an uploaded file."""


class Names:
    """The videos of a set, to be found by the names that another program gives them.

    Args:
        records: The videos' records by key.
        by: One of :data:`NAMES`.
    """

    def __init__(self, records: Mapping[str, Mapping[str, Any]], by: str = "both") -> None:
        if by not in NAMES:
            raise VideoAlignError(f"--names {by}: choose one of {', '.join(NAMES)}")
        self.records, self.by = records, by
        self.paths = {k: parts(r["path"]) for k, r in records.items() if isinstance(r.get("path"), str)}
        self._files: dict[str, set[str]] = {}
        self._uploads: dict[str, set[str]] = {}
        for key, path in self.paths.items():
            for name in {path[-1], posixpath.splitext(path[-1])[0]} if path else ():
                self._files.setdefault(name, set()).add(key)
                self._uploads.setdefault(_stored(name), set()).add(key)
        self._example: dict[str, tuple[str, str]] = {}

    def find(self, name: str, where: str, prompt: str | None) -> set[str]:
        """The key of the video that a name means; several keys only where one file was imported under several prompts.

        Args:
            name: The name as the other program writes it.
            where: The place of the name, for messages.
            prompt: The prompt that the other program writes beside it, if any; videos of other prompts are not meant.

        Raises:
            VideoAlignError: No video is meant, or it is not certain which one.
        """
        paths, keys, files = self._fits(name)
        if self.by != "both":
            found = {"paths": paths, "keys": keys, "files": files}[self.by]
            return self._one(self._of_prompt(found, prompt) or found, name, where, files)
        meant = [self._of_prompt(found, prompt) for found in (paths, keys, files)]
        if any(meant):  # otherwise the caller's message about the prompt is the better one
            paths, keys, files = meant
        if keys and (others := (paths or files) - keys):
            by_key, by_path = self._called(min(keys)), self._called(min(others))
            raise VideoAlignError(
                f"{where}: {name!r} is the key of the video {by_key}, and the file name of {by_path}; "
                f"say with --names paths or --names keys what the names are{'' if paths else ' (or --names files)'}"
            )
        found = self._one(paths or keys, name, where, files)
        if paths != keys and (paths or found & self.paths.keys()):
            self._of_one_kind("paths" if paths else "keys", where, name)
        return found

    def _of_one_kind(self, kind: str, where: str, name: str) -> None:
        """Refuse a mixture of names that fit only by path and names that fit only by key: one kind fits by chance."""
        self._example.setdefault(kind, (where, name))
        if len(self._example) == 2:
            (there, path), (here, key) = self._example["paths"], self._example["keys"]
            raise VideoAlignError(
                f"{there}: {path!r} is a path of the set's records and no key, but {here}: {key!r} is a key and no "
                "path; names that are of two kinds fit by chance. Say with --names paths or --names keys what they are"
            )

    def _one(self, found: set[str], name: str, where: str, files: set[str]) -> set[str]:
        """Refuse a name that fits no video, or several; ``files``: what it fits by file name, for a hint."""
        if not found:
            stem = posixpath.splitext(posixpath.basename(name))[0]
            called = self._called(min(files)) if files else ""
            hint = f"; its file name is that of {called}, which --names files goes by" if files else ""
            raise VideoAlignError(
                f"{where}: there is no video {stem!r} in the set, neither by path nor by key ({name!r}){hint}"
            )
        if len({tuple(self.paths.get(key, (key,))) for key in found}) > 1:
            first, second = (self._called(key) for key in sorted(found)[:2])
            raise VideoAlignError(
                f"{where}: {name!r} fits {len(found)} videos, among them {first} and {second}; name videos by paths "
                "that are unique, or by their keys"
            )
        return found

    def _called(self, key: str) -> str:
        """A video in a message: its key and path."""
        return f"{key!r} ({self.records[key]['path']})" if key in self.paths else repr(key)

    def _of_prompt(self, keys: set[str], prompt: str | None) -> set[str]:
        return {key for key in keys if prompt in (None, str(self.records[key].get("prompt")).strip())}

    def _fits(self, name: str) -> tuple[set[str], set[str], set[str]]:
        """Keys of videos that a name fits by path, by key, and by file name whatever the folder."""
        paths, keys, files, sure = set(), set(), set(), False
        for reading in readings(name):
            bare = _PREFIX.sub("", reading[-1])
            if "upload" in reading[-3:-1]:  # an upload has lost its folders
                for file in {reading[-1], bare}:
                    keys |= self._by_key(file)
                    files |= self._files.get(file, set()) | self._uploads.get(file, set())
                paths |= files
                continue
            found, agrees = self._by_path(reading)
            paths |= found
            sure |= agrees > 1
            keys |= self._by_key(reading[-1])
            files |= self._files.get(reading[-1], set())
            if len(reading) == 1 and not (paths or keys):
                paths |= self._by_path([bare])[0]
                keys |= self._by_key(bare)
        return paths, set() if sure and self.by == "both" else keys, files | paths

    def _by_key(self, file: str) -> set[str]:
        return {key for key in (file, file.removesuffix(".mp4")) if key in self.records}

    def _by_path(self, reading: Sequence[str]) -> tuple[set[str], int]:
        """Videos whose path ends like the name, for the longest such end only; and its length in folders and file."""
        lengths = {}
        for key in self._files.get(reading[-1], set()):
            path = self.paths[key]
            length = min(len(path), len(reading))
            if path[-length:-1] == list(reading[-length:-1]):
                # the whole path counts more than an end of it
                lengths[key] = length, len(path) == len(reading)
        longest = max(lengths.values(), default=(0, False))
        return {key for key, length in lengths.items() if length == longest}, longest[0]


def readings(name: str) -> list[list[str]]:
    """The paths that a name may mean, each as folders and a file name.

    Percent-encoding and queries may be part of a file's name or not; both are tried.
    """
    if "/local-files/?d=" in f"/{name}":  # Label Studio's address of a local file
        inner = name.partition("?d=")[2]
        texts = [inner, unquote(inner), unquote_plus(inner), unquote(inner.partition("&")[0])]
    elif "?fileuri=" in name:  # Label Studio's address of a file in a cloud
        texts = [_decoded(unquote(name.partition("fileuri=")[2].partition("&")[0]))]
    elif _ADDRESS.match(name):
        address = urlsplit(name)
        texts = [f"{address.netloc}/{path}" for path in (address.path, unquote(address.path))]
        texts += [name.partition("://")[2]] if address.scheme not in ("http", "https") else []
    else:
        texts = [name, unquote(name), unquote(urlsplit(name).path) if name.startswith("/") else name]
    return [list(p) for p in dict.fromkeys(tuple(parts(text)) for text in texts) if p]


def parts(path: str) -> list[str]:
    """Folders and file name of a path, with accented letters in one encoding (NFC)."""
    plain = posixpath.normpath(unicodedata.normalize("NFC", path.strip().replace("\\", "/")))
    return [part for part in plain.split("/") if part not in ("", ".", "..")]


def _decoded(text: str) -> str:
    try:
        return urlsplit(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode()).path
    except (binascii.Error, ValueError):
        return ""


def _stored(name: str) -> str:
    """A file's name as Label Studio stores an upload (Django's get_valid_filename): no spaces, few other signs."""
    return re.sub(r"[^-\w.]", "", name.strip().replace(" ", "_"))
