"""Rated pairs and benchmark videos as batches: the DataModule that trains and evaluates reward models."""

import contextlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from .. import VideoAlignError
from ..models.flow import draw_seed
from ..models.frame_sampling import FRAME_FACTOR
from ..models.number_checks import at_least, share_of_one
from ..models.processor import RewardProcessor
from .benchmark import Benchmark
from .contents import Contents, RawSample
from .contracts import AugmentsPairs, HasProcessor, require
from .data_ranks import data_ranks
from .frames import FrameReader
from .lengths import lengths_of
from .rater_scores import LEAST, RaterScales
from .ratings import labels_of, prompt_of, scores_of, sources_of
from .shards import ShardSet
from .stream import FilledCollate, ShardLoader, ShardStream, Share, training_share
from .targets import check_rated, check_targets, ratings_in
from .video_pair import VideoPair


class PairDecoder:
    """Decodes a raw sample of a *pairs* set to a :class:`VideoPair`.

    Args:
        reader: Reads or decodes the frames.
        seed: Seed of the coin that exchanges A and B, thrown for each (seed, epoch, key); None never exchanges them.
        augment: Change of the videos and the prompt.
        augment_seed: Seed of what the change draws, for each (seed, epoch, key).
        scores: Takes the scores (2, 3) of A and B from a record and its name.
    """

    def __init__(
        self,
        reader: FrameReader,
        seed: int | None,
        augment: AugmentsPairs | None = None,
        augment_seed: int = 0,
        scores: Callable[[dict, str], Tensor] = scores_of,
    ) -> None:
        self.reader, self.seed, self.scores = reader, seed, scores
        self.augment, self.augment_seed = augment, augment_seed

    def __call__(self, raw: RawSample, epoch: int) -> VideoPair:
        record = raw.record()
        pair = VideoPair(
            raw.key,
            prompt_of(record, raw.name),
            tuple(self.reader(raw)),
            labels_of(record, raw.name),
            self.scores(record, raw.name),
            sources_of(record, raw.name),
            self.reader.image(raw),
        )
        if self.augment is not None:
            pair = self._augmented(pair, random.Random(f"augment {self.augment_seed} {epoch} {raw.key}"))
        swap = self.seed is not None and random.Random(f"{self.seed} {epoch} {raw.key}").random() < 0.5
        return pair.swapped() if swap else pair

    def _augmented(self, pair: VideoPair, rng: random.Random) -> VideoPair:
        """The pair with changed videos and prompt; labels and scores stay.

        Raises:
            VideoAlignError: Where the augmentation gives what the reward model cannot take.
        """
        videos, prompt = self.augment(pair.videos, pair.prompt, rng)
        factor = self.reader.factor
        sound = len(videos) == 2 and isinstance(prompt, str)
        for before, after in zip(pair.videos, videos):
            sound &= after.dtype == before.dtype and after.ndim == 4 and after.shape[1] == 3 and len(after) > 0
            sound = sound and not (len(after) % FRAME_FACTOR or after.shape[2] % factor or after.shape[3] % factor)
        if not sound:
            given = ", ".join(f"{video.dtype} {tuple(video.shape)}" for video in videos)
            raise VideoAlignError(
                f"data.augment ({type(self.augment).__name__}) gave {given} and {prompt!r}; it must give two videos, "
                f"uint8 (T, 3, H, W) with T a multiple of {FRAME_FACTOR} and sides of {factor}, and a prompt"
            )
        return replace(pair, videos=tuple(video.contiguous() for video in videos), prompt=prompt)


class VideoCollate(FilledCollate):
    """Collates decoded pairs, or videos of a benchmark, to inputs of a reward model.

    Args:
        processor: Tokenises prompts and cuts frames into patches.
        benchmark: Name of the benchmark that the videos belong to; None for pairs.
    """

    def __init__(self, processor: RewardProcessor, benchmark: str | None = None) -> None:
        super().__init__()
        self.processor, self.benchmark = processor, benchmark

    def tensors(self, samples: list[Any]) -> dict[str, Any]:
        """Keys, the network's inputs, and labels and scores of pairs or numbers of a benchmark's videos."""
        batch: dict[str, Any] = {"keys": [sample.key for sample in samples]}
        prompts = [sample.prompt for sample in samples]
        if self.benchmark is None:
            videos = [pair.videos[0] for pair in samples] + [pair.videos[1] for pair in samples]  # A..., then B...
            batch["sources"] = [pair.sources for pair in samples]
            batch["labels"] = torch.stack([pair.labels for pair in samples])  # (N, 4)
            batch["scores"] = torch.stack([pair.scores for pair in samples], 1)  # (2, N, 3)
            prompts, images = prompts * 2, [pair.image for pair in samples] * 2
        else:
            batch["benchmark"] = self.benchmark
            batch["numbers"] = torch.tensor([video.number for video in samples])
            videos, images = [video.frames for video in samples], [video.image for video in samples]
        return {**batch, "inputs": self.processor(videos, prompts, images)}


@dataclass(frozen=True)
class Video:
    """A decoded video of a benchmark.

    Attributes:
        key: Key of the sample.
        number: Place in :attr:`Benchmark.keys`; -1 where no rated pair names the video.
        prompt: Text that it was generated from.
        frames: Frames, uint8 (T, 3, H, W).
        image: Image that it begins with, uint8 (3, H, W), where the reward model is shown it.
    """

    key: str
    number: int
    prompt: str
    frames: Tensor
    image: Tensor | None = None


class VideoDecoder:
    """Decodes a raw sample of a *videos* set to a :class:`Video`.

    Args:
        reader: Reads or decodes the frames.
        numbers: Place of each video in :attr:`Benchmark.keys`, by key.
    """

    def __init__(self, reader: FrameReader, numbers: dict[str, int]) -> None:
        self.reader, self.numbers = reader, numbers

    def __call__(self, raw: RawSample, epoch: int) -> Video:
        number = self.numbers.get(raw.key, -1)  # a video without a rated pair is scored, but joined with nothing
        prompt = prompt_of(raw.record(), raw.name)
        return Video(raw.key, number, prompt, self.reader(raw)[0], self.reader.image(raw))


def read_keys(path: str | Path) -> set[str]:
    """Keys of a text file with one key a line."""
    try:
        keys = {line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()} - {""}
    except (OSError, UnicodeDecodeError) as error:
        raise VideoAlignError(f"data.train_keys {path} cannot be read ({error})") from None
    if not keys:
        raise VideoAlignError(f"data.train_keys {path} holds no key")
    return keys


class VideoPairs(L.LightningDataModule):
    """Streams rated pairs for training, held-out pairs and benchmark videos for validation.

    Frames, tokens and template are the model's: they come from the ``processor`` of the LightningModule that is
    trained. Every pair and video counts exactly once on any number of ranks and workers: ranks are filled up with
    masked padding, never with duplicates that count.

    Args:
        train: Folder of a *pairs* set to train on.
        val: Folder of a *pairs* set of held-out pairs.
        benchmarks: Folders of *videos* sets with ``pairs.csv``, by name; each is scored at validation.
        batch_size: Pairs per rank and micro-batch.
        val_batch_size: Held-out pairs, or benchmark videos, per rank and batch; ``batch_size`` if not given.
        workers: Processes per rank that decode.
        swap: Exchange A and B at random in training.
        shuffle_buffer: Number of pairs among which the next one is drawn; 0 keeps their order on disk. It costs no
            memory.
        max_dropped: Share of an epoch's samples that may be unusable before training stops.
        group_by_length: Batches of all ranks among whose pairs batches of similar length are formed, so that little of
            them is padding; 0 forms none. Records tell the lengths, or else the bytes of the videos.
        seed: Seed of the order, of the exchanges of A and B, and of what ``augment`` draws.
        train_share: Share of the training pairs to use, for learning curves. Their keys decide which ones: a smaller
            share is part of a larger one, whatever the seed.
        train_keys: Text file with one key a line; only these training pairs are used.
        augment: Change of training pairs after which their ratings still hold, an object given by its class. Held-out
            pairs and benchmarks stay as they are.
        keep_gb: Memory for decoded training videos, in GB and each worker: a video that several pairs share, or that a
            later epoch asks for, is decoded once. What does not fit is decoded every time.
        scores: What regression learns: ``mean``, the mean of the raters' scores; or ``standardised``, in which each
            rater's scores are first standardised by that rater's own mean and deviation over the training pairs.
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
        augment: AugmentsPairs | None = None,
        keep_gb: float = 0.0,
        scores: Literal["mean", "standardised"] = "mean",
        group_by_length: int = 0,
    ) -> None:
        super().__init__()
        at_least(1, "data.", batch_size=batch_size, val_batch_size=val_batch_size)
        at_least(0, "data.", workers=workers, shuffle_buffer=shuffle_buffer, keep_gb=keep_gb)
        at_least(0, "data.", group_by_length=group_by_length)
        share_of_one("data.", max_dropped=max_dropped)
        if train_keys and train_share != 1:
            raise VideoAlignError("data.train_keys and data.train_share both choose training pairs; set one of them")
        if not 0 < train_share <= 1:
            raise VideoAlignError(f"data.train_share is a share in (0, 1], got {train_share}")
        if scores not in ("mean", "standardised"):
            raise VideoAlignError(f"data.scores is mean or standardised, got {scores!r}")
        if scores == "standardised" and train is None:
            raise VideoAlignError(
                "data.scores: standardised takes the raters' means and deviations from data.train; name that set too"
            )
        self.scores = scores
        self.paths = {"train": train, "val": val}
        self.benchmark_paths = benchmarks or {}
        self.batch_size, self.val_batch_size = batch_size, val_batch_size or batch_size
        self.workers, self.swap, self.shuffle_buffer = workers, swap, shuffle_buffer
        self.augment, self.keep_gb, self.group_by_length = augment, keep_gb, group_by_length
        self.max_dropped, self.seed, self.train_share, self.train_keys = max_dropped, seed, train_share, train_keys
        self.processor: RewardProcessor | None = None

    def setup(self, stage: str) -> None:
        """Open the benchmarks and take the model's processor."""
        self.processor = require(self.trainer.lightning_module, HasProcessor, type(self).__name__).processor
        if self.augment is not None and self.processor.template.image:
            raise VideoAlignError(
                f"data.augment changes videos, but not the image that template {self.processor.template.name!r} shows "
                "beside them, so that the two would no longer fit; leave data.augment out, or choose a template "
                "without <image>"
            )
        self.benchmarks = {name: Benchmark(path) for name, path in self.benchmark_paths.items()}
        if stage != "fit" and not self.benchmarks and self.paths["val"] is None:
            raise VideoAlignError("data.val and data.benchmarks are both empty, so there is nothing to evaluate on")

    def _reader(self, shards: ShardSet, keep_gb: float = 0.0) -> FrameReader:
        processor = self.processor
        return FrameReader(shards, processor.sampling, processor.factor, processor.template.image, keep_gb)

    def _pairs(self, which: str) -> ShardSet:
        if self.paths[which] is None:
            raise VideoAlignError(
                f"data.{which} is not set: name the folder of a pairs set (`videoalign shards import-csv` makes one)"
            )
        return ShardSet(self.paths[which], "pairs")

    def _chosen(self, shards: ShardSet) -> Contents:
        """The training pairs to use: all, those of a list, or exactly a share, by a draw for each key."""
        contents = shards.contents()
        if self.train_share == 1 and not self.train_keys:
            return contents
        keys = contents.keys()
        if self.train_keys:
            chosen = read_keys(self.train_keys)
            if missing := chosen - set(keys):
                raise VideoAlignError(f"data.train_keys {self.train_keys}: {shards.name} has no pair {min(missing)!r}")
        else:
            drawn = sorted(keys, key=lambda key: draw_seed("share", key))
            chosen = set(drawn[: max(1, round(self.train_share * len(keys)))])
        return contents.take([number for number, key in enumerate(keys) if key in chosen])

    def _loader(
        self, shards: ShardSet, contents: Contents, decode: Any, training: bool, benchmark: str | None = None
    ) -> ShardLoader:
        trainer = self.trainer
        rank, world = data_ranks(trainer)
        share = (
            training_share(trainer, len(contents), self.batch_size)
            if training
            else Share(len(contents), self.val_batch_size, world, training)
        )
        group = self.group_by_length if training else 0
        lengths = lengths_of(shards, contents, self.processor) if group else ()
        stream = ShardStream(contents, decode, share, rank, self.seed, self.shuffle_buffer, shards.name, group, lengths)
        options = {
            "persistent_workers": training and self.workers > 0,  # an epoch may be short
            "pin_memory": trainer.strategy.root_device.type == "cuda",
        }
        workers = min(self.workers, share.batches)
        collate = VideoCollate(self.processor, benchmark)
        return ShardLoader(stream, collate, workers, self.max_dropped, options, benchmark)

    @cached_property
    def _scales(self) -> RaterScales:
        """The raters' scales in the training pairs; warns of scores that are left out."""
        shards = self._pairs("train")
        contents = self._chosen(shards)
        scales = RaterScales.of(((content.record, content.name) for content in contents), shards.name)
        self._warn_of_left_out(scales, shards, contents)
        if self.paths["val"]:
            held_out = self._pairs("val")
            self._warn_of_left_out(scales, held_out, held_out.contents())
        return scales

    @staticmethod
    def _warn_of_left_out(scales: RaterScales, shards: ShardSet, contents: Contents) -> None:
        out, every = scales.left_out((content.record, content.name) for content in contents)
        if out:
            rank_zero_warn(
                f"data.scores: standardised leaves {out} of {every} scores of {shards.name} out: their raters gave "
                f"fewer than {LEAST} scores of the dimension in the training pairs, or the same to all videos"
            )

    def _decoder(self, shards: ShardSet, training: bool = False) -> PairDecoder:
        """Decoder of pairs, which only training exchanges and changes."""
        swapped, augment = (self.seed if self.swap else None, self.augment) if training else (None, None)
        scores = scores_of if self.scores == "mean" else self._scales
        reader = self._reader(shards, self.keep_gb if training else 0.0)
        return PairDecoder(reader, swapped, augment, self.seed, scores)

    def _pair_loader(self, which: str, training: bool) -> ShardLoader:
        shards = self._pairs(which)
        decode = self._decoder(shards, training)
        contents = self._chosen(shards) if training else shards.contents()
        check_rated(contents, shards.name)
        if training:
            check_targets(self.trainer.lightning_module, ratings_in(contents), shards.name)
        return self._loader(shards, contents, decode, training)

    def train_dataloader(self) -> ShardLoader:
        """Batches of pairs, shuffled anew each epoch."""
        return self._pair_loader("train", training=True)

    def val_dataloader(self) -> list[ShardLoader]:
        """The held-out pairs, then each benchmark's videos."""
        loaders = [self._pair_loader("val", training=False)] if self.paths["val"] else []
        for name, benchmark in self.benchmarks.items():
            reader = self._reader(benchmark.shards)
            decode = VideoDecoder(reader, benchmark.numbers)
            loaders.append(self._loader(benchmark.shards, benchmark.shards.contents(), decode, False, name))
        return loaders

    def test_dataloader(self) -> list[ShardLoader]:
        """The loaders of validation, on which a test measures."""
        return self.val_dataloader()

    def examples(self, count: int) -> list[VideoPair]:
        """The first held-out pairs that can be used, decoded, for pictures; the same ones at every call.

        Args:
            count: Number of pairs.
        """
        shards = self._pairs("val")
        decode = self._decoder(shards)
        found: list[VideoPair] = []
        for content in shards.contents():
            if len(found) == count:
                break
            with contextlib.suppress(VideoAlignError):  # validation counts those that cannot be used
                found.append(decode(content.raw(), 0))
        return found

    def find_pairs(self, keys: Sequence[str]) -> list[VideoPair]:
        """Held-out pairs by their keys, decoded, in that order.

        Args:
            keys: Keys of held-out pairs.
        """
        shards = self._pairs("val")
        decode = self._decoder(shards)
        contents = shards.contents()
        places = {key: number for number, key in enumerate(contents.keys())}
        return [decode(contents[places[key]].raw(), 0) for key in keys]
