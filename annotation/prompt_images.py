"""Images that videos were made of, to be shown beside the prompt (image-to-video)."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from .. import VideoAlignError
from ..datamodules.contents import Content
from ..datamodules.tables import sound_rows

TYPES = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
"""Formats that browsers show, as Pillow calls them, and the ends of their files' names."""
MEDIA = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}
"""Media type by the end of a file's name."""


@dataclass(frozen=True)
class PromptImage:
    """An image as it is kept.

    Attributes:
        name: Name of its file: a checksum of the content, so that it tells nothing, and its type.
        content: Content of the file.
    """

    name: str
    content: bytes


def read_images(path: str, contents: Mapping[str, Content]) -> dict[str, PromptImage]:
    """The image of each video, of a CSV file with the column ``image`` and one of ``key`` and ``prompt``.

    Args:
        path: The CSV file. Its images are found beside it, unless their paths are absolute.
        contents: The videos, by key.

    Returns:
        Images by key.

    Raises:
        VideoAlignError: A row fits no video, an image cannot be shown, or a video has no image or two.
    """
    option = f"--images {path}"
    rows = sound_rows(path, ("image",), option)
    by = [column for column in ("key", "prompt") if column in rows[0][1]]
    if len(by) != 1:
        raise VideoAlignError(f"{option} needs one of the columns key and prompt, which say to what an image belongs")
    belongs: dict[str, list[str]] = {}
    for key, content in contents.items():
        belongs.setdefault(key if by == ["key"] else str(content.record.get("prompt")), []).append(key)
    found: dict[str, PromptImage] = {}
    files: dict[str, PromptImage] = {}
    for number, row in rows:
        where = f"{option}, line {number}"
        if row[by[0]] not in belongs:
            raise VideoAlignError(f"{where}: the set has no video with the {by[0]} {row[by[0]]!r}")
        image = files.setdefault(row["image"], _read(Path(path).parent / row["image"], where))
        for key in belongs[row[by[0]]]:
            if found.setdefault(key, image) != image:
                raise VideoAlignError(f"{where}: {by[0]} {row[by[0]]!r} has another image in an earlier line")
    if missing := [key for key in contents if key not in found]:
        raise VideoAlignError(
            f"{option} has no image for {len(missing)} of the {len(contents)} videos, first {missing[0]!r}"
        )
    return found


def _read(path: Path, where: str) -> PromptImage:
    """An image; refuses what browsers do not show."""
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            kind = image.format or ""
            image.load()
    except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise VideoAlignError(f"{where}: {path} cannot be read as an image ({error})") from None
    if kind not in TYPES:
        raise VideoAlignError(f"{where}: {path} is a {kind}; browsers show {', '.join(TYPES)}")
    return PromptImage(f"{sha256(content).hexdigest()[:24]}.{TYPES[kind]}", content)
