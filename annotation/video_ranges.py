"""Serving a video, or the part of it that a browser asks for, out of a shard; and how long it is."""

import re
from collections.abc import Iterator

from starlette.responses import Response, StreamingResponse

from ..datamodules.container import survey
from ..datamodules.contents import Content

CHUNK = 1 << 18
"""Number of bytes that are read at once."""


def length_of(content: Content) -> float:
    """Length of a video in seconds: of its record, or else of the file."""
    frames, fps = content.record.get("num_frames"), content.record.get("fps")
    if not (isinstance(frames, int) and isinstance(fps, int | float) and frames > 0 and fps > 0):
        clip = survey(content.read("mp4"), content.name).clip
        frames, fps = clip.frames, clip.fps or 24
    return frames / fps


def ranged(content: Content, wanted: str | None) -> Response:
    """A video, or a part of it (RFC 9110, section 14).

    Args:
        content: The video.
        wanted: The request's Range header, if it has one; what is no range of bytes is ignored.
    """
    size = content.spans["mp4"].size
    headers = {"Accept-Ranges": "bytes", "Cache-Control": "private, max-age=3600"}  # its address holds the ticket
    first, last, status = 0, size - 1, 200
    if part := _part(wanted or "", size):
        first, last = part
        if first > last:
            return Response(status_code=416, headers={"Content-Range": f"bytes */{size}"})
        headers["Content-Range"], status = f"bytes {first}-{last}/{size}", 206
    headers["Content-Length"] = str(last - first + 1)
    return StreamingResponse(_read(content, first, last + 1), status, headers, "video/mp4")


def _part(wanted: str, size: int) -> tuple[int, int] | None:
    """First and last byte that a Range header asks for; None where it is no range of bytes."""
    match = re.fullmatch(r"bytes=(\d{0,15})-(\d{0,15})", wanted.strip())
    begin, end = ((int(number) if number else None) for number in match.groups()) if match else (None, None)
    if begin is None:
        return None if end is None else (max(size - end, 0), size - 1)
    if end is not None and begin > end:
        return None
    return begin, size - 1 if end is None else min(size - 1, end)


def _read(content: Content, start: int, end: int) -> Iterator[bytes]:
    if content.file.store.remote:  # whole, so that it is compared with its checksum and kept in the cache
        yield content.read("mp4")[start:end]
        return
    first = content.spans["mp4"].start
    for place in range(start, end, CHUNK):
        yield content.file.store.fetch(content.file.name, first + place, first + min(place + CHUNK, end))
