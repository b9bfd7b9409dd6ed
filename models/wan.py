"""Wan 2.1 (text to video): 16-channel latents of 4 frames and 8 x 8 pixels each."""

from pathlib import Path

import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor, nn

from .. import VideoAlignError
from .generator import Condition, Generator


class Wan(Generator):
    """Adapter for diffusers' :class:`~diffusers.WanPipeline`.

    Embeddings after a prompt's end are zero, and the transformer takes no mask.
    """

    class_name = "WanPipeline"
    blocks = "blocks"
    max_tokens = 512
    side = 16

    @staticmethod
    def pipeline_class() -> type:
        """The pipeline's class in diffusers."""
        return WanPipeline

    @staticmethod
    def check(index: dict, path: str | Path) -> None:
        """Refuse Wan 2.2, whose pipelines work in another way.

        Args:
            index: Content of the pipeline's ``model_index.json``.
            path: Folder or hub id, for messages.

        Raises:
            VideoAlignError: Where the pipeline has two transformers, or a time for each token.
        """
        if (index.get("transformer_2") or [None])[0] or index.get("expand_timesteps"):
            raise VideoAlignError(
                f"generator {path}: Wan 2.2 (two transformers, or a time for each token) is not supported; Wan 2.1 is"
            )

    @staticmethod
    def cleaned(prompt: str) -> str:
        """A prompt without HTML entities and repeated white space."""
        return prompt_clean(prompt)

    @property
    def ratios(self) -> tuple[int, int]:
        return self.pipeline.vae_scale_factor_temporal, self.pipeline.vae_scale_factor_spatial

    @property
    def text_width(self) -> int:
        return self.transformer.config.text_dim

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation from the autoencoder's configuration, (1, C, 1, 1, 1) each."""
        both = torch.tensor([self.vae.config.latents_mean, self.vae.config.latents_std], device=self.vae.device)
        return tuple(both.view(2, 1, -1, 1, 1, 1))

    def velocity(self, x: Tensor, t: Tensor, condition: Condition, transformer: nn.Module | None = None) -> Tensor:
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
