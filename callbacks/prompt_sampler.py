"""Samples of policy and reference from the same prompts and noise, for the callbacks that compare their videos."""

from collections.abc import Sequence
from dataclasses import dataclass

import lightning as L
import torch
from torch import Tensor

from .. import VideoAlignError
from ..datamodules.contracts import AlignsGenerator, require
from ..models.flow import draw, draw_seed, interpolate
from ..models.generator_folder import load_generator


@dataclass(kw_only=True)
class Sampling:
    """Size of sampled videos, and how they are sampled."""

    num_frames: int
    """Frames of a video; the generator's autoencoder says which numbers it can decode."""
    height: int
    """Height of a video, in pixels."""
    width: int
    """Width of a video, in pixels."""
    fps: int = 16
    """Frame rate that the videos are meant for, in frames per second."""
    steps: int = 50
    """Number of scheduler steps."""
    cfg_scale: float = 1.0
    """Classifier-free guidance scale; 1 turns it off."""
    negative: str = ""
    """Negative prompt of classifier-free guidance."""
    batch_size: int = 1
    """Number of videos that are sampled at once."""
    seed: int = 0
    """Seed of the noise."""


class PromptSampler:
    """Samples latents of policy and reference for a list of prompts.

    Args:
        module: The alignment module that holds both.
        sampling: Size of the videos, and how they are sampled.
        prompts: Prompts of the videos. The text encoder is loaded to embed them, and freed afterwards.
    """

    def __init__(self, module: L.LightningModule, sampling: Sampling, prompts: Sequence[str]) -> None:
        self.module, self.sampling, self.prompts = module, sampling, list(prompts)
        self.aligned = require(module, AlignsGenerator, type(self).__name__)
        shape = self.aligned.generator.latent_shape(sampling.num_frames, sampling.height, sampling.width)
        self.shape = torch.Size(shape)
        dtype = "bfloat16" if module.device.type == "cuda" else "float32"  # UMT5-XXL is 23 GB in fp32
        encoder = load_generator(self.aligned.name, dtype, ("text_encoder",), family=type(self.aligned.generator)).to(
            module.device
        )
        self.embeds = encoder.encode_prompts([*prompts, sampling.negative])
        del encoder
        if module.device.type == "cuda":
            torch.cuda.empty_cache()

    def noise(self, items: Sequence[tuple[int, int]]) -> Tensor:
        """Draw the noise of (prompt, number) items, which depends on the seed, the prompt's text and the number alone.

        Args:
            items: N pairs of a prompt's place in the list and the number of its noise.

        Returns:
            Noise (N, C, F, H, W).
        """
        seeds = torch.tensor([draw_seed(self.sampling.seed, self.prompts[p], n) for p, n in items])
        return draw(seeds, self.shape, self.module.device)[1]

    def _precision(self):
        """The trainer's precision, which Lightning does not apply in callbacks."""
        return self.module.trainer.precision_plugin.forward_context()

    @torch.no_grad()
    def both(self, items: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Sample videos of policy and reference from the same noise. Collective under sharding.

        Args:
            items: N pairs of a prompt's place in the list and the number of its noise.

        Returns:
            Latents (N, C, F, H, W) of the policy, and of the reference.
        """
        generator, s = self.aligned.generator, self.sampling
        if generator.vae is None:
            raise VideoAlignError("videos cannot be decoded: add vae to model.parts")
        condition = generator.condition([self.embeds[p] for p, _ in items])
        null = generator.condition(self.embeds[-1:]) if s.cfg_scale > 1 else None
        noise = self.noise(items)
        with self._precision():
            policy = generator.sample(condition, noise, s.steps, s.cfg_scale, null)
        with self._precision(), self.aligned.as_reference() as net:
            return policy, generator.sample(condition, noise, s.steps, s.cfg_scale, null, net)

    @torch.no_grad()
    def drift(self, latents: Tensor, items: Sequence[tuple[int, int]], draws: int = 4) -> Tensor:
        """Measure how far the policy's velocities are from the reference's. Collective under sharding.

        Args:
            latents: (N, C, F, H, W) latents that are noised for it.
            items: N pairs of a prompt's place in the list and the number of its noise.
            draws: Number of flow times, which are the middles of as many equal parts of (0, 1).

        Returns:
            (N,) mean squared difference of the two velocities.
        """
        generator = self.aligned.generator
        condition, noise = generator.condition([self.embeds[p] for p, _ in items]), self.noise(items)
        total = torch.zeros(len(items), device=latents.device)
        for i in range(draws):
            t = torch.full((len(items),), (i + 0.5) / draws, device=latents.device)
            x = interpolate(latents, noise, t)
            with self._precision():
                mine = generator.velocity(x, t, condition)
            with self._precision(), self.aligned.as_reference() as net:
                total += (mine - generator.velocity(x, t, condition, net)).square().flatten(1).mean(1)
        return total / draws
