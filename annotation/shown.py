"""What people see beside the videos of the set: masked videos, and images that videos were made of.

They lie in the folder ``DB.shown`` beside the file of votes, which knows the checksum of the folder's record.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from .. import VideoAlignError
from ..bars import Bar
from ..datamodules.contents import Content
from ..datamodules.sample_images import SampleImage, image_of
from ..datamodules.shards import ShardSet, ShardWriter, sha256
from ..models.files import new_folder, read_json, write_json
from .grouping import source_of
from .masking import Mask, masked, masks_by_source
from .store import Store

RECORD, CLIPS, IMAGES = "shown.json", "clips", "images"


@dataclass(frozen=True)
class Shown:
    """What a round shows.

    Attributes:
        contents: The videos as people see them, by key.
        images: Path of the image that a video was made of, by key.
        masks: The boxes that were burned in.
    """

    contents: Mapping[str, Content]
    images: Mapping[str, Path] = field(default_factory=dict)
    masks: tuple[Mask, ...] = ()


def folder_of(db: str | Path) -> Path:
    """The folder beside a file of votes."""
    return Path(f"{db}.shown")


@contextmanager
def new_shown(
    db: str, contents: Mapping[str, Content], masks: list[Mask], images: Mapping[str, SampleImage]
) -> Iterator[str | None]:
    """Write the folder of a new round, which appears when the block has ended without an error.

    Args:
        db: The file of votes.
        contents: The videos of the set, by key.
        masks: Boxes to burn in.
        images: Images by key.

    Yields:
        Checksum of the folder's record; None where nothing is to be shown beside the set.
    """
    if not masks and not images:
        yield None
        return
    boxes = masks_by_source(masks, map(source_of, contents.values()))
    with new_folder(folder_of(db)) as folder:
        if boxes:
            _write_clips(folder / CLIPS, [c for c in contents.values() if source_of(c) in boxes], boxes)
        if images:
            (folder / IMAGES).mkdir()
        for image in {*images.values()}:
            (folder / IMAGES / image.name).write_bytes(image.content)
        record = {
            "masks": [{"source": mask.source, "box": mask.box} for mask in masks],
            "clips": ShardSet(folder / CLIPS).digest if boxes else None,
            "images": {key: image.name for key, image in images.items()},
        }
        write_json(folder / RECORD, record)
        yield sha256(folder / RECORD)


def _write_clips(out: Path, videos: list[Content], boxes: Mapping[str, list[Mask]]) -> None:
    """Write the set of masked videos."""
    with ShardWriter(out, "videos") as writer, Bar("masking videos", len(videos)) as bar:
        for content in videos:
            clip = masked(content.read("mp4"), boxes[source_of(content)], content.name)
            writer.write(content.key, {"": clip}, content.record, image_of(content))
            bar.update()


def shown_by(store: Store, videos: ShardSet) -> Shown:
    """What a round shows.

    Args:
        store: The file of votes.
        videos: The set that is rated.

    Raises:
        VideoAlignError: The set is not that of the round, or what lies beside the file of votes is not.
    """
    if store.fact("data") != videos.digest:
        raise VideoAlignError(f"--videos {videos.name} is not the set that {store.path} was begun with")
    contents, digest, folder = {c.key: c for c in videos.contents()}, store.fact("shown"), folder_of(store.path)
    if digest is None:
        return Shown(contents)
    if not (folder / RECORD).is_file() or sha256(folder / RECORD) != digest:
        raise VideoAlignError(
            f"{folder} is missing, or is not that of {store.path}: it holds the round's masked videos and images; keep "
            "both together under their names"
        )
    record = read_json(folder / RECORD, "what a round shows")
    if record["clips"]:
        clips = ShardSet(folder / CLIPS, "videos")
        if clips.digest != record["clips"]:
            raise VideoAlignError(f"{clips.path} is not the set of masked videos that {folder / RECORD} names")
        contents |= {content.key: content for content in clips.contents()}
    images = {key: folder / IMAGES / name for key, name in record["images"].items()}
    masks = tuple(Mask(mask["source"], tuple(mask["box"])) for mask in record["masks"])
    return Shown(contents, images, masks)


def mask_rows(masks: tuple[Mask, ...]) -> list[dict[str, str]]:
    """Boxes as rows of ``masks.csv``: source, x, y, w, h, and the unit of the numbers."""
    return [
        {
            "source": mask.source,
            **{name: json.dumps(number) for name, number in zip("xywh", mask.box)},
            "unit": "share" if max(mask.box) <= 1 else "pixel",
        }
        for mask in masks
    ]
