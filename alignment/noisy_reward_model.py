"""Training of the reward on noisy latents that Flow-NRG follows (VideoAlign, section 4.4)."""

import math
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from matplotlib.figure import Figure
from torch import Tensor

from .. import VideoAlignError
from ..callbacks.plots import SMALL, panels, reference_line
from ..callbacks.run_media import media_of
from ..models import preference
from ..models.dimensions import DIMENSIONS
from ..models.flow import TimeLaw, draw, interpolate
from ..models.generator_folder import load_generator
from ..models.lora import LoRA
from ..models.metrics import Calibration, RewardMoments
from ..models.noisy_reward import NoisyReward, NoisyRewardShape
from ..models.whole import only_shapes
from .experts import Expert, require_one_expert
from .export_uses import of_generator, quoted
from .parameter_groups import ParameterGroup
from .reward_training import RewardTraining
from .training import Decay

BINS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Times at which held-out pairs are scored: the middles of equal parts of (0, 1)."""


class NoisyRewardModel(RewardTraining):
    r"""Trains a :class:`~videoalign.models.noisy_reward.NoisyReward` on pairs of latents, both noised to the same t.

    The paper assumes that noising keeps a preference as it is; close to t = 1 nothing is left to see. The losses are
    those of :class:`.reward_model.RewardModel`, ``bt`` by default (Table 11).

    Metrics: ``train/loss``, ``val/loss``, ``val/accuracy/*`` over all times, ``val/accuracy_at_t/*`` per time (and as a
    curve among the images), ``val/calibration/*`` (expected calibration error). Mean and standard deviation of the
    held-out rewards are stored for normalisation.

    Args:
        generator: Folder or hub id of a diffusers pipeline, whose first blocks are copied.
        shape: Architecture of the network; the defaults of :class:`~videoalign.models.noisy_reward.NoisyRewardShape`
            if not given.
        loss: Loss on pairs: ``bt``, or ``btt`` with ties.
        theta: Tie parameter of ``btt``, above 1.
        times: Distribution of the training times.
        shared_noise: Whether both videos of a pair get the same noise (the paper); else each gets its own.
        clean: Whether to train on clean latents only; the paper's ablation, which fails as a guide.
        lora: LoRA adapters on the copied blocks; null trains them in full (the paper). The head always trains.
        optimizer: Optimizer of the parameters that train.
        warmup: Share of the steps in which the learning rate rises, in [0, 1).
        decay: Learning rate after warm-up: ``constant``, or falling to zero at the last step, ``linear`` or ``cosine``.
        groups: Learning rates of groups of parameters by name, or all rates of one with a pattern of its parameters'
            names; the optimizer's if not given. Groups that need no pattern: ``blocks``, or their ``adapters``,
            and ``head``.
        fps: Frame rate of the videos, where the family asks for it (LTX).
        gradient_checkpointing: Whether the blocks' activations are computed again in the backward pass, to save memory.
        family: Class of the generator's family, by import path (``package.module:Name``) or name; found by the
            pipeline's class if not given.
        expert: Which of two experts' blocks are copied (Wan2.2-A14B): ``high`` or ``low``. They read all times.
    """

    own_groups = {"adapters": ("*.lora_*",), "blocks": ("network.trunk.*",), "head": ("*",)}

    def __init__(
        self,
        generator: str,
        shape: NoisyRewardShape | None = None,
        loss: Literal["bt", "btt"] = "bt",
        theta: float = 5.0,
        times: TimeLaw = TimeLaw(),  # noqa: B008  frozen
        shared_noise: bool = True,
        clean: bool = False,
        lora: LoRA | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup: float = 0.0,
        decay: Decay = "constant",
        groups: dict[str, float | ParameterGroup] | None = None,
        fps: float = 25.0,
        gradient_checkpointing: bool = False,
        family: str | None = None,
        expert: Expert | None = None,
    ) -> None:
        super().__init__(optimizer, warmup, decay, groups)
        if loss == "btt":
            preference.check_theta(theta)
        elif loss != "bt":
            raise VideoAlignError(f"model.loss {loss!r} is unknown; choose bt or btt")
        # not registered as a submodule: the generator only knows how to call the copied blocks
        loaded = load_generator(generator, parts=("transformer", "vae"), fps=fps, family=family, expert=expert)
        require_one_expert(loaded, expert)
        object.__setattr__(self, "generator", loaded)
        self.network = NoisyReward(self.generator, shape).train()
        if not only_shapes():  # of a large generator a few blocks are left
            _ = self.network.identity
            self.generator.drop_transformer()
        if lora is not None:
            self.network.adapt(lora)
        if gradient_checkpointing:
            self.network.trunk.enable_gradient_checkpointing()
        self.name, self.family = generator, family
        self.loss, self.theta, self.times = loss, theta if loss == "btt" else 1.0, times
        self.shared_noise, self.clean = shared_noise, clean
        self.calibration, self.moments = Calibration(outcomes=(0, 1, 2) if loss == "btt" else (0, 2)), RewardMoments()

    def rewards(self, batch: dict[str, Any], t: Tensor | None = None) -> Tensor:
        """Raw rewards (2, N, D) of a batch of pairs.

        Args:
            batch: Batch of :class:`~videoalign.datamodules.latents.LatentPairs`.
            t: Times (N,) that the latents are noised to; drawn from :attr:`times` if not given.
        """
        latents = batch["latents"]
        self.generator.check_latents(latents.shape)
        uniform, noise = draw(batch["seeds"], latents.shape[2:], latents.device)
        t = self.times(uniform) if t is None else t
        t = torch.zeros_like(t) if self.clean and self.training else t
        other = noise if self.shared_noise else draw(batch["seeds"] ^ 1, latents.shape[2:], latents.device)[1]
        noise = torch.stack([noise, other])
        condition = self.generator.condition(batch["conditions"] * 2, latents.device)
        x = interpolate(latents.flatten(0, 1), noise.flatten(0, 1), t.repeat(2))
        x = self.generator.with_image(x, condition)
        return self.network(x, t.repeat(2), condition).unflatten(0, (2, -1))

    def _losses(self, rewards: Tensor, labels: Tensor) -> preference.LabelLosses:
        margins = rewards[0] - rewards[1]
        if self.loss == "btt":
            return preference.btt_losses(margins, labels, self.theta)
        return preference.bt_losses(margins, labels)

    def targets(self, labels: Tensor, scores: Tensor) -> Tensor:
        """Dimensions (D,) in which the loss learns from a pair of these labels (D,), NaN for none; no score is read."""
        return self._losses(torch.zeros(2, 1, len(labels)), labels[None]).counted.any(0)

    def _labels(self, batch: dict[str, Any]) -> Tensor:
        if len(batch["latents"]) != 2:
            raise VideoAlignError("a noisy reward learns from pairs, but the latents are of single videos")
        return batch["labels"].masked_fill(~batch["valid"][:, None], torch.nan)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of a batch of pairs."""
        if "latents" not in batch:
            raise VideoAlignError(f"no sample of a batch could be used: {batch['dropped'][-1].reason}")
        losses = self._losses(self.rewards(batch), self._labels(batch))
        self.step_means.add("loss", *losses)
        return self.finite(losses.slot_mean(), batch["keys"])

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score a batch of held-out pairs at every time of :data:`BINS`."""
        if "latents" not in batch:
            return
        labels, valid = self._labels(batch), batch["valid"]
        decided = ~labels.isnan() & (labels != 0)
        for time in BINS:
            rewards = self.rewards(batch, torch.full((len(labels),), time, device=labels.device))
            margins = rewards[0] - rewards[1]
            self.held_out_means.add("loss", *self._losses(rewards, labels))
            self.calibration.update(preference.probabilities(margins, self.theta), labels, valid)
            self.moments.update(rewards.flatten(0, 1), valid.repeat(2))
            right = (margins * labels > 0).double()
            for i, name in enumerate(DIMENSIONS):
                self.held_out_means.add(f"accuracy_at_t/{time}/{name}", right[:, i], decided[:, i])

    def add_rewards(self, batch: dict[str, Any]) -> None:
        """Add the raw rewards of a batch of held-out pairs, at every time of :data:`BINS`, to the moments."""
        if "latents" not in batch:
            return
        for time in BINS:
            t = torch.full((len(batch["valid"]),), time, device=batch["latents"].device)
            self.moments.update(self.rewards(batch, t).flatten(0, 1), batch["valid"].repeat(2))

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        """Add the mean accuracy over all times to the accuracies at each time."""
        for name in DIMENSIONS:
            at_times = [means[key] for time in BINS if (key := f"accuracy_at_t/{time}/{name}") in means]
            if at_times:
                means[f"accuracy/{name}"] = sum(at_times) / len(at_times)
        return means

    def on_validation_epoch_start(self) -> None:
        """Reset the metrics."""
        super().on_validation_epoch_start()
        self.calibration.reset()
        self.moments.reset()

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the held-out pairs, and store the statistics of their rewards. Collective."""
        super().on_validation_epoch_end()
        error, means = self.calibration.compute().error, self.held_out_means.compute()
        for i, name in enumerate(DIMENSIONS):
            self.log(f"val/calibration/{name}", error[i].float())
        self.statistics_now()
        if media := media_of(self.trainer):
            rows = [[means.get(f"accuracy_at_t/{time}/{name}", math.nan) for name in DIMENSIONS] for time in BINS]
            media.figure("val/accuracy_at_t", curve(torch.tensor(rows)))

    def uses_of(self, export: Path) -> dict[str, str]:
        """Commands that use the export."""
        images = self.generator.image == "required"
        return of_generator(export, f"--noisy-reward {quoted(export)}", self.name, self.trainer, images, self.family)


def curve(table: Tensor) -> Figure:
    """Chart of the accuracy over time, a line per dimension.

    Args:
        table: (times, D) accuracies at :data:`BINS`.
    """
    figure, (axis,) = panels(size=(5, 3.2))
    for i, name in enumerate(DIMENSIONS):
        axis.plot(BINS, table[:, i], marker="o", label=name)
    reference_line(axis, 0.5, "chance")
    axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="t (0 data, 1 noise)", ylabel="accuracy without ties")
    axis.legend(fontsize=SMALL)
    return figure
