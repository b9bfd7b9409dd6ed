"""Bounds on video files: a small file must not be able to fill the memory or to keep a process busy for hours.

The bounds are far above the needs of rated clips. An environment variable raises each of them, for every command and
the processes that it starts.
"""

import os
from dataclasses import dataclass

from .. import VideoAlignError


@dataclass(frozen=True)
class Limit:
    """A bound that an environment variable can change.

    Attributes:
        variable: Name of the environment variable.
        default: Largest accepted amount where the variable is not set.
        meaning: Unit of the amount, for messages.
    """

    variable: str
    default: int
    meaning: str

    @property
    def value(self) -> int:
        """Largest accepted amount, of the environment variable or else the default.

        Raises:
            VideoAlignError: If the environment variable is not a positive whole number.
        """
        text = os.environ.get(self.variable, str(self.default))
        if not (text.isascii() and text.isdigit() and int(text)):
            raise VideoAlignError(
                f"the environment variable {self.variable} must be a positive whole number, got {text!r}"
            )
        return int(text)

    def excess(self, amount: int) -> str | None:
        """Why an amount is above the bound, as the rest of a sentence that begins with the file's name; else None."""
        if amount <= self.value:
            return None
        return (
            f"has {amount} {self.meaning}, above the limit of {self.value}, so it was not read; "
            f"if it is to be read, set the environment variable {self.variable} to {amount} or more"
        )


FRAME_PIXELS = Limit("VIDEOALIGN_MAX_FRAME_PIXELS", 8192 * 4320, "pixels in a frame (height x width)")
"""A decoder holds up to about 20 frames of 1.5 bytes a pixel: 1 GB at this size."""
VIDEO_PIXELS = Limit("VIDEOALIGN_MAX_VIDEO_PIXELS", 2**38, "pixels in all its frames")
"""18 minutes of 3840 x 2160 at 30 frames a second. A smaller frame counts as 512 x 512, which bounds their number."""
FILE_BYTES = Limit("VIDEOALIGN_MAX_VIDEO_BYTES", 2**30, "bytes")
"""Bound on a file's size: imports hold a file in memory while they write it to a shard."""
