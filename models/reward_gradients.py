"""Rewards of latents that have gradients: by a reward on noisy latents, or by VideoReward through the decoded frames.

What VideoReward sees is what it sees when it scores a file of the same frames: decoded values are rounded to those of
uint8, frames are sampled and resized as a file's are, and rounded again. A rounding passes the gradient on as if it
were not there.

Legend: N samples; T frames; H, W pixels, or of latents (N, C, F, H, W); D dimensions.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torchvision.transforms.functional import InterpolationMode, resize
from transformers.modeling_layers import GradientCheckpointingLayer

from .. import VideoAlignError
from .family import Condition
from .frame_sampling import FrameSampling
from .generator import Generator
from .noisy_reward import NoisyReward
from .processor import RewardProcessor
from .video_reward import VideoReward


class RewardOfLatents(Protocol):
    """A reward whose gradient reaches latents."""

    def __call__(self, x: Tensor, t: Tensor, condition: Condition, prompts: Sequence[str]) -> Tensor:
        """Normalised rewards (N, D), fp32.

        Args:
            x: Latents (N, C, F, H, W).
            t: Times (N,) in [0, 1].
            condition: Prompts, and images, of the batch.
            prompts: Texts of the prompts.
        """

    def to(self, device: torch.device) -> None:
        """Move the reward's own weights to a device."""


class NoisyRewards:
    """Normalised rewards of latents at any time, by a copy of the generator's first blocks.

    Args:
        reward: Reward on noisy latents, which is frozen. Its blocks are its own: adapters of the generator's
            transformer, and whatever else trains there, are not in them.
        checkpointed: Whether activations of the blocks are computed again in the backward pass.
    """

    def __init__(self, reward: NoisyReward, checkpointed: bool = False) -> None:
        self.reward = reward.eval().requires_grad_(False)
        if checkpointed:
            reward.trunk.enable_gradient_checkpointing()

    def __call__(self, x: Tensor, t: Tensor, condition: Condition, prompts: Sequence[str]) -> Tensor:
        """Normalised rewards (N, D) at times (N,); the prompts are those of the condition."""
        return self.reward.normalise(self.reward(x, t, condition))

    def to(self, device: torch.device) -> None:
        """Move the reward's weights to a device."""
        self.reward.to(device)


class FrameRewards:
    """Normalised rewards of clean latents, by VideoReward through the decoded frames.

    Args:
        generator: Generator that decodes; its autoencoder must have been loaded.
        reward: Reward model, which is frozen.
        latent_frames: Number of first latent frames that are decoded; all of them if not given. An autoencoder that
            decodes causally (Wan) gives the same frames for a part of the latents as for all.
        checkpointed: Whether activations of the autoencoder and of the reward model's layers are computed again in the
            backward pass.

    Raises:
        VideoAlignError: Where the reward model's text shows an image.
    """

    def __init__(
        self, generator: Generator, reward: VideoReward, latent_frames: int | None = None, checkpointed: bool = False
    ) -> None:
        if reward.processor.template.image:
            raise VideoAlignError(
                f"the reward model's template {reward.processor.template.name!r} shows the image that a video begins "
                "with, which latents do not hold; use one without <image>"
            )
        generator.require("vae")
        self.generator, self.latent_frames, self.checkpointed = generator, latent_frames, checkpointed
        self.reward = reward.eval().requires_grad_(False)
        if checkpointed:
            reward.backbone.gradient_checkpointing_enable({"use_reentrant": False})
            # transformers checkpoints layers in train mode alone; of what is inside them, dropout stays off
            for layer in reward.backbone.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    layer.training = True

    def frames(self, x: Tensor) -> Tensor:
        """Decoded frames (N, T, 3, H, W), with the values that uint8 ones would have, and with gradients.

        Args:
            x: Clean latents (N, C, F, H, W).
        """
        with torch.autocast(x.device.type, enabled=False):  # the autoencoder runs in fp32, as when videos are sampled
            pixels = torch.cat([self._decoded(one[None]) for one in x[:, :, : self.latent_frames].float()])
        return as_uint8((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).transpose(1, 2)

    def _decoded(self, latents: Tensor) -> Tensor:
        """Decoded pixels of one sample, (1, 3, T, H, W) in [-1, 1]."""
        if not (self.checkpointed and torch.is_grad_enabled()):
            return self.generator.decode_latents(latents)
        return checkpoint(self.generator.decode_latents, latents, use_reentrant=False)

    def __call__(self, x: Tensor, t: Tensor, condition: Condition, prompts: Sequence[str]) -> Tensor:
        """Normalised rewards (N, D) of clean latents; the times must be 0."""
        return self.rewards(self.frames(x), prompts)

    def rewards(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        """Normalised rewards (N, D) of frames.

        Args:
            frames: All frames (N, T, 3, H, W) of the videos, in [0, 255], at the generator's frame rate.
            prompts: Texts of the prompts.
        """
        inputs = reward_inputs(self.reward.processor, frames, self.generator.fps, prompts)
        return self.reward.normalise(self.reward(**inputs))

    def to(self, device: torch.device) -> None:
        """Move the reward model's weights to a device; the autoencoder is the generator's own."""
        self.reward.to(device)


def as_uint8(values: Tensor) -> Tensor:
    """Values rounded to whole numbers, whose gradient is that of values that were not rounded."""
    return values + (values.round() - values).detach()


def seen(frames: Tensor, fps: float, sampling: FrameSampling, factor: int) -> Tensor:
    """Frames as VideoReward sees them, before they are rounded: a part of them, resized with antialiasing.

    It is what ``datamodules.video.resample`` does with uint8 frames, in a form that has gradients.

    Args:
        frames: All frames (N, T, 3, H, W) of the videos, in [0, 255].
        fps: Frame rate of the videos, in frames per second.
        sampling: Frame sampling of the reward model.
        factor: Number of pixels that the sides become a multiple of.

    Raises:
        VideoAlignError: Where the videos have too few frames, or sides that cannot be resized.
    """
    try:
        kept = frames[:, sampling.indices(frames.shape[1], fps)]
        size = sampling.size(*frames.shape[-2:], factor)
    except VideoAlignError as error:
        raise VideoAlignError(f"the reward model cannot see the decoded videos: {error}") from None
    if size == tuple(kept.shape[-2:]):
        return kept
    small = resize(kept.flatten(0, 1), list(size), InterpolationMode.BICUBIC, antialias=True)
    return small.clamp(0, 255).unflatten(0, kept.shape[:2])  # bicubic curves overshoot


def reward_inputs(processor: RewardProcessor, frames: Tensor, fps: float, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Inputs of VideoReward for frames that have gradients, on the frames' device.

    Args:
        processor: Tokenises prompts and cuts frames.
        frames: All frames (N, T, 3, H, W) of the videos, in [0, 255].
        fps: Frame rate of the videos, in frames per second.
        prompts: Texts of the N prompts.

    Returns:
        The entries of :meth:`.RewardProcessor.__call__`; ``pixel_patches`` are in the frames' dtype, with whole numbers
        as values.
    """
    shown = as_uint8(seen(frames, fps, processor.sampling, processor.factor))
    return {name: part.to(frames.device) for name, part in processor(list(shown), prompts).items()}
