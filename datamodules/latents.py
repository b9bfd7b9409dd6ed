"""Latents on disk: videos and prompts that a generator's autoencoder and text encoder saw once, for training many times.

A sample's tensors: ``a`` and ``b``, or ``video``, (C, F, H, W) normalised latents; ``prompt`` (L, E), without padding. The
set holds the embedding of the empty prompt too, which guidance needs, as ``null.safetensors``.

Legend: N pairs or videos; S sides, 2 (preferred, other) or 1; D dimensions.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import safetensors.torch
import torch
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError
from torch import Tensor

from .. import VideoAlignError
from ..models.flow import draw_seed
from ..models.preference import DIMENSIONS
from .latent_files import NULL, OF, load_latents
from .ratings import labels_of, prompt_of
from .reference_errors import ReferenceErrors
from .shards import Contents, RawSample, ShardError, ShardSet, sha256
from .stream import Dropped, Item, ShardLoader, ShardStream, Share, at_least, training_share


@dataclass(frozen=True)
class Weights:
    """How much each dimension counts in what is preferred: 1:1:1 in the paper, 0:0:1 for text alignment alone."""

    VQ: float = 1.0
    """Visual quality."""
    MQ: float = 1.0
    """Motion quality."""
    TA: float = 1.0
    """Text alignment."""

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
    """What is known of a sample without reading its latents.

    Attributes:
        scores: (S,) weighted rewards, or the weighted label of the first side; preferred first. NaN where unknown.
        rewards: (S, D) in the same order. labels: (D,) of the first side against the second; NaN where there is none.
        swapped: B is preferred.
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
    """Which side of a sample is preferred, and by how much: by its rewards, or where there are none by its labels."""
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
    """A sample as training takes it: sides in the order of preference.

    Attributes:
        latents: (S, C, F, H, W). prompt: (L, E). seed: of its noise and time in this epoch.
        reference: (S,) cached errors of the reference, NaN where there are none.
    """

    key: str
    latents: Tensor
    prompt: Tensor
    judged: Judged
    seed: int
    reference: Tensor


class Decoder:
    """Raw sample -> :class:`Sample`."""

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
            seed, reference = (
                draw_seed(self.seed, epoch if self.training else 0, raw.key),
                torch.full((len(latents),), torch.nan),
            )
        if judged.swapped:
            latents, reference = latents.flip(0), reference.flip(0)
        return Sample(raw.key, latents, tensors["prompt"], judged, seed, reference)


class Collate:
    """Items -> batch; items that do not count keep their place with a sound one's tensors and a false mask."""

    benchmark = None

    def __init__(self, spare: Sample | None = None) -> None:
        self.spare = spare

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        sound = [item.value for item in items if not isinstance(item.value, Dropped)]
        batch: dict[str, Any] = {
            "dropped": [item.value for item in items if isinstance(item.value, Dropped)],
            "valid": torch.tensor([item.valid for item in items]),
        }
        self.spare = sound[0] if sound else self.spare
        if self.spare is None:
            return batch
        samples = [self.spare if isinstance(item.value, Dropped) else item.value for item in items]
        shapes = {tuple(sample.latents.shape) for sample in samples}
        if len(shapes) > 1:
            raise VideoAlignError(
                f"latents of several shapes in one batch: {sorted(shapes)}. Encode the set at one size and length, or use data.batch_size 1."
            )
        return batch | {
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

    Every sample brings the seed of its noise and time, which depends on (seed, epoch, key) alone: training is the same
    on any number of ranks, and after a resumption.

    Args:
        train: Folder of a *latents* set.
        val: Folder of a *latents* set of held-out samples.
        batch_size: Samples per rank and micro-batch.
        val_batch_size: Held-out samples per rank and batch; ``batch_size`` if not given.
        workers: Processes per rank that read.
        weights: Weights of the dimensions in what is preferred.
        min_margin: pairs whose weighted rewards (or labels) differ by no more are left out, at 0 those that do not differ at
            all; null keeps every pair, for what learns from the labels of each dimension.
        reference: folder of cached reference errors of the training set (`experiments/reference/*.yaml` writes it); then
            noise and times are those that they were computed at.
        shuffle_buffer: samples among which the next one is drawn; 0 keeps their order on disk. It costs no memory.
        max_dropped: Share of an epoch's samples that may be unusable.
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
        """Open the sets, see that they are this generator's, and choose what is kept."""
        identity = self.trainer.lightning_module.generator.identity()
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
        self.null = _load_null(first.path)
        self.cached = None
        if self.reference_path and stage == "fit":
            data = sha256(first.path / "index.json")
            self.cached = ReferenceErrors(self.reference_path, data, self.trainer.lightning_module.reference_made())

    def _open(self, path: str, identity: dict[str, str]) -> "_Opened":
        shards = ShardSet(path, "latents")
        made = shards.index.latents or {}
        if different := {k: (made.get(k), v) for k, v in identity.items() if made.get(k) != v}:
            raise VideoAlignError(
                f"{path} holds latents of another generator ({', '.join(f'{k}: {str(a)[:16]}, here {b[:16]}' for k, (a, b) in different.items())}); "
                "encode the videos with this one's autoencoder"
            )
        of = made.get("of")
        if of not in OF:
            raise VideoAlignError(f"{path}: index.json does not say whether its latents are of pairs or of videos")
        judged: dict[str, Judged] = {}
        left_out = {"tied or closer": 0, "without a label that is asked for": 0}
        kept: list[int] = []
        for number, content in enumerate(contents := shards.contents()):
            found = judge(content.record, of, self.weights, content.name)
            if of == "videos" or self.min_margin is None or found.margin > self.min_margin:
                judged[content.key] = found
                kept.append(number)
            else:
                left_out["without a label that is asked for" if math.isnan(found.margin) else "tied or closer"] += 1
        if any(left_out.values()):
            rank_zero_info(
                f"{path}: {len(judged)} pairs are used, {', '.join(f'{n} {why}' for why, n in left_out.items() if n)} left out"
            )
        if not judged:
            raise VideoAlignError(
                f"{path}: no pair has a margin above {self.min_margin} under weights {self.weights}, so nothing is left"
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
            opened.contents, decode, share, trainer.global_rank, self.seed, self.shuffle_buffer, str(opened.shards.path)
        )
        workers = min(self.workers, share.batches)
        options = {
            "persistent_workers": training and workers > 0,
            "pin_memory": trainer.strategy.root_device.type == "cuda",
        }
        return ShardLoader(stream, Collate(_first_sound(opened.contents, decode)), workers, self.max_dropped, options)

    def prompt_scores(self) -> dict[str, Tensor]:
        """Weighted rewards of all training samples of each prompt: what Flow-RWR normalises with."""
        scores: dict[str, list[Tensor]] = {}
        for judged in self.sets["train"].judged.values():
            scores.setdefault(judged.prompt, []).append(judged.scores)
        return {prompt: torch.cat(values) for prompt, values in scores.items()}

    def has_rewards(self) -> bool:
        """Whether every training sample has rewards (labels alone give scores to pairs, but no rewards)."""
        return not any(self.weights(judged.rewards).isnan().any() for judged in self.sets["train"].judged.values())

    def train_dataloader(self) -> ShardLoader:
        """Batches, shuffled anew each epoch."""
        return self._loader("train", training=True)

    def val_dataloader(self) -> list[ShardLoader]:
        """Held-out samples, always with the same noise and times."""
        return [self._loader("val", training=False)] if "val" in self.sets else []

    def test_dataloader(self) -> list[ShardLoader]:
        """As validation."""
        return self.val_dataloader()


@dataclass(frozen=True)
class _Opened:
    """A set that was opened.

    Attributes:
        shards: The set.
        contents: Its samples that are used.
        judged: What is known of each of them, by key.
    """

    shards: ShardSet
    contents: Contents
    judged: dict[str, Judged]


def _first_sound(contents: Contents, decode: Decoder, among: int = 16) -> Sample | None:
    """A sample to fill places up with, should a worker's first ones be unusable."""
    for _, content in zip(range(among), contents):
        with contextlib.suppress(VideoAlignError):
            return decode(content.raw(), 0)
    return None


def _load_null(folder: Path) -> Tensor:
    try:
        return safetensors.torch.load_file(folder / NULL)["prompt"]
    except (OSError, SafetensorError, KeyError) as error:
        raise ShardError(
            f"{folder / NULL} is missing or damaged ({error}): the embedding of the empty prompt"
        ) from None
