"""The noisy reward as a reward of finished samples: clean latents at t = 0, without decoding them."""

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from .. import VideoAlignError
from .dimensions import DIMENSIONS
from .family import Encoded
from .generator_folder import load_generator
from .noisy_reward import NoisyReward


class NoisyRewardScores:
    """A noisy reward's VQ, MQ and TA of clean latents, at t = 0.

    Its blocks are a copy of the generator's as it was before training, so that no adapter of the policy changes them.
    Prompts are embedded when they are checked; the text encoder is on the device only then.

    Args:
        model: Folder or hub id of the noisy reward.
        generator: Folder or hub id of the pipeline that it was trained for.
        family: Class of the generator's family, by import path (``package.module:Name``) or name; found by the
            pipeline's class if not given.
        dtype: Dtype of the text encoder. The reward itself is fp32.
        batch_size: Number of samples, and of prompts, that are computed at once, at least 1.
        raw: Whether rewards stay raw; otherwise they are z-scores by the statistics of the model's folder.
    """

    needs: Literal["videos", "latents"] = "latents"

    def __init__(
        self,
        model: str,
        generator: str,
        family: str | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        batch_size: int = 8,
        raw: bool = False,
    ) -> None:
        if batch_size < 1:
            raise VideoAlignError(f"batch_size of noisy reward {model} must be at least 1, got {batch_size}")
        self.model, self.generator, self.family, self.dtype = model, generator, family, dtype
        self.batch_size, self.raw = batch_size, raw
        self._device = torch.device("cpu")
        self._embedded: dict[str, Encoded] = {}

    @property
    def name(self) -> str:
        """The model's folder."""
        return f"noisy reward {self.model}"

    @cached_property
    def network(self) -> NoisyReward:
        """The network, loaded when it is first needed. Of the generator only the copied blocks are kept."""
        generator = load_generator(self.generator, self.dtype, family=self.family)
        if generator.image == "required":
            raise VideoAlignError(f"{self.name} rates videos of prompts; {self.generator} makes videos from images")
        network = NoisyReward.from_pretrained(self.model, generator)
        generator.drop_transformer()
        return network.to(self._device)

    def check(self, prompts: Sequence[str]) -> None:
        """Load the model and embed the prompts.

        Args:
            prompts: Prompts of all samples that there will be.

        Raises:
            VideoAlignError: Where the model does not fit the generator, was never measured on held-out latents (unless
                ``raw``), or a prompt is too long.
        """
        if not self.raw and self.network.statistics == type(self.network.statistics)():
            raise VideoAlignError(
                f"{self.name} has no statistics of its rewards, so its dimensions cannot be weighed against each "
                "other; train it with held-out pairs (data.val), or set raw: true"
            )
        self._embed(prompts)

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Rate latents.

        Args:
            videos: Clean, normalised latents (B, C, F, H, W).
            prompts: Prompt of each sample.

        Returns:
            Rewards (B,) under VQ, MQ and TA.

        Raises:
            VideoAlignError: Where the latents are of another generator, or a prompt is too long.
        """
        network = self.network
        network.generator.check_latents(videos.shape)
        self._embed(prompts)
        rewards = []
        for start in range(0, len(videos), self.batch_size):
            x = videos[start : start + self.batch_size].to(self._device, torch.float32)
            encoded = [self._embedded[prompt] for prompt in prompts[start : start + self.batch_size]]
            with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
                condition = network.generator.condition(encoded, self._device)
                rewards.append(network(x, x.new_zeros(len(x)), condition).cpu())
        found = torch.cat(rewards)
        return dict(zip(DIMENSIONS, (found if self.raw else network.normalise(found)).unbind(1)))

    def place(self, device: torch.device | None) -> None:
        """Move the network.

        Args:
            device: Device that the run computes on; None moves it to the main memory.
        """
        self._device = device or torch.device("cpu")
        if "network" in vars(self):
            self.network.to(self._device)

    def _embed(self, prompts: Sequence[str]) -> None:
        """Embed prompts that are new; the embeddings stay in the main memory."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._embedded]
        if not new:
            return
        generator = self.network.generator
        encoders = [getattr(generator, n) for n in ("text_encoder", *generator.further_parts.get("text_encoder", ()))]
        try:
            for encoder in encoders:
                encoder.to(self._device)
            for start in range(0, len(new), self.batch_size):
                some = new[start : start + self.batch_size]
                for prompt, encoded in zip(some, generator.encode_prompts(some)):
                    self._embedded[prompt] = {name: part.cpu() for name, part in encoded.items()}
        finally:
            for encoder in encoders:
                encoder.cpu()
