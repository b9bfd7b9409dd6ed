"""Members of a tar file that are plain files, and what a file is compressed by that should be no archive but a tar."""

import tarfile
from collections.abc import Iterator
from pathlib import Path

_COMPRESSED = {
    "gzip": b"\x1f\x8b",
    "bzip2": b"BZh",
    "xz": b"\xfd7zXZ\x00",
    "zstd": b"(\xb5/\xfd",
    "zip": b"PK\x03\x04",
}
"""First bytes of files by what compresses them."""


def compression(path: Path) -> str | None:
    """Name of what a file is compressed by, as its first bytes say; None where it is not.

    Args:
        path: Path of the file.
    """
    with path.open("rb") as file:
        begin = file.read(6)
    return next((name for name, mark in _COMPRESSED.items() if begin.startswith(mark)), None)


def plain_files(tar: tarfile.TarFile, path: Path, contents: bool) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Members of an archive with their contents.

    Args:
        tar: The open archive.
        path: Its path.
        contents: Whether to read all members; otherwise the records alone are read, and others come empty.

    Raises:
        ValueError: If a member is no plain file, or cannot be whole.
    """
    there = path.stat().st_size
    for member in tar:
        if not member.isreg() or member.issparse():  # a sparse one may stand for terabytes
            raise ValueError(f"member {member.name!r} is no regular file")
        if member.offset_data + member.size > there:
            raise ValueError(f"member {member.name!r} is cut short, or states a wrong size")
        read = contents or member.name.endswith(".json")
        yield member, tar.extractfile(member).read() if read else b""
