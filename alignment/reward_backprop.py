"""Training along the gradient of a reward: PRFL through noisy latents, DRaFT-K and ReFL through decoded frames."""

import math
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from .. import VideoAlignError
from ..callbacks.reports import HasVideoSize
from ..datamodules.contracts import HasNullPrompt, require
from ..datamodules.judgements import Weights, without_image
from ..models.backprop import Chain, RandomStep, Route
from ..models.dimensions import DIMENSIONS
from ..models.flow import draw
from ..models.noisy_reward import NoisyReward
from ..models.reward_gradients import FrameRewards, NoisyRewards, RewardOfLatents
from ..models.video_reward import VideoReward
from ..models.whole import refuse_plan
from .flow_sft import FlowSFT


class RewardBackprop(FlowSFT):
    r"""Descent along a reward's own gradient, which goes through the last steps of sampling into the policy:

    .. math::
        L = E\,[\lambda\, \max(0,\; m - r(x_\theta, y))]

    with :math:`r` the weighted mean of the normalised rewards, and :math:`m` the target, above which a video no longer
    counts; without a target :math:`L = -\lambda\, E\,r`. Which latents :math:`x_\theta` the reward reads, and which
    steps of sampling have gradients, the route says:

    - PRFL: ``through: noisy`` with :class:`~videoalign.models.backprop.RandomStep`, :math:`\lambda = 0.1` and
      :math:`m = 2`, in turn with plain flow matching (Mi et al., 2025);
    - DRaFT-K (Clark et al., 2024): ``through: frames`` with :class:`~videoalign.models.backprop.LastSteps`;
    - ReFL (Xu et al., 2023): ``through: frames`` with :class:`~videoalign.models.backprop.PredictedEnd`.

    Prompts, images and seeds are those of the batch. Its latents give their shape alone to a step along the reward, and
    are fitted in the steps of flow matching. All of a step's micro-batches, on all ranks, are of one kind.

    Further metrics: ``loss/reward``, ``rewards/{VQ,MQ,TA,overall}``, normalised, and ``rewards/capped``, the share of
    videos above the target; ``loss`` is that of flow matching. Held-out samples have both.

    Args:
        reward: Folder or hub id of a reward, which stays as it is: a noisy reward of this generator where ``through``
            is ``noisy``, or a VideoReward of this package (`videoalign convert` makes one of the released folder).
        through: Latents that the reward reads: ``noisy`` ones, by a noisy reward, or those of finished videos as
            decoded ``frames``, by a VideoReward.
        route: Steps of sampling that have gradients; RandomStep if not given, which is for ``through: noisy``.
        steps: Number of sampling steps, at least 1.
        shift: Shift of the sampling times; the authors' own if not given.
        cfg_scale: Classifier-free guidance scale of the sampling, at least 1; 1 turns it off.
        weights: Weights of the dimensions in the reward.
        scale: Factor of the reward's loss, above 0.
        target: Normalised reward above which a video has no gradient, so that the policy gains nothing by extremes;
            null sets no bound.
        matching: Share of the steps that are plain flow matching on the preferred videos, in [0, 1); they keep the
            policy near real ones. With 0.5 the two kinds take turns.
        latent_frames: Number of first latent frames that are decoded, where ``through`` is ``frames``; all of them if
            not given. Fewer take less memory, and show less motion.
        **kwargs: Arguments of :class:`FlowSFT`. ``fps`` is the frame rate at which a VideoReward sees the videos.
    """

    def __init__(
        self,
        reward: str,
        through: Literal["noisy", "frames"] = "noisy",
        route: Route | None = None,
        steps: int = 40,
        shift: float | None = None,
        cfg_scale: float = 1.0,
        weights: Weights = Weights(),  # noqa: B008  frozen
        scale: float = 0.1,
        target: float | None = 2.0,
        matching: float = 0.5,
        latent_frames: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if steps < 1 or not 1 <= cfg_scale < math.inf:
            raise VideoAlignError(f"model.steps {steps} and model.cfg_scale {cfg_scale} must be at least 1")
        if not 0 < scale < math.inf or (target is not None and not math.isfinite(target)):
            raise VideoAlignError(f"model.scale must be positive and model.target finite or null: {scale}, {target}")
        if not 0 <= matching < 1:
            raise VideoAlignError(f"model.matching is a share of the steps in [0, 1), got {matching}")
        if latent_frames is not None and (latent_frames < 1 or through == "noisy"):
            raise VideoAlignError(
                f"model.latent_frames {latent_frames} is the number of latent frames that are decoded, at least 1, "
                "under model.through: frames"
            )
        self.through, self.route, self.steps, self.shift = through, route or RandomStep(), steps, shift
        self.cfg_scale, self.dimension_weights, self.latent_frames = cfg_scale, weights, latent_frames
        self.scale, self.target, self.matching = scale, target, matching
        self.route.check(steps)
        self._check_together()
        # no submodule: the reward is in no checkpoint, trains nowhere, and is not sharded with the policy
        self.reward = self._load(reward, bool(kwargs.get("gradient_checkpointing", False)))

    def _check_together(self) -> None:
        """Refuse options that cannot work together."""
        refuse_plan(type(self).__name__)
        if self.through == "frames" and not self.route.clean:
            raise VideoAlignError(
                f"model.route {type(self.route).__name__} ends at noisy latents, which model.through: frames cannot "
                "decode; choose LastSteps or PredictedEnd, or model.through: noisy"
            )
        if self.generator.boundary is not None and (self.route.clean or self.generator.expert == "low"):
            raise VideoAlignError(
                "sampling to the end, or the low expert's steps, need both experts, and a training loads the one that "
                "trains: use model.expert: high with model.through: noisy and the route RandomStep"
            )
        if self.through == "noisy" and self.memory.stored:
            raise VideoAlignError(
                "a noisy reward copies blocks of the transformer, and cannot where they are quantised or cast: leave "
                "memory.quantization and memory.layerwise_casting out"
            )
        if self.through == "frames" and "vae" in self.memory.group_offload:
            raise VideoAlignError(
                "memory.group_offload of the vae takes its weights away before the backward pass, which goes through "
                "it under model.through: frames; leave it out, or decode less (model.latent_frames)"
            )

    def _load(self, reward: str, checkpointed: bool) -> RewardOfLatents:
        """The frozen reward.

        Args:
            reward: Folder or hub id.
            checkpointed: Whether its activations are computed again in the backward pass.
        """
        if self.through == "noisy":
            noisy = NoisyReward.from_pretrained(reward, self.generator)
            noisy.need_statistics(reward)
            return NoisyRewards(noisy, checkpointed)
        network = VideoReward.from_pretrained(reward)
        network.need_statistics(reward)
        return FrameRewards(self.generator, network, self.latent_frames, checkpointed)

    def setup(self, stage: str) -> None:
        """Move the reward to the device; refuse guidance without an empty prompt, warn of another frame rate."""
        super().setup(stage)
        data = self.trainer.datamodule
        made = data.video_size().get("fps") if isinstance(data, HasVideoSize) else None
        if self.through == "frames" and made and made != round(self.generator.fps):
            rank_zero_warn(
                f"model.fps is {self.generator.fps:g}, and the latents are of videos of {made} frames per second: the "
                "reward sees other frames than it would of their files; set model.fps to their rate"
            )
        if self.cfg_scale > 1:
            require(self.trainer.datamodule, HasNullPrompt, f"{type(self).__name__} with model.cfg_scale above 1")
        self.reward.to(self.trainer.strategy.root_device)

    # --- steps ------------------------------------------------------------------------------------------------

    def matches(self, step: int) -> bool:
        """Whether an optimizer step is one of flow matching; steps along the reward come first.

        Args:
            step: Number of the optimizer step, from 0.
        """
        return math.floor((step + 1) * self.matching) > math.floor(step * self.matching)

    def _chain(self, batch: dict[str, Any]) -> tuple[Chain, Tensor]:
        """The sampling of a batch, and the uniform variables (N,) that its samples' seeds give."""
        latents = batch["latents"]
        self.generator.check_latents(latents.shape)
        uniform, noise = draw(batch["seeds"], latents.shape[2:], latents.device)
        condition = self.generator.condition(batch["conditions"], latents.device)
        null = None
        if self.cfg_scale > 1:
            null = self.generator.null_condition(self.trainer.datamodule.null, latents.device)
        return Chain(self.generator, condition, noise, self.steps, self.cfg_scale, null, self.shift), uniform

    def _common(self, count: int, device: torch.device) -> int:
        """The largest number of steps among processes that share a sharded transformer. Collective there."""
        if self.device_mesh is None:
            return count
        most = torch.tensor(count, device=device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        return int(most)

    def rewards_of(self, batch: dict[str, Any]) -> Tensor:
        """Normalised rewards (N, D) of the videos that the policy samples, with gradients along the route.

        Args:
            batch: Batch of :class:`~videoalign.datamodules.latents.LatentPairs`.
        """
        chain, uniform = self._chain(batch)
        stops = self.route.stops(uniform, chain.times, self.generator.interval()[0])
        x = chain.walk(stops, self._common(int(stops.max()), stops.device))
        x, t = self.route(chain, x, stops)
        return self.reward(x, t, chain.condition, [without_image(text) for text in batch["texts"]])

    def _reward_step(self, batch: dict[str, Any], stage: str) -> Tensor:
        """Loss of a batch along the reward; collects its metrics."""
        rewards = self.rewards_of(batch)
        overall = self.dimension_weights(rewards)
        losses = -overall if self.target is None else (self.target - overall).clamp(min=0)
        losses = self.scale * losses
        values = {"loss/reward": losses, "rewards/overall": overall}
        values |= {f"rewards/{name}": column for name, column in zip(DIMENSIONS, rewards.unbind(-1))}
        if self.target is not None:
            values["rewards/capped"] = (overall >= self.target).float()
        means, valid = self.step_means if stage == "train" else self.held_out_means, batch["valid"]
        for name, value in values.items():
            means.add(name, value, valid)
        return torch.where(valid, losses, 0.0).sum() / len(valid)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of a batch: along the reward, or of flow matching."""
        if "latents" not in batch or self.matches(self.global_step):
            return super().training_step(batch, batch_idx)
        return self.finite(self._reward_step(batch, "train"), batch["keys"])

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Collect the velocity errors and the rewards of a held-out batch."""
        super().validation_step(batch, batch_idx, dataloader_idx)
        if "latents" in batch:
            self._reward_step(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Run the validation step on test data."""
        self.validation_step(batch, batch_idx, dataloader_idx)
