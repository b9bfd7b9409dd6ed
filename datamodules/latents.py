"""Latents on disk: videos and prompts that a generator encoded once, as batches for many trainings.

A sample's tensors: ``a`` and ``b``, or ``video``, (C, F, H, W) normalised latents; and what they are conditioned on:
``prompt`` (L, E), without padding, and for image-to-video the encoded image (:mod:`.latent_files`), one for both sides
of a pair. The set also holds the empty prompt, encoded, which classifier-free guidance needs, as ``null.safetensors``.

Legend: N pairs or videos; S sides, 2 (preferred, other) or 1; D dimensions.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightning as L
import safetensors.torch
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from safetensors import SafetensorError
from torch import Tensor

from .. import VideoAlignError
from ..models.family import Encoded
from ..models.flow import draw_seed
from ..models.number_checks import at_least, share_of_one
from .contents import Contents, RawSample, ShardError
from .contracts import HasGenerator, HasReferenceErrors, require
from .data_ranks import data_ranks
from .judgements import Judged, Judgements, Weights
from .latent_files import NULL, OF, check_images, conditions_of, load_latents
from .reference_errors import ReferenceErrors
from .shards import ShardSet
from .stream import FilledCollate, ShardLoader, ShardStream, Share, training_share
from .targets import check_targets

if TYPE_CHECKING:
    from ..models.generator import Generator


@dataclass(frozen=True)
class Sample:
    """A decoded sample, its sides in the order of preference.

    Attributes:
        key: Key of the sample.
        latents: Normalised latents (S, C, F, H, W).
        encoded: What its videos are conditioned on, by name: the prompt, and the image if there is one.
        judged: Judgement of the sample.
        seed: Seed of its noise and time in this epoch.
        reference: Cached errors (S,) of the reference; NaN where there are none.
    """

    key: str
    latents: Tensor
    encoded: Encoded
    judged: Judged
    seed: int
    reference: Tensor


class Decoder:
    """Decodes a raw sample of a *latents* set to a :class:`Sample`.

    Args:
        of: Kind of the videos, ``pairs`` or ``videos``.
        weights: Weights of the dimensions in the preference.
        seed: Seed of noise and times.
        training: Whether noise and times change with the epoch.
        cached: Gives seed and reference errors (S,) of a key in an epoch; None without a cache.
        images: Whether the samples have an image.
    """

    def __init__(
        self,
        of: str,
        weights: Weights,
        seed: int,
        training: bool,
        cached: Callable[[str, int], tuple[int, Tensor]] | None,
        images: bool = False,
    ) -> None:
        self.of, self.weights, self.seed, self.training, self.cached = of, weights, seed, training, cached
        self.images = images

    def __call__(self, raw: RawSample, epoch: int) -> Sample:
        tensors = load_latents(raw.members["safetensors"], raw.name)
        judged = Judgements([(raw.record(), raw.name)], self.of, self.weights)[0]
        if not {*OF[self.of]} <= tensors.keys():
            raise ShardError(f"{raw.name} does not hold latents of {self.of}")
        if ("image" in tensors) != self.images:
            raise ShardError(
                f"{raw.name} holds {'no' if self.images else 'an'} image, unlike what the set's index says"
            )
        latents = torch.stack([tensors[side] for side in OF[self.of]])
        if self.cached:
            seed, reference = self.cached(raw.key, epoch)
        else:
            # held-out samples keep their noise and times
            seed = draw_seed(self.seed, epoch if self.training else 0, raw.key)
            reference = torch.full((len(latents),), torch.nan)
        if judged.swapped:
            latents, reference = latents.flip(0), reference.flip(0)
        return Sample(raw.key, latents, conditions_of(tensors), judged, seed, reference)


class LatentCollate(FilledCollate):
    """Collates decoded samples of a *latents* set, all of one shape."""

    def tensors(self, samples: list[Sample]) -> dict[str, Any]:
        """Latents, encoded prompts and images, judgements, seeds and cached reference errors.

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
            "conditions": [sample.encoded for sample in samples],  # N of {"prompt": (L, E), ...}
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
        weights: Weights = Weights(),  # noqa: B008  frozen
        min_margin: float | None = 0.0,
        reference: str | None = None,
        shuffle_buffer: int = 8192,
        max_dropped: float = 0.001,
        seed: int = 0,
    ) -> None:
        super().__init__()
        at_least(1, "data.", batch_size=batch_size, val_batch_size=val_batch_size)
        at_least(0, "data.", workers=workers, shuffle_buffer=shuffle_buffer)
        share_of_one("data.", max_dropped=max_dropped)
        if min_margin is not None and not min_margin >= 0:
            raise VideoAlignError(f"data.min_margin must not be negative, got {min_margin}")
        self.paths = {"train": train, "val": val}
        self.batch_size, self.val_batch_size, self.workers = batch_size, val_batch_size or batch_size, workers
        self.weights, self.min_margin, self.reference_path = weights, min_margin, reference
        self.shuffle_buffer, self.max_dropped, self.seed = shuffle_buffer, max_dropped, seed
        self.null: Encoded | None = None

    def setup(self, stage: str) -> None:
        """Open the sets, refuse those of another generator, and choose the pairs to use."""
        module, who = self.trainer.lightning_module, type(self).__name__
        generator = require(module, HasGenerator, who).generator
        self.sets: dict[str, _Opened] = {}
        needed = {"train": stage == "fit", "val": self.paths["val"] is not None or stage != "fit"}
        for which, path in self.paths.items():
            if not needed[which]:
                continue
            if path is None:
                raise VideoAlignError(
                    f"data.{which} is not set: name the folder of a latents set (experiments/encode makes one)"
                )
            self.sets[which] = self._open(path, generator, stage == "fit" and which == "train")
        first = next(iter(self.sets.values())).shards
        self.null = _load_null(first)
        self.cached = None
        if self.reference_path and stage == "fit":
            data = first.digest
            settings = require(module, HasReferenceErrors, f"{who} with data.reference").reference_made()
            self.cached = ReferenceErrors(self.reference_path, data, settings)

    def _open(self, path: str, generator: "Generator", training: bool) -> "_Opened":
        shards = ShardSet(path, "latents")
        stored, identity = shards.index.latents or {}, generator.identity()
        if different := {k: (stored.get(k), v) for k, v in identity.items() if stored.get(k) != v}:
            short = {k: [str(one)[: 16 if k == "vae" else 80] for one in both] for k, both in different.items()}
            differences = ", ".join(f"{k}: {a}, here {b}" for k, (a, b) in short.items())
            raise VideoAlignError(
                f"{shards.name} holds latents of another generator ({differences}); "
                "encode the videos with this one's autoencoder"
            )
        if generator.reads_fps and (made := stored.get("fps")) and made != generator.fps:
            rank_zero_warn(
                f"{shards.name} holds latents of videos of {made:g} frames per second, and model.fps is "
                f"{generator.fps:g}: this generator's positions depend on it; set model.fps to the videos' rate"
            )
        images, of = check_images(stored, generator.image, shards.name), stored.get("of")
        if of not in OF:
            raise VideoAlignError(
                f"{shards.name}: index.json does not say whether its latents are of pairs or of videos"
            )
        contents = shards.contents()
        judged = Judgements(((content.record, content.name) for content in contents), of, self.weights)
        margins = judged.margins  # (N,)
        kept = torch.arange(len(judged))
        module = self.trainer.lightning_module
        if of == "pairs" and self.min_margin is not None:
            kept = kept[margins > self.min_margin]
        elif of == "pairs" and getattr(module, "sides", None) and (tied := int((~(margins > 0)).sum())):
            raise VideoAlignError(
                f"data.min_margin: null keeps all pairs of {shards.name}, but in {tied} of {len(judged)} no side is "
                f"preferred, and {type(module).__name__} takes one as preferred; leave min_margin out"
            )
        if len(kept) < len(judged):
            unknown = int(margins.isnan().sum())
            tied = len(judged) - len(kept) - unknown
            reasons = {"tied or closer": tied, "without a label that is asked for": unknown}
            counts = ", ".join(f"{n} {why}" for why, n in reasons.items() if n)
            rank_zero_info(f"{shards.name}: {len(kept)} pairs are used, {counts} left out")
        if not len(kept):
            raise VideoAlignError(
                f"{shards.name}: no pair has a margin above {self.min_margin} under weights {self.weights}, "
                "so nothing is left"
            )
        judged = judged.take(kept)
        if of == "pairs" and training:
            check_targets(module, zip(judged.labels, judged.labels.new_full((len(kept), 2, 3), torch.nan)), shards.name)
        return _Opened(shards, contents.take(kept.tolist()), judged, images)

    def _loader(self, which: str, training: bool) -> ShardLoader:
        opened, trainer = self.sets[which], self.trainer
        count, (rank, world) = len(opened.contents), data_ranks(trainer)
        share = (
            training_share(trainer, count, self.batch_size)
            if training
            else Share(count, self.val_batch_size, world, training)
        )
        cached = self.cached if training else None
        of = opened.shards.index.latents["of"]
        decode = Decoder(of, self.weights, self.seed, training, cached, opened.images)
        stream = ShardStream(opened.contents, decode, share, rank, self.seed, self.shuffle_buffer, opened.shards.name)
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
        judged, numbers = self.sets["train"].judged, {}
        for number, prompt in enumerate(judged.prompts):
            numbers.setdefault(prompt, []).append(number)
        return {prompt: judged.scores[found].flatten() for prompt, found in numbers.items()}

    def has_rewards(self) -> bool:
        """Whether every training sample has rewards; pairs with labels alone have scores, but no rewards."""
        return not bool(self.weights(self.sets["train"].judged.rewards).isnan().any())

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
        judged: Their judgements, in the same order.
        images: Whether the samples have an image.
    """

    shards: ShardSet
    contents: Contents
    judged: Judgements
    images: bool


def _first_decoded(contents: Contents, decode: Decoder, among: int = 16) -> Sample | None:
    """A sample that fills places up if the first batch of a worker is unusable."""
    for _, content in zip(range(among), contents):
        with contextlib.suppress(VideoAlignError):
            return decode(content.raw(), 0)
    return None


def _load_null(shards: ShardSet) -> Encoded:
    try:
        tensors = safetensors.torch.load(shards.file(NULL))
        return {"prompt": tensors["prompt"], **conditions_of(tensors)}
    except (ShardError, OSError, SafetensorError, KeyError) as error:
        raise ShardError(
            f"{shards.name}/{NULL} is missing or damaged ({error}): the embedding of the empty prompt"
        ) from None
