"""A reward model that scores videos: one object behind `score`, `bench`, `pairs-from-rewards` and `compare`."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from .. import VideoAlignError
from ..alignment.reward_model import RewardModel
from ..callbacks.prompt_sampler import Sampling
from ..callbacks.reward_rows import RewardRows, read_rewards
from ..datamodules.shards import ShardSet
from ..datamodules.stream import in_turn
from ..datamodules.video_list import Listed, VideoList, by_length, videos_of
from ..models.dimensions import DIMENSIONS
from ..models.fingerprint import fingerprint
from ..models.locks import held
from ..models.official import open_reward
from ..models.video_reward import VideoReward
from .predicting import predicting


class RewardJudge:
    """A reward model and how it scores. The model is loaded when it is first needed, and then kept.

    Args:
        model: Folder or hub id (ORG/NAME@REVISION) of a reward model, of this package or an official one.
        backbone: Folder or hub id of the backbone, if it is not where the model's folder says.
        template: Text file with the official template; for official folders only.
        official_repo: Clone of the official repository to read the template from; for official folders only.
        checkpoint_step: Step of the checkpoint; the latest by default. For official folders only.
        dtype: Dtype of the backbone's weights, such as bfloat16; by default the folder's.
        batch_size: Videos per step.
        workers: Processes that decode while the model computes; 0 decodes between its steps.
        device: Where to compute: auto, cpu or gpu.
        devices: Number of processes that share the videos.
    """

    def __init__(
        self,
        *,
        model: str,
        backbone: str | None = None,
        template: str | None = None,
        official_repo: str | None = None,
        checkpoint_step: int | None = None,
        dtype: str | None = None,
        batch_size: int = 8,
        workers: int = 1,
        device: str = "auto",
        devices: int = 1,
    ) -> None:
        for name, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0), ("devices", devices, 1)):
            if value < least:
                raise VideoAlignError(f"{name} of reward model {model} must be at least {least}, got {value}")
        self.model, self.backbone, self.checkpoint_step, self.dtype = model, backbone, checkpoint_step, dtype
        self.template, self.official_repo = template, official_repo
        self.batch_size, self.workers, self.device, self.devices = batch_size, workers, device, devices
        self._trainers: dict[bool, L.Trainer] = {}

    # --- the model ----------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The model's folder."""
        return f"reward model {self.model}"

    @cached_property
    def network(self) -> VideoReward:
        """The reward model's network. Settings that are changed on it hold for everything that is scored later."""
        source = (self.backbone, self.template, self.official_repo, self.checkpoint_step, self.dtype)
        return open_reward(self.model, *source)

    @cached_property
    def module(self) -> RewardModel:
        """The network as a module that a trainer predicts with."""
        return RewardModel(self.network)

    def need_statistics(self) -> None:
        """Refuse a model whose rewards were never measured on held-out pairs: its dimensions cannot be weighed."""
        self.network.need_statistics(self.model)

    def record_of(self, videos: ShardSet) -> dict[str, Any]:
        """What rewards of a set depend on, as JSON."""
        processor = self.network.processor
        return {
            "weights": fingerprint(self.network),
            "template": processor.template.text,
            "sampling": processor.sampling.to_dict(),
            "pixels": asdict(processor.geometry),
            "positions": self.network.positions,
            "dtype": self.network.settings["dtype"],
            "data": videos.digest,
        }

    # --- scoring ------------------------------------------------------------------------------------------------

    def score_files(self, videos: Sequence[Listed], listener: L.Callback) -> None:
        """Score video files in their order.

        Args:
            videos: Files, prompts and images.
            listener: Callback that gets the raw rewards of every batch as soon as they are computed.
        """
        bar = len(videos) > self.batch_size and sys.stderr.isatty()
        trainer = predicting(self.device, [listener], bar, self.devices, self.network.settings["dtype"])
        batches = in_turn(len(videos), self.batch_size)
        trainer.predict(self.module, VideoList(videos, batches, self.workers), return_predictions=False)

    def score_set(self, videos: ShardSet, keys: Sequence[str], folder: Path, progress: bool = False) -> Tensor | None:
        """Raw rewards of a set's videos; those that are on disk already are not computed again.

        Args:
            videos: Set of kind *videos* or *pairs*.
            keys: Keys of the videos, see :func:`.video_list.videos_of`.
            folder: Folder for a line per video as it is scored.
            progress: Whether to show how far it is.

        Returns:
            (videos, D) in the order of ``keys``; None on every process but the first.
        """
        found = videos_of(videos, self.network.processor)
        if absent := [key for key in keys if key not in found]:
            raise VideoAlignError(
                f"{videos.name}: {len(absent)} of its pairs' videos are not in its shards, such as {absent[:3]}"
            )
        listed, trainer = [found[key] for key in keys], self._trainer(progress)
        with held(folder):  # before looking at what is scored already
            scored = read_rewards(folder)
            done = {number for number, key in enumerate(keys) if key in scored}
            left = VideoList(listed, by_length(listed, self.batch_size), self.workers, done)
            rows = RewardRows(list(keys), folder, self.record_of(videos))
            trainer.callbacks = [*(c for c in trainer.callbacks if not isinstance(c, RewardRows)), rows]
            trainer.predict(self.module, left, return_predictions=False)
            if not trainer.is_global_zero:
                return None
            rewards = read_rewards(folder)
            return torch.tensor([rewards[key] for key in keys])

    def _trainer(self, progress: bool) -> L.Trainer:
        """One trainer for all sets: a second one would start its processes anew."""
        if progress not in self._trainers:
            self._trainers[progress] = predicting(
                self.device, [], progress, self.devices, self.network.settings["dtype"]
            )
        return self._trainers[progress]

    # --- as a judge (see :class:`.judge.Judge`) -----------------------------------------------------------------

    def check(self, prompts: Sequence[str], sampling: Sampling) -> None:
        """Refuse a model without statistics, and several processes: those would each run the whole comparison."""
        if self.devices != 1:
            raise VideoAlignError(
                f"{self.name} has devices {self.devices}, but a comparison runs in one process; leave devices out"
            )
        self.need_statistics()

    def rate_set(self, videos: ShardSet, keys: Sequence[str], folder: Path) -> dict[str, Tensor]:
        """Normalised rewards by dimension."""
        rewards = self.network.normalise(self.score_set(videos, keys, folder))
        return dict(zip(DIMENSIONS, rewards.unbind(1)))
