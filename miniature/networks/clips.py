"""Clips of a set as batches of frames, for the training of miniature autoencoders."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning as L
import torch

from ...datamodules.contents import RawSample
from ...datamodules.data_ranks import data_ranks
from ...datamodules.encode_list import ClipSize
from ...datamodules.shards import ShardSet
from ...datamodules.stream import Item, ShardLoader, ShardStream, separated, training_share
from ...datamodules.video import decode
from ...models.number_checks import at_least


def _decode(clip: ClipSize, raw: RawSample, epoch: int) -> torch.Tensor:
    return clip.cut(decode(raw.members["mp4"], clip, 1, raw.name))


def _collate(items: Sequence[Item]) -> dict[str, Any]:
    decoded, dropped = separated(items)
    return {"dropped": dropped, **({"videos": torch.stack(decoded)} if decoded else {})}  # (N, T, 3, H, W) uint8


class Clips(L.LightningDataModule):
    """Streams a *videos* set of mp4 files, cut to one length and size.

    Args:
        data: Folder of the *videos* set.
        clip: Frames and size of each clip.
        batch_size: Clips per rank and micro-batch.
        workers: Processes per rank that decode.
        shuffle_buffer: Number of clips among which the next one is drawn; 0 keeps their order on disk.
        seed: Seed of the order.
    """

    def __init__(
        self,
        data: str,
        clip: ClipSize,
        batch_size: int = 8,
        workers: int = 1,
        shuffle_buffer: int = 8192,
        seed: int = 0,
    ) -> None:
        super().__init__()
        at_least(1, "data.", batch_size=batch_size)
        at_least(0, "data.", workers=workers, shuffle_buffer=shuffle_buffer)
        self.data, self.clip, self.batch_size = data, clip, batch_size
        self.workers, self.shuffle_buffer, self.seed = workers, shuffle_buffer, seed

    def train_dataloader(self) -> ShardLoader:
        """Batches of clips, shuffled anew each epoch."""
        shards = ShardSet(self.data, "videos")
        share = training_share(self.trainer, len(shards), self.batch_size)
        decode = partial(_decode, self.clip)
        stream = ShardStream(
            shards.contents(), decode, share, data_ranks(self.trainer)[0], self.seed, self.shuffle_buffer, shards.name
        )
        return ShardLoader(stream, _collate, self.workers, options={"persistent_workers": self.workers > 0})
