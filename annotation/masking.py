"""Boxes over watermarks that name a source, burned into the videos which people see.

A box that is only drawn by the page could be taken away there. So a masked video is decoded, painted and encoded anew,
and nobody is sent the original one.
"""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import av
import numpy as np

from .. import VideoAlignError
from ..datamodules.container import opened, survey
from ..datamodules.tables import sound_rows

EVERY = "*"
"""Source of a box that all videos get."""
GREY = 128
CRF = 14
"""Quality of masked videos, as H.264 counts it: 0 is lossless, and below 18 nobody sees a difference."""


@dataclass(frozen=True)
class Mask:
    """A box over all videos of a source.

    Attributes:
        source: The source, or ``*`` for all of them.
        box: Left edge, upper edge, width and height. Where all of them are at most 1 they are shares of the width and
            height of the picture, otherwise pixels.
    """

    source: str
    box: tuple[float, float, float, float]

    def pixels(self, width: int, height: int) -> tuple[slice, slice]:
        """Rows and columns of a picture that the box covers, each cut pixel included.

        Raises:
            VideoAlignError: The box lies outside of the picture.
        """
        x, y, w, h = self.box
        if max(self.box) <= 1:
            x, y, w, h = x * width, y * height, w * width, h * height
        if x >= width or y >= height:
            raise VideoAlignError(f"the box {self.box} lies outside of the picture, which is {width}x{height}")
        return slice(math.floor(y), math.ceil(y + h)), slice(math.floor(x), math.ceil(x + w))


def read_masks(words: Sequence[str] = (), table: str | None = None) -> list[Mask]:
    """The boxes of ``--mask SOURCE=x,y,w,h`` and of a CSV file with columns ``source, x, y, w, h``.

    Args:
        words: Values of ``--mask``.
        table: Value of ``--masks``.

    Raises:
        VideoAlignError: One of them is no box.
    """
    found = []
    for word in words:
        source, sign, box = word.rpartition("=")
        if not sign or not source:
            raise VideoAlignError(f"--mask {word}: it must be like SOURCE=x,y,w,h, or '*=x,y,w,h' for all sources")
        found.append(_mask(source, box.split(","), f"--mask {word}"))
    for number, row in sound_rows(table, ("source", "x", "y", "w", "h"), f"--masks {table}") if table else ():
        found.append(_mask(row["source"], [row[name] for name in "xywh"], f"--masks {table}, line {number}"))
    return found


def _mask(source: str, numbers: Sequence[str], where: str) -> Mask:
    try:
        x, y, w, h = map(float, numbers)
    except ValueError:
        raise VideoAlignError(f"{where}: a box is four numbers x,y,w,h, got {','.join(numbers)!r}") from None
    box = (x, y, w, h)
    if not all(map(math.isfinite, box)) or min(x, y) < 0 or min(w, h) <= 0:
        raise VideoAlignError(f"{where}: x and y must be at least 0, w and h more than 0")
    if max(box) > 1 and not all(number.is_integer() for number in box):
        raise VideoAlignError(f"{where}: a box is in whole pixels, or in shares of the picture that are at most 1")
    return Mask(source, box)


def masks_by_source(masks: Iterable[Mask], sources: Iterable[str]) -> Mapping[str, list[Mask]]:
    """The boxes of each source that has any, those of ``*`` included.

    Args:
        masks: All boxes.
        sources: Sources of the videos.

    Raises:
        VideoAlignError: A box is for a source that has no video.
    """
    masks, named = [*masks], {*sources}
    if unknown := sorted({mask.source for mask in masks} - named - {EVERY}):
        known = ", ".join(sorted(filter(None, named))) or "no source at all"
        raise VideoAlignError(f"--mask {unknown[0]}: there is no video of that source; the set has {known}")
    found = {source: [mask for mask in masks if mask.source in (source, EVERY)] for source in sorted(named)}
    return {source: boxes for source, boxes in found.items() if boxes}


def masked(video: bytes, masks: Sequence[Mask], name: str) -> bytes:
    """The same video with grey boxes, as an mp4 file (H.264) without sound; time stamps stay as they are.

    Args:
        video: Content of the video file.
        masks: Boxes, in the picture as a player shows it.
        name: What to call the video in messages.

    Raises:
        VideoAlignError: The video cannot be read, or a box lies outside of its picture.
    """
    buffer, film = io.BytesIO(), survey(video, name)
    with opened(video, name) as source, av.open(buffer, "w", "mp4", options={"fflags": "+bitexact"}) as out:
        track = source.streams[film.index]
        options = {"crf": str(CRF), "preset": "veryfast", "threads": "1"}
        stream = out.add_stream("libx264", rate=track.average_rate or track.guessed_rate or 24, options=options)
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", track.time_base
        for number, frame in enumerate(source.decode(track)):
            picture = _painted(frame, masks, name)
            if not number:
                stream.height, stream.width = picture.shape[:2]
                ratio = track.sample_aspect_ratio
                if ratio:
                    stream.sample_aspect_ratio = 1 / ratio if round(frame.rotation / 90) % 2 else ratio
            new = av.VideoFrame.from_ndarray(picture, format="rgb24")
            new.pts, new.time_base = frame.pts, track.time_base
            out.mux(stream.encode(new.reformat(format="yuv420p")))
        out.mux(stream.encode(None))
    return buffer.getvalue()


def _painted(frame: av.VideoFrame, masks: Sequence[Mask], name: str) -> np.ndarray:
    """Picture (H, W, 3) of a frame with its boxes; odd sides, which H.264 does not have, lose one pixel."""
    picture = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
    height, width = picture.shape[0], picture.shape[1]
    picture = np.ascontiguousarray(picture[: height - height % 2, : width - width % 2])
    for mask in masks:
        try:
            rows, columns = mask.pixels(width, height)
        except VideoAlignError as error:
            raise VideoAlignError(f"--mask {mask.source}: {name}: {error}") from None
        picture[rows, columns] = GREY
    return picture
