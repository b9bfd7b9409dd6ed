"""Which frames of a video the reward model sees, and at what size (VideoAlign, section 5.1).

The rules are those of the released model's preprocessing: about ``fps`` frames a second, an even number of them,
evenly spaced over the whole clip by frame index, each resized to multiples of the patch within a pixel budget.
"""

import math
from dataclasses import asdict, dataclass

import torch

from .. import VideoAlignError

FRAME_FACTOR = 2
"""Frames come in pairs: the temporal patch of the Qwen-VL vision towers."""


@dataclass(frozen=True, kw_only=True)
class FrameSampling:
    """Frames per video and pixels per frame. Set either ``fps`` or ``num_frames``."""

    fps: float | None = 2.0
    """Sampled frames per second of video. Null samples by count."""
    num_frames: int | None = None
    """Fixed number of frames per video; used when fps is null. Even."""
    min_frames: int = 4
    """Fewest frames when sampling by fps (short clips are sampled more densely). Even."""
    max_frames: int = 768
    """Most frames when sampling by fps (long clips are sampled more sparsely). Even."""
    max_pixels: int = 448 * 448
    """Pixel budget of a frame, height x width. 448 x 448 in the paper, 256 x 256 for GenAI-Bench. Frames above it are
    reduced to it."""
    min_pixels: int = 128 * 28 * 28
    """Frames within the budget, but below this area, are enlarged to it, even beyond a budget that is smaller still, as
    the released model's preprocessing does: with a budget of 256 x 256, frames of 256 x 256 become 336 x 336, frames of
    320 x 512 become 196 x 308. With 0 no frame is enlarged or exceeds the budget: 252 x 252."""

    def __post_init__(self) -> None:
        if (self.fps is None) == (self.num_frames is None):
            raise VideoAlignError(
                f"sampling.fps is {self.fps} and sampling.num_frames is {self.num_frames}: set exactly one of them "
                "(fps: null to sample by count)"
            )
        if self.fps is not None and not (math.isfinite(self.fps) and self.fps > 0):
            raise VideoAlignError(f"sampling.fps must be positive, got {self.fps}")
        for name in ("num_frames", "min_frames", "max_frames"):
            value = getattr(self, name)
            if value is not None and (value < FRAME_FACTOR or value % FRAME_FACTOR):
                raise VideoAlignError(f"sampling.{name} must be an even number of frames, at least 2, got {value}")
        if self.min_frames > self.max_frames:
            raise VideoAlignError(f"sampling.min_frames {self.min_frames} exceeds max_frames {self.max_frames}")
        if self.max_pixels <= 0 or self.min_pixels < 0:
            raise VideoAlignError("sampling.max_pixels must be positive and sampling.min_pixels not negative")

    def to_dict(self) -> dict:
        """As plain JSON values, for a model's or a shard set's records."""
        return asdict(self)

    def indices(self, total: int, fps: float | None) -> list[int]:
        """Frame indices to keep, ascending, even in number.

        Args:
            total: Number of frames in the clip.
            fps: Its average frame rate, frames per second; needed when sampling by fps.

        Raises:
            VideoAlignError: for clips of one frame, or without a frame rate when sampling by fps.
        """
        if total < FRAME_FACTOR:
            raise VideoAlignError(f"it has {total} frame(s), but at least {FRAME_FACTOR} are needed to judge motion")
        if self.num_frames is not None:
            count = min(self.num_frames, total // FRAME_FACTOR * FRAME_FACTOR)
        else:
            if not fps or not math.isfinite(fps) or fps <= 0:
                raise VideoAlignError("it states no frame rate; sample by count (sampling.fps: null, num_frames: N)")
            most = min(self.max_frames, total) // FRAME_FACTOR * FRAME_FACTOR
            wanted = min(max(total / fps * self.fps, self.min_frames), most)
            count = round(wanted / FRAME_FACTOR) * FRAME_FACTOR
        # float32 linspace, as the released model's preprocessing: halves fall the same way
        return torch.linspace(0, total - 1, count).round().long().tolist()

    def size(self, height: int, width: int, factor: int) -> tuple[int, int]:
        """Height and width after resizing: the aspect ratio kept as nearly as multiples of ``factor`` allow.

        Args:
            height: Height of the frame as shown, in pixels.
            width: Width of the frame as shown, in pixels.
            factor: Patch size x merge size of the vision tower.
        """
        if max(height, width) > 200 * min(height, width):
            raise VideoAlignError(f"its frames are {width}x{height}: an aspect ratio above 200 cannot be resized")
        h, w = max(factor, round(height / factor) * factor), max(factor, round(width / factor) * factor)
        if h * w > self.max_pixels:
            scale = math.sqrt(height * width / self.max_pixels)
            h = max(factor, math.floor(height / scale / factor) * factor)
            w = max(factor, math.floor(width / scale / factor) * factor)
        elif h * w < self.min_pixels:
            scale = math.sqrt(self.min_pixels / (height * width))
            h = math.ceil(height * scale / factor) * factor
            w = math.ceil(width * scale / factor) * factor
        return h, w
