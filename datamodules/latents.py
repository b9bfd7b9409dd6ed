"""Latents on disk: videos and prompts that a generator encoded once, as batches for many trainings.

A sample's tensors: ``a`` and ``b``, or ``video``, (C, F, H, W) normalised latents; ``prompt`` (L, E), without padding.
The set also holds the embedding of the empty prompt, which classifier-free guidance needs, as ``null.safetensors``.

Legend: N pairs or videos; S sides, 2 (preferred, other) or 1; D dimensions.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import safetensors.torch
import torch
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError
from torch import Tensor

from .. import VideoAlignError
from ..models.dimensions import DIMENSIONS
from ..models.flow import draw_seed
from .contents import Contents, RawSample, ShardError
from .contracts import HasGenerator, HasReferenceErrors, require
from .latent_files import NULL, OF, load_latents
from .ratings import labels_of, prompt_of
from .reference_errors import ReferenceErrors
from .shards import ShardSet
from .stream import FilledCollate, ShardLoader, ShardStream, Share, at_least, training_share


@dataclass(frozen=True)
class Weights:
    """Weight of each dimension in the preference: 1:1:1 in the paper, 0:0:1 for text alignment alone."""

    VQ: float = 1.0
    """Weight of visual quality."""
    MQ: float = 1.0
    """Weight of motion quality."""
    TA: float = 1.0
    """Weight of text alignment."""

    def __post_init__(self) -> None:
        values = (self.VQ, self.MQ, self.TA)
        if not all(math.isfinite(v) and v >= 0 for v in values) or not sum(values) > 0:
            raise VideoAlignError(f"weights of VQ, MQ and TA {values} must not be negative, and one at least positive")

    def __call__(self, values: Tensor) -> Tensor:
        """Weighted mean over the last axis (D); a dimension of weight 0 may be missing (NaN)."""
        weights = torch.tensor([self.VQ, self.MQ, self.TA])
        return torch.where(weights != 0, weights * values, 0.0).sum(-1) / weights.sum()


@dataclass(frozen=True)
class Judged:
    """The judgement of a sample, from its record alone.

    Attributes:
        prompt: Text that the videos were generated from.
        scores: Weighted rewards (S,), or half the weighted label with either sign; the preferred side first. NaN where
            unknown.
        rewards: Rewards (S, D) in the same order; NaN where there is none.
        labels: Labels (D,) of the first side against the second; NaN where there is none.
        swapped: Whether B is the preferred side.
    """

    prompt: str
    scores: Tensor
    rewards: Tensor
    labels: Tensor
    swapped: bool

    @property
    def margin(self) -> float:
        """How much better the preferred side is."""
        return float(self.scores[0] - self.scores[-1])


def judge(record: dict, of: str, weights: Weights, name: str) -> Judged:
    """Decide which side of a sample is preferred, and by how much: by its rewards, or by its labels without rewards.

    Args:
        record: JSON record of the sample.
        of: Kind of the videos, ``pairs`` or ``videos``.
        weights: Weights of the dimensions.
        name: What to call the sample in messages.
    """
    rewards = torch.full((len(OF[of]), len(DIMENSIONS)), torch.nan)
    if (given := record.get("rewards")) is not None:
        rows = [given.get(side, {}) for side in "AB"] if of == "pairs" else [given]
        try:
            rewards = torch.tensor([[float(row.get(d, math.nan)) for d in DIMENSIONS] for row in rows])
        except (TypeError, ValueError, AttributeError):
            raise ShardError(f"{name}: rewards {given!r} are no numbers by dimension") from None
    scores, labels = weights(rewards), torch.full((len(DIMENSIONS),), torch.nan)
    if of == "pairs":
        if record.get("labels") is not None or scores.isnan().any():
            labels = labels_of(record, name)[: len(DIMENSIONS)]
        if scores.isnan().any():
            scores = torch.stack([weights(labels), -weights(labels)]) / 2
    swapped = of == "pairs" and bool(scores[1] > scores[0])
    order = [1, 0] if swapped else slice(None)
    return Judged(prompt_of(record, name), scores[order], rewards[order], -labels if swapped else labels, swapped)


@dataclass(frozen=True)
class Sample:
    """A decoded sample, its sides in the order of preference.

    Attributes:
        key: Key of the sample.
        latents: Normalised latents (S, C, F, H, W).
        prompt: Embedding (L, E) of the prompt.
        judged: Judgement of the sample.
        seed: Seed of its noise and time in this epoch.
        reference: Cached errors (S,) of the reference; NaN where there are none.
    """

    key: str
    latents: Tensor
    prompt: Tensor
    judged: Judged
    seed: int
    reference: Tensor


class Decoder:
    """Decodes a raw sample of a *latents* set to a :class:`Sample`.

    Args:
        of: Kind of the videos, ``pairs`` or ``videos``.
        judged: Judgements by key.
        seed: Seed of noise and times.
        training: Whether noise and times change with the epoch.
        cached: Gives seed and reference errors (S,) of a key in an epoch; None without a cache.
    """

    def __init__(
        self,
        of: str,
        judged: dict[str, Judged],
        seed: int,
        training: bool,
        cached: Callable[[str, int], tuple[int, Tensor]] | None,
    ) -> None:
        self.of, self.judged, self.seed, self.training, self.cached = of, judged, seed, training, cached

    def __call__(self, raw: RawSample, epoch: int) -> Sample:
        tensors, judged = load_latents(raw.members["safetensors"], raw.name), self.judged[raw.key]
        if not {*OF[self.of]} <= tensors.keys():
            raise ShardError(f"{raw.name} does not hold latents of {self.of}")
        latents = torch.stack([tensors[side] for side in OF[self.of]])
        if self.cached:
            seed, reference = self.cached(raw.key, epoch)
        else:
            # held-out samples keep their noise and times
            seed = draw_seed(self.seed, epoch if self.training else 0, raw.key)
            reference = torch.full((len(latents),), torch.nan)
        if judged.swapped:
            latents, reference = latents.flip(0), reference.flip(0)
        return Sample(raw.key, latents, tensors["prompt"], judged, seed, reference)


class LatentCollate(FilledCollate):
    """Collates decoded samples of a *latents* set, all of one shape."""

    def tensors(self, samples: list[Sample]) -> dict[str, Any]:
        """Latents, embeddings of prompts, judgements, seeds and cached reference errors.

        Raises:
            VideoAlignError: If the samples have latents of several shapes.
        """
        shapes = {tuple(sample.latents.shape) for sample in samples}
        if len(shapes) > 1:
            raise VideoAlignError(
                f"latents of several shapes in one batch: {sorted(shapes)}. Encode the set at one size and length, "
                "or use data.batch_size 1."
            )
        return {
            "keys": [sample.key for sample in samples],
            "latents": torch.stack([sample.latents for sample in samples], 1).float(),  # (S, N, C, F, H, W)
            "prompts": [sample.prompt for sample in samples],  # N of (L, E)
            "texts": [sample.judged.prompt for sample in samples],
            "scores": torch.stack([sample.judged.scores for sample in samples], 1),  # (S, N)
            "labels": torch.stack([sample.judged.labels for sample in samples]),  # (N, D)
            "rewards": torch.stack([sample.judged.rewards for sample in samples], 1),  # (S, N, D)
            "reference": torch.stack([sample.reference for sample in samples], 1),  # (S, N)
            "seeds": torch.tensor([sample.seed for sample in samples]),
        }


class LatentPairs(L.LightningDataModule):
    """Streams latents of pairs, the preferred side first, or of single videos.

    Every sample carries the seed of its noise and time, which depends on (seed, epoch, key) alone: training is the same
    on any number of ranks, and after a resumption.

    Args:
        train: Folder of a *latents* set to train on.
        val: Folder of a *latents* set of held-out samples.
        batch_size: Samples per rank and micro-batch.
        val_batch_size: Held-out samples per rank and batch; ``batch_size`` if not given.
        workers: Processes per rank that read.
        weights: Weights of the dimensions in the preference.
        min_margin: Pairs whose weighted rewards (or labels) differ by no more are left out; 0 leaves out those that do
            not differ at all. null keeps every pair, for modules that learn from the labels of each dimension.
        reference: Folder of cached reference errors of the training set (`experiments/reference/*.yaml` writes it);
            training then uses the noise and times that they were computed at.
        shuffle_buffer: Number of samples among which the next one is drawn; 0 keeps their order on disk. It costs no
            memory.
        max_dropped: Share of an epoch's samples that may be unusable before training stops.
        seed: Seed of order, noise and times.
    """

    def __init__(
        self,
        train: str | None = None,
        val: str | None = None,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        workers: int = 1,
        weights: Weights = Weights(),
        min_margin: float | None = 0.0,
        reference: str | None = None,
        shuffle_buffer: int = 8192,
        max_dropped: float = 0.001,
        seed: int = 0,
    ) -> None:
        super().__init__()
        at_least(1, batch_size=batch_size, val_batch_size=val_batch_size)
        at_least(0, workers=workers, shuffle_buffer=shuffle_buffer)
        if min_margin is not None and not min_margin >= 0:
            raise VideoAlignError(f"data.min_margin must not be negative, got {min_margin}")
        self.paths = {"train": train, "val": val}
        self.batch_size, self.val_batch_size, self.workers = batch_size, val_batch_size or batch_size, workers
        self.weights, self.min_margin, self.reference_path = weights, min_margin, reference
        self.shuffle_buffer, self.max_dropped, self.seed = shuffle_buffer, max_dropped, seed
        self.null: Tensor | None = None

    def setup(self, stage: str) -> None:
        """Open the sets, refuse those of another generator, and choose the pairs to use."""
        module, who = self.trainer.lightning_module, type(self).__name__
        identity = require(module, HasGenerator, who).generator.identity()
        self.sets: dict[str, _Opened] = {}
        needed = {"train": stage == "fit", "val": self.paths["val"] is not None or stage != "fit"}
        for which, path in self.paths.items():
            if not needed[which]:
                continue
            if path is None:
                raise VideoAlignError(
                    f"data.{which} is not set: name the folder of a latents set (experiments/encode makes one)"
                )
            self.sets[which] = self._open(path, identity)
        first = next(iter(self.sets.values())).shards
        self.null = _load_null(first)
        self.cached = None
        if self.reference_path and stage == "fit":
            data = first.digest
            settings = require(module, HasReferenceErrors, f"{who} with data.reference").reference_made()
            self.cached = ReferenceErrors(self.reference_path, data, settings)

    def _open(self, path: str, identity: dict[str, str]) -> "_Opened":
        shards = ShardSet(path, "latents")
        stored = shards.index.latents or {}
        if different := {k: (stored.get(k), v) for k, v in identity.items() if stored.get(k) != v}:
            short = {k: [str(one)[: 16 if k == "vae" else 80] for one in both] for k, both in different.items()}
            differences = ", ".join(f"{k}: {a}, here {b}" for k, (a, b) in short.items())
            raise VideoAlignError(
                f"{shards.name} holds latents of another generator ({differences}); "
                "encode the videos with this one's autoencoder"
            )
        of = stored.get("of")
        if of not in OF:
            raise VideoAlignError(
                f"{shards.name}: index.json does not say whether its latents are of pairs or of videos"
            )
        judged: dict[str, Judged] = {}
        left_out = {"tied or closer": 0, "without a label that is asked for": 0}
        kept: list[int] = []
        for number, content in enumerate(contents := shards.contents()):
            one = judge(content.record, of, self.weights, content.name)
            if of == "videos" or self.min_margin is None or one.margin > self.min_margin:
                judged[content.key] = one
                kept.append(number)
            else:
                left_out["without a label that is asked for" if math.isnan(one.margin) else "tied or closer"] += 1
        if any(left_out.values()):
            counts = ", ".join(f"{n} {why}" for why, n in left_out.items() if n)
            rank_zero_info(f"{shards.name}: {len(judged)} pairs are used, {counts} left out")
        if not judged:
            raise VideoAlignError(
                f"{shards.name}: no pair has a margin above {self.min_margin} under weights {self.weights}, "
                "so nothing is left"
            )
        return _Opened(shards, contents.take(kept), judged)

    def _loader(self, which: str, training: bool) -> ShardLoader:
        opened, trainer = self.sets[which], self.trainer
        count = len(opened.contents)
        share = (
            training_share(trainer, count, self.batch_size)
            if training
            else Share(count, self.val_batch_size, trainer.world_size, training)
        )
        cached = self.cached if training else None
        decode = Decoder(opened.shards.index.latents["of"], opened.judged, self.seed, training, cached)
        stream = ShardStream(
            opened.contents, decode, share, trainer.global_rank, self.seed, self.shuffle_buffer, opened.shards.name
        )
        workers = min(self.workers, share.batches)
        options = {
            "persistent_workers": training and workers > 0,
            "pin_memory": trainer.strategy.root_device.type == "cuda",
        }
        collate = LatentCollate(_first_decoded(opened.contents, decode))
        return ShardLoader(stream, collate, workers, self.max_dropped, options)

    def video_size(self) -> dict[str, int]:
        """Size of the videos that were encoded, by the names that `videoalign generate` gives it."""
        made = next(iter(self.sets.values())).shards.index.latents
        return {name: round(made[name]) for name in ("num_frames", "height", "width", "fps") if made.get(name)}

    def prompt_scores(self) -> dict[str, Tensor]:
        """Weighted rewards of all training samples of each prompt, with which Flow-RWR normalises."""
        scores: dict[str, list[Tensor]] = {}
        for judged in self.sets["train"].judged.values():
            scores.setdefault(judged.prompt, []).append(judged.scores)
        return {prompt: torch.cat(values) for prompt, values in scores.items()}

    def has_rewards(self) -> bool:
        """Whether every training sample has rewards; pairs with labels alone have scores, but no rewards."""
        return not any(self.weights(judged.rewards).isnan().any() for judged in self.sets["train"].judged.values())

    def train_dataloader(self) -> ShardLoader:
        """Batches, shuffled anew each epoch."""
        return self._loader("train", training=True)

    def val_dataloader(self) -> list[ShardLoader]:
        """Held-out samples, always with the same noise and times."""
        return [self._loader("val", training=False)] if "val" in self.sets else []

    def test_dataloader(self) -> list[ShardLoader]:
        """The loaders of validation, on which a test measures."""
        return self.val_dataloader()


@dataclass(frozen=True)
class _Opened:
    """An open set.

    Attributes:
        shards: The set.
        contents: Samples to use.
        judged: Their judgements by key.
    """

    shards: ShardSet
    contents: Contents
    judged: dict[str, Judged]


def _first_decoded(contents: Contents, decode: Decoder, among: int = 16) -> Sample | None:
    """A sample that fills places up if the first batch of a worker is unusable."""
    for _, content in zip(range(among), contents):
        with contextlib.suppress(VideoAlignError):
            return decode(content.raw(), 0)
    return None


def _load_null(shards: ShardSet) -> Tensor:
    try:
        return safetensors.torch.load(shards.file(NULL))["prompt"]
    except (ShardError, OSError, SafetensorError, KeyError) as error:
        raise ShardError(
            f"{shards.name}/{NULL} is missing or damaged ({error}): the embedding of the empty prompt"
        ) from None
