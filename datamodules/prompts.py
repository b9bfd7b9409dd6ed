"""Prompts to generate videos from, and the images that these begin with.

They are a CSV with a column ``prompt``, and one of ``image`` for image-to-video; or a text file with one prompt a line.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch.utils.data import DataLoader

from .. import VideoAlignError
from ..models.flow import draw_seed
from ..models.number_checks import at_least
from .contracts import DescribesSamples, HasGenerator, require
from .encode_list import ClipSize
from .parts import Parts
from .sample_images import ImageError, read_image
from .shards import Index
from .stream import dealt, in_turn, own_share
from .tables import read_text, sound_rows


class Item(NamedTuple):
    """What a video is generated from.

    Attributes:
        prompt: Text of the prompt.
        image: Path of the image that the video begins with; None for text-to-video.
        sha256: Hex digest of the image's content; empty without one.
    """

    prompt: str
    image: Path | None = None
    sha256: str = ""

    def seed(self, seed: int, number: int) -> int:
        """Seed of the noise of a video, which depends on the prompt's text and the image's content, not on their place.

        Args:
            seed: Seed of all noise.
            number: Number of the video among those of this item.
        """
        return draw_seed(seed, self.prompt, *([self.sha256] if self.image else []), number)


NO_PROMPTS = (".json", ".jsonl", ".ndjson", ".tsv", ".yaml", ".yml", ".parquet", ".xlsx", ".xls")
"""Endings of files that hold prompts in another way than one a line."""


def read_items(path: str | Path) -> list[Item]:
    """Prompts and images of a CSV or text file, in order and without repetitions.

    Args:
        path: CSV with the columns ``prompt`` and perhaps ``image``, whose paths are absolute or relative to the folder
            of the CSV; or text file with one prompt a line.

    Raises:
        VideoAlignError: If the file cannot be read or holds no prompt, if images are missing or cannot be used, or if
            some rows have an image and some have none.
    """
    name = f"prompts {path}"
    if Path(path).suffix.lower() == ".csv":
        rows = sound_rows(path, ("prompt",), name, fill=True, optional=("image",))
    else:
        if (ending := Path(path).suffix.lower()) in NO_PROMPTS:
            raise VideoAlignError(
                f"{name}: files that end in {ending} are not read; give a text file with one prompt a line, or a CSV "
                "with the column prompt"
            )
        # splitlines would also split at Unicode's further line separators, which a prompt may hold
        lines = read_text(path, name).replace("\r\n", "\n").replace("\r", "\n").split("\n")
        rows = [(number, {"prompt": line}) for number, line in enumerate(lines, 1)]
    named = {line: row.get("image", "").strip() for line, row in rows}
    if nameless := [line for line, row in rows if named[line] and not row["prompt"].strip()]:
        raise VideoAlignError(f"{name}, line {nameless[0]}: it names an image, but no prompt")
    rows = [(line, row["prompt"].strip()) for line, row in rows if row["prompt"].strip()]
    if not rows:
        raise VideoAlignError(f"{name}: it holds no prompt")
    bare = [line for line, _ in rows if not named[line]]
    if bare and len(bare) < len(rows):
        raise VideoAlignError(
            f"{name}: {len(bare)} of {len(rows)} rows name no image, the first of them in line {bare[0]}; name one in "
            "every row or in none, because a generator makes either videos of images or videos of prompts alone"
        )
    images = {line: Path(path).parent / named[line] for line, _ in rows if named[line]}
    digests = _digests(images, name)
    items = [Item(prompt, images.get(line), digests.get(line, "")) for line, prompt in rows]
    return list({(item.prompt, item.sha256): item for item in items}.values())


def _digests(images: dict[int, Path], name: str) -> dict[int, str]:
    """Digests of images by line; one error for all images that are missing or cannot be used."""
    if absent := [line for line, image in images.items() if not image.is_file()]:
        raise VideoAlignError(
            f"{name}: {len(absent)} of {len(images)} images are missing, the first of them {images[absent[0]]} (line "
            f"{absent[0]}); paths are relative to the folder of the CSV"
        )
    digests, unusable = {}, []
    for line, image in images.items():
        try:
            digests[line] = read_image(image, str(image)).sha256
        except ImageError as error:
            unusable.append(f"line {line}: {error}")
    if unusable:
        others = f" (and {len(unusable) - 1} more of {len(images)} images)" if len(unusable) > 1 else ""
        raise VideoAlignError(f"{name}, {unusable[0]}{others}")
    return digests


def read_prompts(path: str | Path) -> list[str]:
    """Texts of the prompts of a CSV or text file, in order and without repetitions; see :func:`read_items`."""
    return list(dict.fromkeys(item.prompt for item in read_items(path)))


class Prompts(L.LightningDataModule):
    """Prompts to sample videos from, which are written as a *videos* set; each sample has a seed of its own.

    Args:
        prompts: CSV with a column ``prompt``, and one of ``image`` for image-to-video; or text file with one prompt a
            line.
        out: Folder to write; an interrupted run goes on there.
        samples: Number of videos per prompt.
        batch_size: Videos per rank and step.
        seed: Seed of all noise.
    """

    def __init__(self, prompts: str, out: str, samples: int = 1, batch_size: int = 1, seed: int = 0) -> None:
        super().__init__()
        at_least(1, "data.", samples=samples, batch_size=batch_size)
        self.items, self.out, self.name = read_items(prompts), Path(out), f"prompts {prompts}"
        self.samples, self.batch_size, self.seed = samples, batch_size, seed
        self.allowed_drops = 0
        self.size: ClipSize | None = None

    def setup(self, stage: str) -> None:
        """Open the set, and the videos that an interrupted run has written."""
        module, who = self.trainer.lightning_module, type(self).__name__
        described = require(module, DescribesSamples, who).making()
        images = [item.sha256 for item in self.items if item.image]
        check_items(self.items, require(module, HasGenerator, who).generator.image, self.name)
        if images:
            self.size = ClipSize(**{name: described[name] for name in ("num_frames", "height", "width")})
        prompts = {"prompts": [item.prompt for item in self.items], **({"images": images} if images else {})}
        making = {**prompts, "samples": self.samples, "seed": self.seed, **described}
        self.parts = Parts(self.out, Index("videos"), making, len(self.items) * self.samples)

    def all_prompts(self) -> list[str]:
        """Texts of the prompts."""
        return [item.prompt for item in self.items]

    def predict_dataloader(self) -> DataLoader:
        """This rank's batches of the videos that are not written yet.

        The noise of a video depends on (seed, prompt, image, number) alone.
        """
        videos = [(f"{i:05d}-{n:03d}", item, n) for i, item in enumerate(self.items) for n in range(self.samples)]
        written = self.parts.done()
        done = {number for number, (key, *_) in enumerate(videos) if key in written}
        share = own_share(in_turn(len(videos), self.batch_size), self.trainer, done)
        return dealt(_Batches([[videos[number] for number in batch] for batch in share], self.seed, self.size), 0)


def check_items(items: Sequence[Item], image: str, name: str) -> None:
    """Refuse prompts with images for a generator that takes none, and prompts alone for one that needs images.

    Args:
        items: All prompts; all of them have an image, or none has.
        image: Whether the generator's samples have an image: none, optional or required.
        name: What to call their file in messages.

    Raises:
        VideoAlignError: If prompts and generator do not fit.
    """
    has = items[0].image is not None
    if has and image == "none":
        raise VideoAlignError(
            f"{name} names images, but this generator makes videos of prompts alone; leave the column image out, or "
            "name an image-to-video pipeline"
        )
    if not has and image == "required":
        raise VideoAlignError(
            f"{name} names no images, but this generator begins every video with one; give a CSV with the columns "
            "prompt and image"
        )


class _Batches:
    """Map-style dataset of batches: keys, prompts, seeds; and for image-to-video ``images``, uint8 (N, 3, H, W).

    Args:
        batches: Key, item, and number among the item's videos, of the videos of each batch.
        seed: Seed of all noise.
        size: Size of the videos; None without images.
    """

    def __init__(self, batches: list[list[tuple[str, Item, int]]], seed: int, size: ClipSize | None) -> None:
        self.batches, self.seed, self.size = batches, seed, size

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        videos = self.batches[index]
        batch = {
            "keys": [key for key, _, _ in videos],
            "prompts": [item.prompt for _, item, _ in videos],
            "seeds": [item.seed(self.seed, number) for _, item, number in videos],
            "dropped": [],
        }
        if self.size and videos:
            files = [item.image for _, item, _ in videos]
            images = [read_image(file, str(file)) for file in files]
            if changed := [i.image for (_, i, _), image in zip(videos, images) if image.sha256 != i.sha256]:
                raise VideoAlignError(f"{changed[0]} has changed since this run began; run the command again")
            batch["image_files"] = [str(file) for file in files]
            batch["images"] = torch.stack([self.size.image(i.content, str(f)) for i, f in zip(images, files)])
        return batch
