"""Images that videos begin with (image-to-video): files that become members of samples, and their pixels.

Images are PNG, JPEG or WebP, and are kept byte by byte as they were found. Their pixels become RGB by one rule: the
rotation that the metadata states is applied; what is transparent lies on white; grey becomes three equal colours; 16
bits become 8; CMYK and palettes are converted without a colour profile.
"""

import hashlib
import io
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .. import VideoAlignError
from .contents import IMAGES, Content, RawSample
from .limits import FILE_BYTES, FRAME_PIXELS

TYPES = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
"""Formats of images, as Pillow calls them, and the extensions of their members; browsers show all of them."""
_DAMAGE = (
    *(OSError, ValueError, SyntaxError, EOFError, IndexError, OverflowError, MemoryError),
    *(UnidentifiedImageError, Image.DecompressionBombError, Image.DecompressionBombWarning),
)
"""What Pillow raises for files that are damaged, or much larger than they seem."""


class ImageError(VideoAlignError):
    """An image that is missing or cannot be used; the message says which one and why."""


class SampleImage(NamedTuple):
    """An image as it is kept.

    Attributes:
        kind: Extension of its member: png, jpg or webp.
        content: Content of the file.
    """

    kind: str
    content: bytes

    @property
    def sha256(self) -> str:
        """Hex digest of the content."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def name(self) -> str:
        """Name of a file for it: a checksum of the content, so that it tells nothing, and its type."""
        return f"{self.sha256[:24]}.{self.kind}"

    def entry(self, file: str) -> dict[str, str]:
        """What the record of a sample says of its image.

        Args:
            file: Name or path of the file that the image came from.
        """
        return {"file": file, "sha256": self.sha256}


def read_image(content: bytes | Path, name: str) -> SampleImage:
    """An image that can be decoded.

    Args:
        content: Content or path of the file.
        name: What to call the image in messages.

    Raises:
        ImageError: If the file cannot be read, is no PNG, JPEG or WebP, is damaged, moves, or is larger than frames of
            videos may be.
    """
    if isinstance(content, Path):
        try:
            content = content.read_bytes()
        except OSError as error:
            raise ImageError(f"{name} cannot be read as an image ({error.strerror or error})") from None
    return SampleImage(TYPES[_opened(content, name).format], content)


def pixels(content: bytes, name: str) -> np.ndarray:
    """Pixels of an image as people see them, uint8 (H, W, 3).

    Args:
        content: Content of the file.
        name: What to call the image in messages.

    Raises:
        ImageError: As in :func:`read_image`.
    """
    image = ImageOps.exif_transpose(_opened(content, name))
    if image.mode.startswith("I"):  # 16 bits, or 32 of which PNG fills 16
        image = Image.fromarray((np.asarray(image).astype(np.uint32).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def image_of(sample: Content | RawSample) -> SampleImage | None:
    """The image that a sample holds, as it is; None where it holds none."""
    if isinstance(sample, Content):
        return SampleImage(sample.image, sample.read(sample.image)) if sample.image else None
    kind = next((extension for extension in IMAGES if extension in sample.members), None)
    return SampleImage(kind, sample.members[kind]) if kind else None


def _opened(content: bytes, name: str) -> Image.Image:
    """A decoded image of one of :data:`TYPES`."""
    if why := FILE_BYTES.excess(len(content)):
        raise ImageError(f"{name} {why}")
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.format == "MPO":  # a JPEG of a telephone: behind the picture are a second one, depth or gains
                image.format, image.n_frames = "JPEG", 1
            kind, (width, height) = image.format or "", image.size
            if kind not in TYPES:
                raise ImageError(f"{name} is a {kind}; images are {', '.join(TYPES)}")
            if why := FRAME_PIXELS.excess(width * height):  # before room is made for the pixels
                raise ImageError(f"{name} {why}")
            if (frames := getattr(image, "n_frames", 1)) > 1:
                raise ImageError(f"{name} moves: it has {frames} frames; name a picture that stands still")
            image.load()
            return image
    except _DAMAGE as error:
        why = re.sub(r" <_io\.BytesIO[^>]*>", "", str(error))
        raise ImageError(f"{name} cannot be read as an image ({why})") from None
