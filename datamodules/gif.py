"""Check of GIF files, block by block: decoders stop silently where a GIF is cut or damaged, so that frames get lost."""

import struct

from .. import VideoAlignError
from .limits import FRAME_PIXELS

_TRAILER, _EXTENSION, _IMAGE = 0x3B, 0x21, 0x2C


def check_gif(content: bytes) -> int:
    """Walk over all blocks of a GIF.

    Args:
        content: Content of the file.

    Returns:
        Number of pictures.

    Raises:
        VideoAlignError: If the pictures are too large, if the file ends inside a block, or if a block begins with
            unknown bytes. The message is the rest of a sentence that begins with the file's name.
    """
    width, height = struct.unpack("<HH", content[6:10].ljust(4, b"\0"))
    if why := FRAME_PIXELS.excess(width * height):
        raise VideoAlignError(f"({width}x{height}) {why}")
    pictures, at = 0, 13 + _colours(content, 10)
    while at < len(content) and content[at] != _TRAILER:
        if content[at] == _IMAGE:
            pictures += 1
            at = _after(content, at + 11 + _colours(content, at + 9))
        elif content[at] == _EXTENSION:
            at = _after(content, at + 2)
        elif not content[at:].strip(b"\0;"):  # padding at the end
            break
        else:
            raise VideoAlignError(f"is damaged: after {pictures} pictures, byte {at} begins no block of a GIF")
    if at > len(content):
        raise VideoAlignError(f"is truncated: it ends in the middle of picture {pictures} or of what follows it")
    return pictures


def _colours(content: bytes, at: int) -> int:
    """Size in bytes of the colour table that the flags at an offset announce."""
    flags = content[at] if at < len(content) else 0
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _after(content: bytes, at: int) -> int:
    """The offset after a chain of sub-blocks, which an empty one ends; beyond the file if the chain is cut."""
    while at < len(content) and content[at]:
        at += content[at] + 1
    return at + 1
