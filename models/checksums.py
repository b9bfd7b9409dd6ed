"""Checksums of exported weights: a weight with a flipped byte is still a number, so only a checksum shows the damage.

A reward model's folder keeps the checksums of its weights in its record. An export in diffusers' format has no record
of this package, and its files are copied one by one: each file has its own checksum in its metadata, which other
programs ignore. Files and folders of earlier releases and of other programs have no checksums, and are read as they
are.
"""

import contextlib
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from .. import VideoAlignError

_KEY = "videoalign_sha256"
"""Key of a file's own checksum in its metadata."""
_ASIDE = ("format", _KEY)
"""Metadata that say nothing of what the tensors mean."""
_FIRST = 256
"""Number of bytes of each tensor that a stamp reads."""


def digest(value: Any) -> str:
    """SHA-256 of plain JSON values, as hexadecimal digits; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of all safetensors files in a folder and below it, by their paths inside the folder."""
    return {path.relative_to(folder).as_posix(): _sha256(path) for path in sorted(folder.rglob("*.safetensors"))}


def check(folder: Path, recorded: dict[str, str], record: str) -> None:
    """Compare a folder's files with recorded checksums.

    Args:
        folder: Folder that the paths are relative to.
        recorded: Checksums by path, as the record holds them.
        record: Name of the file that holds the checksums, for messages.

    Raises:
        VideoAlignError: Where a file is missing, or differs from what was written.
    """
    for name, want in recorded.items():
        path = folder / name
        if not path.is_file():
            raise VideoAlignError(f"{path} is missing, but {record} lists it. Copy or export the folder again.")
        if _sha256(path) != want:
            raise _changed(path, record)


def seal(path: Path) -> None:
    """Put a safetensors file's own checksum into its metadata, and sort the metadata.

    The library writes metadata in random order (safetensors/safetensors#584), so without sorting two exports of the
    same weights would differ in their bytes.

    Args:
        path: File that was just written; it is replaced when the new one is whole.
    """
    partial = path.with_name(f".{path.name}.sealing")
    with open(path, "rb") as file, open(partial, "wb") as out:
        header, start = _header(file), file.tell()
        metadata = {**header.get("__metadata__", {}), _KEY: _of_content(header, file)}
        text = json.dumps(
            {**header, "__metadata__": dict(sorted(metadata.items()))}, separators=(",", ":"), ensure_ascii=False
        )
        # the data begin at a multiple of 64 bytes, which vector instructions read fastest
        padded = text.encode() + b" " * (-(len(text.encode()) + 8) % 64)
        out.write(struct.pack("<Q", len(padded)) + padded)
        file.seek(start)
        shutil.copyfileobj(file, out, 1 << 24)
    os.replace(partial, path)


def check_seal(path: Path) -> None:
    """Compare a safetensors file with the checksum in its metadata, where it has one.

    Args:
        path: File to check. A file that cannot be read passes: the function that loads it refuses it.

    Raises:
        VideoAlignError: Where at least one byte differs from what was written.
    """
    try:
        with open(path, "rb") as file:
            header = _header(file)
            want = header.get("__metadata__", {}).get(_KEY)
            found = _of_content(header, file) if want else None
    except (OSError, ValueError, AttributeError, struct.error, MemoryError):
        return
    if found != want:
        raise _changed(path, "its metadata")


def stamp(files: Iterable[Path]) -> str:
    """Digest of safetensors files that shows in no time whether other weights took their place.

    Of each file enter its header and the first bytes of every tensor, which training changes. Of a damaged byte further
    on it knows nothing.

    Args:
        files: Files, in an order that does not depend on where they are.
    """
    sha = hashlib.sha256()
    for path in files:
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError, KeyError, struct.error, MemoryError):
            with open(path, "rb") as file:
                header = _header(file)
                start, said = file.tell(), header.pop("__metadata__", {})
                sha.update(digest([path.name, header, {n: v for n, v in said.items() if n not in _ASIDE}]).encode())
                for first, end in sorted(entry["data_offsets"] for entry in header.values()):
                    file.seek(start + first)
                    sha.update(file.read(min(_FIRST, end - first)))
    return sha.hexdigest()


def _header(file: BinaryIO) -> dict[str, Any]:
    """Read the header of a safetensors file; afterwards the file's position is at its data."""
    (size,) = struct.unpack("<Q", file.read(8))
    if size > os.fstat(file.fileno()).st_size:
        raise ValueError("the header is longer than the file")
    return json.loads(file.read(size))


def _of_content(header: dict[str, Any], file: BinaryIO) -> str:
    """Compute the checksum of a header, without the checksum that it holds, and of the data that follow."""
    metadata = {name: value for name, value in header.get("__metadata__", {}).items() if name != _KEY}
    sha = hashlib.sha256(digest({**header, "__metadata__": metadata}).encode())
    while block := file.read(1 << 24):
        sha.update(block)
    return sha.hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _changed(path: Path, where: str) -> VideoAlignError:
    return VideoAlignError(
        f"{path} is not the file that was exported: its SHA-256 differs from the one in {where}, so at least one byte "
        "was changed. Copy or export it again."
    )
