"""Images that videos were made of, to be shown beside the prompt (image-to-video)."""

from collections.abc import Mapping
from pathlib import Path

from .. import VideoAlignError
from ..datamodules.contents import Content
from ..datamodules.sample_images import SampleImage, image_of, read_image
from ..datamodules.tables import sound_rows

MEDIA = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}
"""Media type by the end of a file's name."""


def read_images(path: str, contents: Mapping[str, Content]) -> dict[str, SampleImage]:
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
    found: dict[str, SampleImage] = {}
    files: dict[str, SampleImage] = {}
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


def _read(path: Path, where: str) -> SampleImage:
    """An image; refuses what browsers do not show."""
    return read_image(path, f"{where}: {path}")


def images_in(contents: Mapping[str, Content]) -> dict[str, SampleImage]:
    """The images that a set holds itself, by the key of the video; videos that begin with one image share it.

    Args:
        contents: The videos, by key.
    """
    found: dict[str, SampleImage] = {}
    for content in contents.values():
        if content.image and content.image_id not in found:
            found[content.image_id] = read_image(image_of(content).content, f"{content.name}, {content.image}")
    return {key: found[content.image_id] for key, content in contents.items() if content.image}
