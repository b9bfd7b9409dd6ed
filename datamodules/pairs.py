"""Rated pairs and benchmark videos as batches: the DataModules of reward model training and evaluation."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from .. import VideoAlignError
from ..models.flow import draw_seed
from ..models.processor import RewardProcessor
from .benchmark import Benchmark
from .contents import Contents, RawSample
from .frames import FrameReader
from .ratings import labels_of, prompt_of, scores_of, sources_of
from .shards import ShardSet
from .stream import Dropped, Item, ShardLoader, ShardStream, Share, at_least, training_share


@dataclass(frozen=True)
class VideoPair:
    """A decoded pair.

    Attributes:
        videos: A and B, uint8 (T, 3, H, W). labels: (4,) VQ, MQ, TA, Overall. scores: (2, 3) of A and B.
        sources: the models that made A and B.
    """

    key: str
    prompt: str
    videos: tuple[Tensor, Tensor]
    labels: Tensor
    scores: Tensor
    sources: tuple[str, str]

    def swapped(self) -> "VideoPair":
        """The same pair with A and B exchanged, labels and scores with them."""
        return VideoPair(
            self.key, self.prompt, self.videos[::-1], -self.labels, self.scores.flip(0), self.sources[::-1]
        )


class PairDecoder:
    """Raw sample -> :class:`VideoPair`; exchanges A and B by a coin of (seed, epoch, key) where asked."""

    def __init__(self, reader: FrameReader, seed: int | None) -> None:
        self.reader, self.seed = reader, seed

    def __call__(self, raw: RawSample, epoch: int) -> VideoPair:
        record = raw.record()
        pair = VideoPair(
            raw.key,
            prompt_of(record, raw.name),
            tuple(self.reader(raw)),
            labels_of(record, raw.name),
            scores_of(record, raw.name),
            sources_of(record, raw.name),
        )
        swap = self.seed is not None and random.Random(f"{self.seed} {epoch} {raw.key}").random() < 0.5
        return pair.swapped() if swap else pair


class Collate:
    """Items -> batch. Items that do not count keep their place with a sound one's tensors and a false mask.

    Args:
        processor: tokenises and cuts patches. benchmark: name of the benchmark that the videos belong to.
    """

    def __init__(self, processor: RewardProcessor, benchmark: str | None = None) -> None:
        self.processor, self.benchmark = processor, benchmark
        self.spare: Any = None  # the last sound one of this worker

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        dropped = [item.value for item in items if isinstance(item.value, Dropped)]
        sound = [item.value for item in items if not isinstance(item.value, Dropped)]
        batch: dict[str, Any] = {"dropped": dropped, "valid": torch.tensor([item.valid for item in items])}
        self.spare = sound[0] if sound else self.spare
        if self.spare is None:  # nothing to fill up with yet: a worker whose very first batch is unusable
            return batch
        values = [self.spare if isinstance(item.value, Dropped) else item.value for item in items]
        batch["keys"] = [value.key for value in values]
        if self.benchmark is None:
            videos = [pair.videos[0] for pair in values] + [pair.videos[1] for pair in values]  # A..., then B...
            batch["labels"] = torch.stack([pair.labels for pair in values])  # (N, 4)
            batch["scores"] = torch.stack([pair.scores for pair in values], 1)  # (2, N, 3)
            prompts = [pair.prompt for pair in values] * 2
        else:
            batch["benchmark"] = self.benchmark
            batch["numbers"] = torch.tensor([video.number for video in values])
            videos, prompts = [video.frames for video in values], [video.prompt for video in values]
        batch["inputs"] = self.processor(videos, prompts)
        return batch


@dataclass(frozen=True)
class Video:
    """A decoded benchmark video. ``number`` is its place in :attr:`Benchmark.keys`, -1 where it is in no rated pair."""

    key: str
    number: int
    prompt: str
    frames: Tensor


class VideoDecoder:
    """Raw sample -> :class:`Video`."""

    def __init__(self, reader: FrameReader, numbers: dict[str, int]) -> None:
        self.reader, self.numbers = reader, numbers

    def __call__(self, raw: RawSample, epoch: int) -> Video:
        number = self.numbers.get(raw.key, -1)  # videos without a rated pair are looked at, but joined with nothing
        return Video(raw.key, number, prompt_of(raw.record(), raw.name), self.reader(raw)[0])


def read_keys(path: str | Path) -> set[str]:
    """Keys of a file, one a line."""
    try:
        keys = {line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()} - {""}
    except (OSError, UnicodeDecodeError) as error:
        raise VideoAlignError(f"data.train_keys {path} cannot be read ({error})") from None
    if not keys:
        raise VideoAlignError(f"data.train_keys {path} holds no key")
    return keys


class VideoPairs(L.LightningDataModule):
    """Streams rated pairs for training, held-out pairs and benchmark videos for validation.

    Frames, tokens and template are the model's: they come from ``processor`` of the LightningModule that is trained.
    Every pair and video counts exactly once on any number of ranks and workers: ranks are filled up with masked
    padding, never with duplicates that count.

    Args:
        train: Folder of a *pairs* set.
        val: Folder of held-out pairs.
        benchmarks: Folders of *videos* sets with ``pairs.csv``, by name; each is scored at validation.
        batch_size: Pairs per rank and micro-batch.
        val_batch_size: Held-out pairs, or benchmark videos, per rank and batch; ``batch_size`` if not given.
        workers: Processes per rank that decode.
        swap: Exchange A and B at random in training.
        shuffle_buffer: pairs among which the next one is drawn; 0 keeps their order on disk. It costs no memory.
        max_dropped: share of an epoch's samples that may be unusable before training stops.
        seed: of order and swaps.
        train_share: share of the training pairs that is used, for learning curves. Which ones, their keys say: a smaller
            share is part of a larger one, whatever the seed.
        train_keys: file with a key a line: of the training pairs only these are used.
    """

    def __init__(
        self,
        train: str | None = None,
        val: str | None = None,
        benchmarks: dict[str, str] | None = None,
        batch_size: int = 32,
        val_batch_size: int | None = None,
        workers: int = 2,
        swap: bool = True,
        shuffle_buffer: int = 8192,
        max_dropped: float = 0.001,
        seed: int = 0,
        train_share: float = 1.0,
        train_keys: str | None = None,
    ) -> None:
        super().__init__()
        at_least(1, batch_size=batch_size, val_batch_size=val_batch_size)
        at_least(0, workers=workers, shuffle_buffer=shuffle_buffer)
        if not 0 <= max_dropped < 1:
            raise VideoAlignError(f"data.max_dropped is a share in [0, 1), got {max_dropped}")
        if train_keys and train_share != 1:
            raise VideoAlignError("data.train_keys and data.train_share both choose training pairs; set one of them")
        if not 0 < train_share <= 1:
            raise VideoAlignError(f"data.train_share is a share in (0, 1], got {train_share}")
        self.paths = {"train": train, "val": val}
        self.benchmark_paths = benchmarks or {}
        self.batch_size, self.val_batch_size = batch_size, val_batch_size or batch_size
        self.workers, self.swap, self.shuffle_buffer = workers, swap, shuffle_buffer
        self.max_dropped, self.seed, self.train_share, self.train_keys = max_dropped, seed, train_share, train_keys
        self.processor: RewardProcessor | None = None

    def setup(self, stage: str) -> None:
        """Open the sets and take the model's processor."""
        self.processor = self.trainer.lightning_module.processor
        self.benchmarks = {name: Benchmark(path) for name, path in self.benchmark_paths.items()}
        if stage != "fit" and not self.benchmarks and self.paths["val"] is None:
            raise VideoAlignError("data.val and data.benchmarks are both empty, so there is nothing to evaluate on")

    def _pairs(self, which: str) -> ShardSet:
        if self.paths[which] is None:
            raise VideoAlignError(
                f"data.{which} is not set: name the folder of a pairs set (`videoalign shards import-csv` makes one)"
            )
        return ShardSet(self.paths[which], "pairs")

    def _chosen(self, shards: ShardSet) -> Contents:
        """The training pairs that are used: all, those of a list, or exactly a share, by a draw for each key."""
        contents = shards.contents()
        if self.train_share == 1 and not self.train_keys:
            return contents
        keys = contents.keys()
        if self.train_keys:
            chosen = read_keys(self.train_keys)
            if missing := chosen - set(keys):
                raise VideoAlignError(f"data.train_keys {self.train_keys}: {shards.path} has no pair {min(missing)!r}")
        else:
            drawn = sorted(keys, key=lambda key: draw_seed("share", key))
            chosen = set(drawn[: max(1, round(self.train_share * len(keys)))])
        return contents.take([number for number, key in enumerate(keys) if key in chosen])

    def _loader(
        self, shards: ShardSet, contents: Contents, decode: Any, training: bool, benchmark: str | None = None
    ) -> ShardLoader:
        trainer = self.trainer
        share = (
            training_share(trainer, len(contents), self.batch_size)
            if training
            else Share(len(contents), self.val_batch_size, trainer.world_size, training)
        )
        stream = ShardStream(
            contents, decode, share, trainer.global_rank, self.seed, self.shuffle_buffer, str(shards.path)
        )
        options = {
            "persistent_workers": training and self.workers > 0,  # an epoch may be short
            "pin_memory": trainer.strategy.root_device.type == "cuda",
        }
        workers = min(self.workers, share.batches)
        return ShardLoader(stream, Collate(self.processor, benchmark), workers, self.max_dropped, options)

    def _pair_loader(self, which: str, training: bool) -> ShardLoader:
        shards = self._pairs(which)
        reader = FrameReader(shards, self.processor.sampling, self.processor.factor)
        decode = PairDecoder(reader, self.seed if training and self.swap else None)
        return self._loader(shards, self._chosen(shards) if training else shards.contents(), decode, training)

    def train_dataloader(self) -> ShardLoader:
        """Batches of pairs, shuffled anew each epoch."""
        return self._pair_loader("train", training=True)

    def val_dataloader(self) -> list[ShardLoader]:
        """The held-out pairs, then each benchmark's videos."""
        loaders = [self._pair_loader("val", training=False)] if self.paths["val"] else []
        for name, benchmark in self.benchmarks.items():
            reader = FrameReader(benchmark.shards, self.processor.sampling, self.processor.factor)
            decode = VideoDecoder(reader, benchmark.numbers)
            loaders.append(self._loader(benchmark.shards, benchmark.shards.contents(), decode, False, name))
        return loaders

    def test_dataloader(self) -> list[ShardLoader]:
        """What validation sees."""
        return self.val_dataloader()

    def examples(self, count: int) -> list[VideoPair]:
        """The first held-out pairs, decoded: always the same ones, for pictures."""
        shards = self._pairs("val")
        decode = PairDecoder(FrameReader(shards, self.processor.sampling, self.processor.factor), None)
        return [decode(raw, 0) for raw, _ in zip(shards, range(count))]
