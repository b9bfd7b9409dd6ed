"""Clips with words on what they show as batches, for the pre-training of miniature backbones."""

import random
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor

from ... import VideoAlignError
from ...datamodules.contents import RawSample
from ...datamodules.contracts import HasProcessor, require
from ...datamodules.data_ranks import data_ranks
from ...datamodules.frames import FrameReader
from ...datamodules.ratings import prompt_of
from ...datamodules.shards import ShardSet
from ...datamodules.stream import Item, ShardLoader, ShardStream, Share, separated, training_share
from ...models.number_checks import at_least
from ...models.processor import RewardProcessor

Text = list[tuple[str, bool | None]]
"""Pieces of a text, and what is asked after each: whether it is true, or nothing."""


def place_of(record: Mapping[str, Any], processor: RewardProcessor) -> Text:
    """Where the sprite is, as a text: two digits for x and two for y, in pixels, for each patch of frames.

    Video-language models are taught to name places in pictures by numbers, too (Qwen2-VL; Wang and others, 2024).

    Args:
        record: Record of a clip; without ``track`` there is no text.
        processor: Processor that chooses the frames and cuts them into patches.
    """
    if "track" not in record:
        return []
    shown = processor.sampling.indices(record["num_frames"], record["fps"])
    track = torch.tensor(record["track"])[shown]  # (T, 2)
    middles = track.unflatten(0, (-1, processor.geometry.temporal_patch)).mean(1).round().clamp(0, 99).int().tolist()
    return [("".join(f" {x:02d}{y:02d}" for x, y in middles), None)]


def drawn(record: Mapping[str, Any], name: str, details: float, rng: random.Random) -> Text:
    """A text on a clip, with questions: a true or a wrong sentence, or its details one by one, each true or wrong.

    Args:
        record: Record of the clip.
        name: What to call it in messages.
        details: Probability of the details.
        rng: Draws them.
    """
    prompt = prompt_of(record, name)
    if rng.random() < details and "details" in record:
        coins = [rng.random() < 0.5 for _ in record["details"]]
        return [(words[not true], true) for words, true in zip(record["details"], coins)]
    wrong = record.get("negatives") or []
    if wrong and rng.random() < 0.5:
        return [(rng.choice(wrong), False)]
    return [(prompt, True)]


class _Decoder:
    """Decodes a clip to its frames and the text of an epoch."""

    def __init__(self, reader: FrameReader, processor: RewardProcessor, seed: int, detailed: int, places: bool) -> None:
        self.reader, self.processor, self.seed = reader, processor, seed
        self.detailed, self.places = detailed, places

    def __call__(self, raw: RawSample, epoch: int) -> tuple[Tensor, Text]:
        record, rng = raw.record(), random.Random(f"{self.seed} {epoch} {raw.key}")
        share = max(0.0, 1 - epoch / self.detailed) if self.detailed else 0.0
        place = place_of(record, self.processor) if self.places else []
        return self.reader(raw)[0], drawn(record, raw.name, share, rng) + place


def _asked(reader: FrameReader, raw: RawSample, epoch: int) -> tuple[Tensor, list[Text]]:
    """Frames of a held-out clip, its true sentence and the wrong ones, each with the question."""
    record = raw.record()
    return reader(raw)[0], [[(prompt_of(record, raw.name), True)], *([(n, False)] for n in record.get("negatives", []))]


def _collate(processor: RewardProcessor, items: Sequence[Item]) -> dict[str, Any]:
    decoded, dropped = separated(items)
    return {"inputs": processor.captions(*zip(*decoded)) if decoded else {}, "dropped": dropped}


def _collate_asked(processor: RewardProcessor, items: Sequence[Item]) -> dict[str, Any]:
    whole, dropped = separated([item for item in items if item.valid])  # padding is asked nothing
    rows = [(frames, text) for frames, texts in whole for text in texts]
    counts = torch.tensor([len(texts) for _, texts in whole])
    return {"inputs": processor.captions(*zip(*rows)) if rows else {}, "texts": counts, "dropped": dropped}


class Captions(L.LightningDataModule):
    """Streams a *videos* set whose prompts describe what the clips show.

    A record may also name wrong sentences (``negatives``), details as pairs of true and wrong words (``details``), and
    the place of what moves in every frame (``track``). A text is a sentence, true or wrong, or the details one by one,
    each true or wrong, and then the track. Whether a single word describes the clip is learned long before whether a
    whole sentence does, and is what the latter is made of.

    Args:
        data: Folder of the *videos* set.
        batch_size: Clips per rank and micro-batch.
        workers: Processes per rank that decode.
        shuffle_buffer: Number of clips among which the next one is drawn; 0 keeps their order on disk.
        detailed: Epochs over which texts of details give way to whole sentences.
        places: Whether the place of what moves is told behind each text.
        held_out: Number of clips, the set's last ones, on which is measured whether the model knows true sentences from
            wrong ones; they do not train.
        seed: Seed of the order and of the choice of texts.
    """

    def __init__(
        self,
        data: str,
        batch_size: int = 32,
        workers: int = 1,
        shuffle_buffer: int = 8192,
        detailed: int = 8,
        places: bool = True,
        held_out: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        at_least(1, "data.", batch_size=batch_size)
        at_least(0, "data.", workers=workers, shuffle_buffer=shuffle_buffer, detailed=detailed, held_out=held_out)
        self.data, self.batch_size, self.workers = data, batch_size, workers
        self.shuffle_buffer, self.held_out, self.seed = shuffle_buffer, held_out, seed
        self.detailed, self.places = detailed, places

    def setup(self, stage: str) -> None:
        """Refuse a module that has no processor."""
        self._processor()

    def _processor(self) -> RewardProcessor:
        return require(self.trainer.lightning_module, HasProcessor, type(self).__name__).processor

    def _shards(self) -> ShardSet:
        shards = ShardSet(self.data, "videos")
        if self.held_out >= len(shards):
            raise VideoAlignError(
                f"data.held_out is {self.held_out}, but {shards.name} has {len(shards)} clips, so that none would train"
            )
        return shards

    def train_dataloader(self) -> ShardLoader:
        """Batches of clips with texts, shuffled anew each epoch."""
        processor, shards = self._processor(), self._shards()
        reader = FrameReader(shards, processor.sampling, processor.factor)
        decode = _Decoder(reader, processor, self.seed, self.detailed, self.places)
        contents = shards.contents().take(range(len(shards) - self.held_out))
        share = training_share(self.trainer, len(contents), self.batch_size)
        stream = ShardStream(
            contents, decode, share, data_ranks(self.trainer)[0], self.seed, self.shuffle_buffer, shards.name
        )
        return ShardLoader(
            stream, partial(_collate, processor), self.workers, options={"persistent_workers": self.workers > 0}
        )

    def val_dataloader(self) -> ShardLoader | list:
        """Batches of held-out clips, each with its true sentence and the wrong ones."""
        if not self.held_out:
            return []
        processor, shards = self._processor(), self._shards()
        contents = shards.contents().take(range(len(shards) - self.held_out, len(shards)))
        decode = partial(_asked, FrameReader(shards, processor.sampling, processor.factor))
        rank, world = data_ranks(self.trainer)
        share = Share(len(contents), self.batch_size, world, training=False)
        stream = ShardStream(contents, decode, share, rank, self.seed, 0, shards.name)
        return ShardLoader(stream, partial(_collate_asked, processor), 0)
