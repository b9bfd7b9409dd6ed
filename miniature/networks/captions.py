"""Captioned clips as batches, for the pre-training of miniature backbones."""

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning as L
import torch

from ...datamodules.contents import RawSample
from ...datamodules.contracts import HasProcessor, require
from ...datamodules.data_ranks import data_ranks
from ...datamodules.frames import FrameReader
from ...datamodules.ratings import prompt_of
from ...datamodules.shards import ShardSet
from ...datamodules.stream import Item, ShardLoader, ShardStream, at_least, separated, training_share
from ...models.processor import RewardProcessor


def _decode(reader: FrameReader, seed: int, raw: RawSample, epoch: int) -> tuple[torch.Tensor, str, bool]:
    """Frames, a text, and whether it is true; a coin of (seed, epoch, key) chooses the prompt or a wrong text."""
    record, rng = raw.record(), random.Random(f"{seed} {epoch} {raw.key}")
    wrong = record.get("negatives") or []
    if wrong and rng.random() < 0.5:
        return reader(raw)[0], rng.choice(wrong), False
    return reader(raw)[0], prompt_of(record, raw.name), True


def _collate(processor: RewardProcessor, items: Sequence[Item]) -> dict[str, Any]:
    decoded, dropped = separated(items)
    return {"inputs": processor.captions(*zip(*decoded)) if decoded else {}, "dropped": dropped}


class Captions(L.LightningDataModule):
    """Streams a *videos* set whose prompts describe what the clips show, and whose records may name wrong texts.

    Args:
        data: Folder of the *videos* set.
        batch_size: Clips per rank and micro-batch.
        workers: Processes per rank that decode.
        shuffle_buffer: Number of clips among which the next one is drawn; 0 keeps their order on disk.
        seed: Seed of the order and of the choice of texts.
    """

    def __init__(
        self, data: str, batch_size: int = 32, workers: int = 1, shuffle_buffer: int = 8192, seed: int = 0
    ) -> None:
        super().__init__()
        at_least(1, batch_size=batch_size)
        at_least(0, workers=workers, shuffle_buffer=shuffle_buffer)
        self.data, self.batch_size, self.workers = data, batch_size, workers
        self.shuffle_buffer, self.seed = shuffle_buffer, seed

    def setup(self, stage: str) -> None:
        """Refuse a module that has no processor."""
        self._processor()

    def _processor(self) -> RewardProcessor:
        return require(self.trainer.lightning_module, HasProcessor, type(self).__name__).processor

    def train_dataloader(self) -> ShardLoader:
        """Batches of clips with texts, shuffled anew each epoch."""
        processor, shards = self._processor(), ShardSet(self.data, "videos")
        decode = partial(_decode, FrameReader(shards, processor.sampling, processor.factor), self.seed)
        share = training_share(self.trainer, len(shards), self.batch_size)
        stream = ShardStream(
            shards.contents(), decode, share, data_ranks(self.trainer)[0], self.seed, self.shuffle_buffer, shards.name
        )
        return ShardLoader(
            stream, partial(_collate, processor), self.workers, options={"persistent_workers": self.workers > 0}
        )
