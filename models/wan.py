"""Wan 2.1 (text to video): 16-channel latents, 4 frames and 8 x 8 pixels each."""

from pathlib import Path

import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor, nn

from .. import VideoAlignError
from .generator import Condition, Generator


class Wan(Generator):
    """diffusers' :class:`~diffusers.WanPipeline`. Text embeddings are zero behind the prompt's end; there is no mask."""

    class_name = "WanPipeline"
    blocks = "blocks"
    max_tokens = 512
    side = 16

    @staticmethod
    def pipeline_class() -> type:
        """Of diffusers."""
        return WanPipeline

    @staticmethod
    def check(index: dict, path: str | Path) -> None:
        """Refuse pipelines of the family that work otherwise."""
        if (index.get("transformer_2") or [None])[0] or index.get("expand_timesteps"):
            raise VideoAlignError(
                f"generator {path}: Wan 2.2 (two transformers, or a time for each token) is not supported; Wan 2.1 is"
            )

    @staticmethod
    def cleaned(prompt: str) -> str:
        """Without HTML and runs of white space."""
        return prompt_clean(prompt)

    @property
    def ratios(self) -> tuple[int, int]:
        """Frames and pixels per latent."""
        return self.pipeline.vae_scale_factor_temporal, self.pipeline.vae_scale_factor_spatial

    @property
    def text_width(self) -> int:
        """E."""
        return self.transformer.config.text_dim

    def moments(self) -> tuple[Tensor, Tensor]:
        """Of the autoencoder's configuration."""
        both = torch.tensor([self.vae.config.latents_mean, self.vae.config.latents_std], device=self.vae.device)
        return tuple(both.view(2, 1, -1, 1, 1, 1))

    def velocity(self, x: Tensor, t: Tensor, condition: Condition, transformer: nn.Module | None = None) -> Tensor:
        """See :class:`Generator`."""
        net = transformer or self.transformer
        kind = net.dtype
        return net(x.to(kind), 1000 * t, condition["embeds"].to(kind), return_dict=False)[0].float()

    def _denoise(self, condition: Condition, null: Condition | None, noise: Tensor, **options: object) -> Tensor:
        time, space = self.ratios
        _, _, frames, height, width = noise.shape
        return self.pipeline(
            prompt_embeds=condition["embeds"],
            negative_prompt_embeds=null and null["embeds"],
            latents=noise,
            output_type="latent",
            num_frames=(frames - 1) * time + 1,
            height=height * space,
            width=width * space,
            **options,
        ).frames
