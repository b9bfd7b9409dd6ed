"""Videos of a set, cut to one length and size, to be encoded as latents."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from .. import VideoAlignError
from ..models.number_checks import at_least, positive, share_of_one
from .contents import Content, ShardError
from .contracts import DescribesSamples, HasGenerator, require
from .frames import load_image
from .latent_files import Sources
from .parts import Parts
from .ratings import prompt_of
from .sample_images import image_of
from .shards import SIDES, Index, ShardSet
from .stream import dealt, in_turn, own_share
from .video import decode

APART = 10.0
"""Mean absolute difference of two first frames, in levels of 255, above which no image is common to both. Decoding and
compression of one image by several generators differ by 2 to 5."""


@dataclass(frozen=True, kw_only=True)
class ClipSize:
    """Frames of a clip that a generator is trained on, and their size."""

    num_frames: int
    """Frames per clip, as the generator's autoencoder takes them."""
    height: int
    """Height in pixels; clips are scaled to cover the frame, and their middle is kept."""
    width: int
    """Width in pixels."""
    fps: float | None = None
    """Frame rate to sample at, from the first frame on; frames of slower clips are repeated. Null spreads the frames
    evenly over the whole clip."""

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("num_frames", "height", "width")}
        at_least(1, "data.clip.", **sizes)
        positive("data.clip.", fps=self.fps)

    def indices(self, total: int, fps: float | None) -> list[int]:
        """Indices of the frames to keep.

        Args:
            total: Number of frames of the clip.
            fps: Frame rate of the clip; None where nothing tells it.

        Raises:
            VideoAlignError: If the clip is too short, or has no frame rate where one is needed.
        """
        if self.fps is None:
            places = torch.linspace(0, total - 1, self.num_frames, dtype=torch.double).round().long().tolist()
            if total < self.num_frames:
                raise VideoAlignError(f"it has {total} frames, but clips of {self.num_frames} are needed")
            return places
        if not fps or not math.isfinite(fps):
            raise VideoAlignError("it states no frame rate; spread the frames over the clip instead (fps: null)")
        places = [math.floor(i * fps / self.fps + 0.5) for i in range(self.num_frames)]
        if places[-1] >= total:
            needed = f"{self.num_frames} frames at {self.fps:g} fps need {places[-1] + 1} of them"
            raise VideoAlignError(f"it has {total} frames at {fps:g} fps, but {needed}")
        return places

    def size(self, height: int, width: int, factor: int) -> tuple[int, int]:
        """Smallest height and width of the clip's aspect ratio that cover the frame.

        Raises:
            VideoAlignError: Where one side is more than 200 times the other.
        """
        if max(height, width) > 200 * min(height, width):
            raise VideoAlignError(f"its picture is {width}x{height}: an aspect ratio above 200 cannot be cut to size")
        scale = max(self.height / height, self.width / width)
        return max(self.height, round(height * scale)), max(self.width, round(width * scale))

    def cut(self, video: Tensor) -> Tensor:
        """The middle of frames (..., H, W), at this size."""
        top, left = (video.shape[-2] - self.height) // 2, (video.shape[-1] - self.width) // 2
        return video[..., top : top + self.height, left : left + self.width].contiguous()

    def image(self, content: bytes, name: str) -> Tensor:
        """An image at this size, uint8 (3, H, W): scaled to cover the frame, and its middle kept, as clips are.

        Args:
            content: Content of the image's file.
            name: What to call the image in messages.

        Raises:
            VideoAlignError: If it cannot be decoded, or is too large or too narrow.
        """
        return self.cut(load_image(content, self, 1, name))


def clips_of(contents: Sequence[Content]) -> np.ndarray:
    """Samples of a *videos* set decoded whole, at the length and size that their records state.

    Returns:
        Clips (N, T, H, W, 3) in uint8.

    Raises:
        VideoAlignError: Where a record states no size, or the sizes differ.
    """
    names = ("num_frames", "height", "width")
    if lacking := [c.name for c in contents if not all(isinstance(c.record.get(name), int) for name in names)]:
        raise VideoAlignError(f"{lacking[0]}: its record does not state num_frames, height and width")
    clips = [ClipSize(**{name: content.record[name] for name in names}) for content in contents]
    if len(set(clips)) > 1:
        raise VideoAlignError(f"videos of several sizes cannot be decoded at once: {clips[0]}, {clips[-1]}")
    videos = [decode(content.read("mp4"), clip, 1, content.name) for content, clip in zip(contents, clips)]
    return torch.stack(videos).permute(0, 1, 3, 4, 2).numpy()


class _Batches:
    """Map-style dataset of batches; the worker that gets a batch decodes it.

    Args:
        contents: Samples of the set.
        batches: Sample numbers of each batch.
        kind: Kind of the set, ``pairs`` or ``videos``.
        clip: Frames and size of each clip.
        images: Where the samples' images come from; None for none.
    """

    def __init__(
        self,
        contents: Sequence[Content],
        batches: Sequence[list[int]],
        kind: str,
        clip: ClipSize,
        images: Sources | None = None,
    ) -> None:
        self.contents, self.batches, self.kind, self.clip, self.images = contents, batches, kind, clip, images

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch: dict[str, Any] = {"keys": [], "records": [], "prompts": [], "dropped": []}
        videos, images = [], []
        for number in self.batches[index]:
            content = self.contents[number]
            try:
                prompt, record = prompt_of(content.record, content.name), content.record
                sides = []
                for side in SIDES[self.kind]:
                    extension = f"{side}.mp4".lstrip(".")
                    name = f"{content.name}, {extension}"
                    sides.append(self.clip.cut(decode(content.read(extension), self.clip, 1, name)))
                if self.images == "file":
                    file = image_of(content)
                    images.append(self.clip.image(file.content, f"{content.name}, {file.kind}"))
                    record = {"image": file.entry(f"{content.key}.{file.kind}"), **record}
                elif self.images:
                    images.append(_first_frame(sides, content.name))
            except VideoAlignError as error:
                batch["dropped"].append(str(error))
                continue
            videos.append(torch.stack(sides))
            batch["keys"].append(content.key)
            batch["records"].append(record)
            batch["prompts"].append(prompt)
        if videos:
            batch["videos"] = torch.stack(videos)  # (N, S, T, 3, H, W)
        if images:
            batch["images"] = torch.stack(images)  # (N, 3, H, W)
        return batch


def _first_frame(sides: Sequence[Tensor], name: str) -> Tensor:
    """The first frame of the first side, uint8 (3, H, W); refuses a pair whose sides begin with different pictures."""
    first = sides[0][0]
    for other in sides[1:]:
        if (apart := float((first.float() - other[0].float()).abs().mean())) > APART:
            raise VideoAlignError(
                f"{name}: the first frames of its two videos differ by {apart:.1f} of 255 levels on average, more than "
                f"{APART:g}, so they do not begin with one image"
            )
    return first


class EncodeList(L.LightningDataModule):
    """A *pairs* or *videos* set of mp4 files, to be written as *latents* under another name.

    Args:
        data: Folder of the set.
        out: Folder to write; an interrupted run goes on there.
        clip: Frames and size of each clip.
        batch_size: Samples per rank and step.
        workers: Processes per rank that decode.
        precision: Dtype of the latents on disk: float16, bfloat16 or float32.
        max_dropped: Share of the samples that may be unusable: too short, damaged, or pairs without a common image.
        images: Which images samples begin with (image-to-video). ``file`` takes those that the set holds,
            ``first_frame`` the first frames of the videos; a pair is left out if those of its two videos differ by more
            than 10 of 255 levels on average. ``auto`` does so only for a generator that needs images: the set's own if
            it holds any, else first frames. ``none`` encodes no images.
    """

    def __init__(
        self,
        data: str,
        out: str,
        clip: ClipSize,
        batch_size: int = 1,
        workers: int = 1,
        precision: str = "float16",
        max_dropped: float = 0.0,
        images: Literal["auto", "none", "file", "first_frame"] = "auto",
    ) -> None:
        super().__init__()
        at_least(1, "data.", batch_size=batch_size)
        at_least(0, "data.", workers=workers)
        share_of_one("data.", max_dropped=max_dropped)
        if precision not in ("float16", "bfloat16", "float32"):
            raise VideoAlignError(f"data.precision {precision!r} is unknown; choose float16, bfloat16 or float32")
        self.data, self.out, self.clip, self.precision = data, Path(out), clip, precision
        self.batch_size, self.workers, self.max_dropped, self.images = batch_size, workers, max_dropped, images

    def setup(self, stage: str) -> None:
        """Open the set, and the latents that an interrupted run has written."""
        module, who = self.trainer.lightning_module, type(self).__name__
        generator = require(module, HasGenerator, who).generator
        generator.latent_shape(self.clip.num_frames, self.clip.height, self.clip.width)  # refuses before the long work
        shards = ShardSet(self.data)
        if shards.index.kind not in ("pairs", "videos") or shards.index.media != "mp4":
            held = f"{shards.index.kind} as {shards.index.media}"
            raise ShardError(f"{self.data} holds {held}; pairs or videos with mp4 files are encoded")
        self.kind = shards.index.kind
        self.contents = shards.contents()
        self._tell_of_slow_clips()
        self.source = self._source_of_images(generator.image)
        latents = {**generator.identity(), "of": self.kind, **asdict(self.clip), "precision": self.precision}
        latents |= {"images": self.source} if self.source else {}
        described = require(module, DescribesSamples, who).making()
        making = {"data": shards.digest, "latents": latents, **described}
        self.parts = Parts(self.out, Index("latents", media="safetensors", latents=latents), making, len(self.contents))

    def _tell_of_slow_clips(self) -> None:
        """Tell of clips whose frames are repeated, as far as records state their frame rates."""
        if self.clip.fps is None:
            return
        stated = (content.record.get("fps") for content in self.contents)
        sides = [[*each.values()] if isinstance(each, dict) else [each] for each in stated]
        below = [[x for x in each if isinstance(x, int | float) and 0 < x < self.clip.fps] for each in sides]
        slow = [min(each) for each in below if each]
        if slow:
            rank_zero_warn(
                f"{len(slow)} of {len(sides)} samples of {self.data} have fewer than {self.clip.fps:g} frames per "
                f"second (data.clip.fps), the slowest {min(slow):g}: frames are repeated, and a generator learns that "
                "pictures stand still; data.clip.fps: null spreads frames over the whole clip"
            )

    def _source_of_images(self, image: str) -> Sources | None:
        """Where images come from; refuses what generator, option and set do not agree on.

        Args:
            image: Whether the generator's samples have an image: none, optional or required.
        """
        asked, lacking = self.images, [content.key for content in self.contents if not content.image]
        some = len(lacking) < len(self.contents)
        if asked == "auto":
            asked = ("file" if some else "first_frame") if image == "required" else "none"
            if some and asked == "none" and image == "optional":
                rank_zero_info(f"{self.data} holds images, which are not encoded; data.images: file encodes them")
        if asked == "none":
            if image == "required":
                raise VideoAlignError(
                    "data.images: none, but this generator begins every video with an image; set auto, file or "
                    "first_frame"
                )
            return None
        if image == "none":
            raise VideoAlignError(
                f"data.images: {asked}, but this generator makes videos of prompts alone; leave data.images out, or "
                "name an image-to-video pipeline"
            )
        if asked == "file" and lacking:
            raise VideoAlignError(
                f"{self.data}: {len(lacking)} of {len(self.contents)} samples hold no image, the first of them "
                f"{lacking[0]!r}; give each one in the column image of the table that is imported, or set "
                "data.images: first_frame"
            )
        return asked

    def all_prompts(self) -> list[str]:
        """Texts of the prompts of all samples; those whose record has none are dropped later."""
        return [prompt_of(c.record, c.name) for c in self.contents if str(c.record.get("prompt") or "").strip()]

    @property
    def allowed_drops(self) -> int:
        """Largest number of samples that may be unusable."""
        return int(self.max_dropped * len(self.contents))

    def predict_dataloader(self) -> DataLoader:
        """This rank's batches of the samples that are not written yet."""
        written = self.parts.done()
        done = {number for number, key in enumerate(self.contents.keys()) if key in written}
        own = own_share(in_turn(len(self.contents), self.batch_size), self.trainer, done)
        return dealt(_Batches(self.contents, own, self.kind, self.clip, self.source), self.workers)
