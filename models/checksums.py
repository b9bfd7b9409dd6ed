"""Checksums of exported weights: a flipped byte in a weight is a number like any other, and only a checksum tells.

A reward's folder keeps them in its record; an export in diffusers' format, which has no record of ours, in
``checksums.json`` beside its weights. Folders of earlier releases have none, and are read as they are.
"""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from .. import VideoAlignError
from .files import read_json, write_json

RECORD = "checksums.json"


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """The SHA-256 of plain values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def checksums(folder: Path) -> dict[str, str]:
    """Checksums of all safetensors files in a folder and below it, by their paths inside the folder."""
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in sorted(folder.rglob("*.safetensors"))}


def sort_metadata(path: Path) -> None:
    """Sort the metadata in a safetensors file's header, in place: the library writes them in random order
    (safetensors/safetensors#584).

    Args:
        path: File that was just written.
    """
    with open(path, "r+b") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:
            raise RuntimeError(f"{path}: its header would grow from {size} to {len(text)} bytes")
        file.seek(8)
        file.write(text.ljust(size))


def check(folder: Path, recorded: Any, record: str) -> None:
    """Compare a folder's files with recorded checksums.

    Args:
        folder: Folder that the paths are relative to.
        recorded: Checksums by path, as the record holds them; None where the folder is older than checksums.
        record: Name of the file that holds them, for messages.

    Raises:
        VideoAlignError: where a file is missing, or differs from what was written.
    """
    if recorded is None:
        return
    if not isinstance(recorded, dict) or not all(isinstance(value, str) for value in recorded.values()):
        raise VideoAlignError(
            f"{folder / record} holds no checksums by file name under sha256; export the folder again"
        )
    for name, want in recorded.items():
        path = folder / name
        if not path.is_file():
            raise VideoAlignError(f"{path} is missing, but {record} lists it. Copy or export the folder again.")
        if sha256_of(path) != want:
            raise VideoAlignError(
                f"{path} is not the file that was exported: its SHA-256 differs from the one in {record}, so at least one byte "
                "was changed. Copy or export the folder again."
            )


def seal(folder: Path) -> None:
    """Write ``checksums.json`` for the safetensors files of an export in diffusers' format."""
    write_json(folder / RECORD, {"sha256": checksums(folder)})


def check_seal(folder: Path, below: str = "") -> None:
    """Compare a folder with its ``checksums.json``, where it has one.

    Args:
        folder: Folder of an export.
        below: Path inside the folder to which the comparison is confined: a pipeline's part that is to be loaded.
    """
    if not (folder / RECORD).is_file():
        return
    found = read_json(folder / RECORD, "an exported folder")
    recorded = found.get("sha256") if isinstance(found, dict) else None
    if not isinstance(recorded, dict):
        raise VideoAlignError(
            f"{folder / RECORD} holds no checksums by file name under sha256; export the folder again"
        )
    check(folder, {name: value for name, value in recorded.items() if name.startswith(below)}, RECORD)
