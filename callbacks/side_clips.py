"""Videos that are looked at side by side: as the animation of a logger, and as mp4 files of a page."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from ..datamodules.video import encode

GAP = 8
"""Pixels between two videos of an animation."""
LINE = 14
"""Height in pixels of a line of text below an animation."""
LEAST_WIDTH = 380
"""Least width in pixels of an animation with text below it."""


@dataclass(frozen=True)
class Clip:
    """Videos beside each other, with what is said about them.

    Attributes:
        sides: Frames of each video by its label, uint8 (T, H, W, 3), from the left to the right.
        fps: Frame rate, in frames per second.
        prompt: Text that the videos were generated from.
        table: Rows of cells that describe the videos, the first one with the heads; empty where there is nothing to
            say.
        height: Least height of a video as it is shown, in pixels; smaller ones are enlarged by a whole factor.
    """

    sides: Mapping[str, np.ndarray]
    fps: float
    prompt: str = ""
    table: Sequence[Sequence[str]] = ()
    height: int = 160

    def lines(self) -> list[str]:
        """What is said about the videos, as lines of text."""
        widths = [max(map(len, column)) for column in zip(*self.table)]
        rows = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in self.table]
        return ["   |   ".join(self.sides), *_wrapped(self.prompt), *rows]


def frames_of(video: Tensor) -> np.ndarray:
    """Frames (T, H, W, 3) of a video (T, 3, H, W), both uint8."""
    return np.ascontiguousarray(video.permute(0, 2, 3, 1).cpu().numpy())


def enlarge(picture: np.ndarray, least: int) -> Image.Image:
    """Enlarge a picture by a whole factor.

    Args:
        picture: (H, W, 3) uint8.
        least: Height in pixels that the result has at least.
    """
    factor = max(1, -(-least // picture.shape[0]))
    return Image.fromarray(picture).resize(
        (picture.shape[1] * factor, picture.shape[0] * factor), Image.Resampling.NEAREST
    )


def drawn(clip: Clip, texts: bool = True) -> list[Image.Image]:
    """Draw the frames of an animation: all videos beside each other; a shorter one stays on its last frame.

    Args:
        clip: The videos.
        texts: Whether labels, prompt and table stand below them.
    """
    videos = [[enlarge(frame, clip.height) for frame in video] for video in clip.sides.values()]
    above = ["   |   ".join(clip.sides), *_wrapped(clip.prompt)]
    lines = [*([line] for line in above), *clip.table] if texts else []
    high = max(video[0].height for video in videos)
    width = sum(video[0].width for video in videos) + GAP * (len(videos) - 1)
    size = max(width, LEAST_WIDTH if texts else 0), high + (LINE * len(lines) + 8 if texts else 0)
    frames = []
    for i in range(max(map(len, videos))):
        canvas, left = Image.new("RGB", size, "white"), 0
        for video in videos:
            picture = video[min(i, len(video) - 1)]
            canvas.paste(picture, (left, 0))
            left += picture.width + GAP
        for row, cells in enumerate(lines):
            _write(canvas, high + 4 + LINE * row, cells, clip.table)
        frames.append(canvas)
    return frames


def _write(canvas: Image.Image, top: int, cells: Sequence[str], table: Sequence[Sequence[str]]) -> None:
    """Write a line of cells, each as far to the right as the widest ones of the table before it reach."""
    draw, left = ImageDraw.Draw(canvas), 4.0
    for number, cell in enumerate(cells):
        draw.text((left, top), cell, fill="black")
        left += max((draw.textlength(row[number]) for row in table), default=0) + LINE


def _wrapped(prompt: str, width: int = 56, most: int = 3) -> list[str]:
    lines = [""]
    for word in prompt.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines[:most] if prompt else []


def gif(frames: Sequence[Image.Image], fps: float) -> bytes:
    """Encode frames as an animated GIF that repeats for ever."""
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=max(20, round(1000 / fps)), loop=0)
    return buffer.getvalue()


def mp4(frames: Sequence[np.ndarray | Image.Image], fps: float, least: int = 0) -> bytes:
    """Encode frames of any size as an mp4 file that browsers play (H.264, 4:2:0).

    Args:
        frames: Pictures (H, W, 3) of uint8, all of one size. An odd side is made even by repeating its last pixels.
        fps: Frame rate, in frames per second.
        least: Height in pixels that the video has at least: half of the colour of a small one would be lost.
    """
    pictures = np.stack([np.asarray(enlarge(np.asarray(frame), least)) for frame in frames])
    height, width = pictures.shape[1:3]
    pictures = np.pad(pictures, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    return encode(pictures, Fraction(fps).limit_denominator(1000))
