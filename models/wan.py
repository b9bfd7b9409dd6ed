"""Wan 2.1 and 2.2 from prompts, and Wan2.2-TI2V-5B from images too (Wan et al., 2025); others in :mod:`.wan_image`.

Wan2.2-TI2V-5B takes an image as the first latent frame, whose tokens have time 0. Wan2.2-T2V-A14B has two experts.
"""

import torch
from diffusers.pipelines.wan.pipeline_wan import WanPipeline, prompt_clean
from torch import Tensor, nn

from .family import Condition, Encoded
from .generator import Generator


class Wan(Generator):
    """Adapter for diffusers' :class:`~diffusers.WanPipeline`. Embeddings after a prompt's end are zero, not masked."""

    class_name = "WanPipeline"
    blocks = "blocks"
    max_tokens = 512

    @property
    def begins_with_image(self) -> bool:
        """Whether this is Wan2.2-TI2V-5B, whose transformer takes a time for each token."""
        return bool(self.pipeline.config.get("expand_timesteps"))

    @property
    def plain_pipeline(self) -> bool:
        return self.boundary is None

    @property
    def image(self) -> str:
        return "optional" if self.begins_with_image else "none"

    @property
    def side(self) -> int:
        return self.ratios[1] * self.config.patch_size[1]

    @property
    def ratios(self) -> tuple[int, int]:
        vae = self.structure["vae"].config
        return vae.scale_factor_temporal, vae.scale_factor_spatial

    @property
    def text_width(self) -> int:
        return self.config.text_dim

    def official_shift(self) -> float | None:
        """Wan 2.2's own shift: 5, and 12 for T2V-A14B. Converted repositories have 3, which gives worse videos."""
        if self.boundary:
            return 12.0 if self.image == "none" else 5.0
        return 5.0 if self.begins_with_image else None

    @staticmethod
    def cleaned(prompt: str) -> str:
        """A prompt without HTML entities and repeated white space."""
        return prompt_clean(prompt)

    def _embed(self, prompts: list[str], lengths: list[int]) -> list[Encoded]:
        # WanPipeline's function for both pipelines: WanImageToVideoPipeline's own fails without ftfy
        encode, device = WanPipeline._get_t5_prompt_embeds, self.text_encoder.device
        found = encode(self.pipeline, prompts, max_sequence_length=self.max_tokens, device=device)
        return [{"prompt": embeds[:n]} for embeds, n in zip(found, lengths)]

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation from the autoencoder's configuration, (1, C, 1, 1, 1) each."""
        both = torch.tensor([self.vae.config.latents_mean, self.vae.config.latents_std], device=self.vae.device)
        return tuple(both.view(2, 1, -1, 1, 1, 1))

    def normalised(self, latents: Tensor) -> Tensor:
        mean, std = self.moments()
        return (latents - mean) * (1 / std)

    def _inputs(self, x: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """What the transformer takes as latents and as time: (B,), or (B, L) where the image's tokens have time 0."""
        clean = self.clean_frames(condition)  # x has the image already
        return x, self.token_times(t, x, clean, self.config.patch_size[1]) if clean else self.timesteps(t)

    def velocity(self, x: Tensor, t: Tensor, condition: Condition, transformer: nn.Module | None = None) -> Tensor:
        net = transformer or self.transformer
        (x, time), kind, image = self._inputs(x, t, condition), net.dtype, condition.get("image_embeds")
        image = None if image is None else image.to(kind)
        return net(x.to(kind), time, condition["prompt"].to(kind), image, return_dict=False)[0].float()
