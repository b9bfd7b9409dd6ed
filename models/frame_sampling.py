"""Selection and size of the frames that the reward model sees (VideoAlign, section 5.1).

The rules are those of the released model's preprocessing: about ``fps`` frames a second, an even number of them,
evenly spaced over the whole clip by frame index, each resized to multiples of the patch within a pixel budget.
"""

import math
from dataclasses import asdict, dataclass

import torch

from .. import VideoAlignError

FRAME_FACTOR = 2
"""Number of frames that the Qwen-VL vision towers take together, as one temporal patch."""


@dataclass(frozen=True, kw_only=True)
class FrameSampling:
    """Number of frames per video and of pixels per frame. Exactly one of ``fps`` and ``num_frames`` is set."""

    fps: float | None = 2.0
    """Frames to sample per second of video, above 0; 2 in the paper. Null samples by ``num_frames``."""
    num_frames: int | None = None
    """Fixed number of frames per video, even, at least 2. It needs ``fps: null``."""
    min_frames: int = 4
    """Smallest number of frames when sampling by ``fps``, even: shorter clips are sampled more densely."""
    max_frames: int = 768
    """Largest number of frames when sampling by ``fps``, even: longer clips are sampled more sparsely."""
    max_pixels: int = 448 * 448
    """Largest area of a frame, in pixels (height x width). Larger frames are reduced to it. The paper uses 448 x 448,
    and 256 x 256 for GenAI-Bench."""
    min_pixels: int = 128 * 28 * 28
    """Smallest area of a frame, in pixels; 0 enlarges no frame. Smaller frames within ``max_pixels`` are enlarged to
    it, even beyond a smaller ``max_pixels``, as the released model's preprocessing does: with a ``max_pixels`` of 256 x
    256 frames of 256 x 256 become 336 x 336, and 252 x 252 with a ``min_pixels`` of 0."""

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
        """Settings as plain JSON values, for the records of models and shard sets."""
        return asdict(self)

    def indices(self, total: int, fps: float | None) -> list[int]:
        """Indices of the frames to keep, ascending, even in number.

        Args:
            total: Number of frames in the clip.
            fps: Average frame rate of the clip, in frames per second; needed when sampling by ``fps``.

        Raises:
            VideoAlignError: Where the clip has one frame, or no frame rate when sampling by ``fps``.
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
        # linspace in float32, as in the released model's preprocessing, so that halves are rounded the same way
        return torch.linspace(0, total - 1, count).round().long().tolist()

    def size(self, height: int, width: int, factor: int) -> tuple[int, int]:
        """Height and width of a frame after resizing, in pixels, as near to its aspect ratio as ``factor`` allows.

        Args:
            height: Height of the frame as displayed, in pixels.
            width: Width of the frame as displayed, in pixels.
            factor: Number of pixels that both sides become a multiple of: patch size times merge size of the vision
                tower.

        Raises:
            VideoAlignError: Where one side is more than 200 times the other.
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
