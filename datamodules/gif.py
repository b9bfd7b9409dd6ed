"""GIF files as blocks: decoders stop without a word where a GIF was cut or damaged, so that frames are lost silently."""

import struct

from .. import VideoAlignError
from .limits import FRAME_PIXELS

_TRAILER, _EXTENSION, _IMAGE = 0x3B, 0x21, 0x2C


def check_gif(content: bytes) -> int:
    """Walk over all blocks of a GIF.

    Args:
        content: The file.

    Returns:
        Number of pictures.

    Raises:
        VideoAlignError: Where the pictures are too large, or the file ends inside a block, or something else stands in the place of one; the message
            is the rest of a sentence that begins with the file's name.
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
        elif not content[at:].strip(b"\0;"):  # filled up at the end
            break
        else:
            raise VideoAlignError(f"is damaged: after {pictures} pictures, byte {at} begins no block of a GIF")
    if at > len(content):
        raise VideoAlignError(f"is truncated: it ends in the middle of picture {pictures} or of what follows it")
    return pictures


def _colours(content: bytes, at: int) -> int:
    """Bytes of the table of colours that the flags at a place announce."""
    flags = content[at] if at < len(content) else 0
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _after(content: bytes, at: int) -> int:
    """The place after a chain of sub-blocks, which an empty one ends; beyond the file where the chain is cut."""
    while at < len(content) and content[at]:
        at += content[at] + 1
    return at + 1
