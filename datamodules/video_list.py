"""Single videos with prompts, from files or from the shards of a set, as `videoalign score` and `bench` read them."""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader

from .. import VideoAlignError
from ..models.processor import RewardProcessor
from .contents import Content
from .contracts import HasProcessor, require
from .frames import FrameReader, load_frames, load_image
from .lengths import length_of
from .ratings import prompt_of
from .sample_images import image_of, read_image
from .shards import SIDES, ShardSet
from .stream import dealt, in_turn, own_share
from .video import decode


@dataclass(frozen=True)
class Listed:
    """A video with its prompt, and where its bytes are.

    Attributes:
        name: What to call it in messages, or its key in the set.
        prompt: Text that it was generated from.
        path: Path of a video file, or of a shard.
        member: The sample of a shard and the extension of the video in it; None where ``path`` is the video.
        decoded: Whether its file holds decoded frames.
        length: Estimate of its number of tokens, in any unit; videos of similar length share a batch.
        picture: Path of the image that it begins with, if it is a file of its own; empty for none.
    """

    name: str
    prompt: str
    path: str
    member: tuple[Content, str] | None = None
    decoded: bool = False
    length: float = 0.0
    picture: str = ""

    def frames(self, processor: RewardProcessor) -> Tensor:
        """Sampled and resized frames, uint8 (T, 3, H, W)."""
        source = self.member[0].read(self.member[1]) if self.member else Path(self.path)
        if self.decoded:
            return load_frames(source, self.name)
        return decode(source, processor.sampling, processor.factor, self.name)

    def image(self, processor: RewardProcessor) -> Tensor | None:
        """Image that the video begins with, uint8 (3, H, W), resized as the frames are, if the model is shown it.

        Raises:
            VideoAlignError: If the model is shown images, and the video has none.
        """
        if not processor.template.image:
            return None
        if self.picture:
            image, name = read_image(Path(self.picture), self.picture), self.picture
        else:
            image, name = image_of(self.member[0]) if self.member else None, f"the image of {self.name}"
        if image is None:
            raise VideoAlignError(f"{self.name} comes without an image, which the reward model's template shows")
        return load_image(image.content, processor.sampling, processor.factor, name)


def videos_of(shards: ShardSet, processor: RewardProcessor) -> dict[str, Listed]:
    """Every video of a set: by key in *videos* sets, by ``KEY.a`` and ``KEY.b`` in *pairs* sets.

    Reads the records and no video.

    Args:
        shards: The set.
        processor: Frame sampling and patch size of the model that will score the videos.

    Raises:
        ShardError: If a shard is damaged, or holds frames that were decoded for another model.
    """
    FrameReader(shards, processor.sampling, processor.factor, processor.template.image)
    media, videos = shards.index.media, {}
    for content in shards.contents():
        prompt = prompt_of(content.record, content.name)
        for side in SIDES[shards.index.kind]:
            name, extension = f"{content.key}.{side}".rstrip("."), f"{side}.{media}".lstrip(".")
            length = length_of(content, extension, processor, side.upper())
            videos[name] = Listed(name, prompt, str(content.file), (content, extension), media != "mp4", length)
    return videos


def by_length(videos: Sequence[Listed], size: int) -> list[list[int]]:
    """Batches of videos of similar length, the longest first: little padding, and memory runs out at once or never.

    Args:
        videos: Videos to sort.
        size: Videos per batch.

    Returns:
        Numbers of the videos of each batch.
    """
    order = sorted(range(len(videos)), key=lambda i: (-videos[i].length, videos[i].name))
    return [[order[i] for i in batch] for batch in in_turn(len(videos), size)]


class _Batches:
    """Map-style dataset of batches; the worker that gets a batch decodes and tokenises it.

    Args:
        videos: All videos.
        batches: Numbers of the videos of each batch.
        processor: Processor of the model that scores them.
    """

    def __init__(self, videos: Sequence[Listed], batches: Sequence[list[int]], processor: RewardProcessor) -> None:
        self.videos, self.batches, self.processor = videos, batches, processor

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch: dict[str, Any] = {"numbers": [], "dropped": []}
        frames, prompts, images = [], [], []
        for number in self.batches[index]:
            video = self.videos[number]
            try:
                self.processor.prompt_ids(video.prompt)
                image = video.image(self.processor)
                frames.append(video.frames(self.processor))
            except VideoAlignError as error:
                batch["dropped"].append((number, str(error)))
                continue
            batch["numbers"].append(number)
            prompts.append(video.prompt)
            images.append(image)
        if frames:
            batch["inputs"] = self.processor(frames, prompts, images)
        return batch


class VideoList(L.LightningDataModule):
    """Videos whose rewards are predicted.

    Args:
        videos: Videos to score.
        batches: Numbers of the videos of each step; ranks take the batches in turn.
        workers: Processes per rank that decode while the model computes.
        done: Numbers of videos to leave out.
    """

    def __init__(
        self, videos: Sequence[Listed], batches: Sequence[list[int]], workers: int = 2, done: Container[int] = ()
    ) -> None:
        super().__init__()
        self.videos, self.batches, self.workers, self.done = list(videos), list(batches), workers, done

    def setup(self, stage: str) -> None:
        """Refuse a module that has no processor."""
        self._processor()

    def _processor(self) -> RewardProcessor:
        return require(self.trainer.lightning_module, HasProcessor, type(self).__name__).processor

    def predict_dataloader(self) -> DataLoader:
        """Batches with ``numbers`` of the videos in the list, and (number, reason) of unusable ones in ``dropped``."""
        share = own_share(self.batches, self.trainer, self.done)
        cuda = self.trainer.strategy.root_device.type == "cuda"
        return dealt(_Batches(self.videos, share, self._processor()), self.workers, pin_memory=cuda)
