"""LTX-Video (text to video): 128-channel latents of 8 frames and 32 x 32 pixels each, packed as tokens."""

from pathlib import Path

from diffusers import LTXPipeline
from torch import Tensor, nn

from .. import VideoAlignError
from .generator import Condition, Generator


class LTX(Generator):
    """Adapter for diffusers' :class:`~diffusers.LTXPipeline`. A mask hides the padding after a prompt's end."""

    class_name = "LTXPipeline"
    blocks = "transformer_blocks"
    max_tokens = 128
    side = 32

    @staticmethod
    def pipeline_class() -> type:
        """The pipeline's class in diffusers."""
        return LTXPipeline

    @staticmethod
    def check(index: dict, path: str | Path) -> None:
        """Check the pipeline's index; every LTX pipeline is accepted."""

    def __init__(self, pipeline: LTXPipeline, fps: float = 25.0) -> None:
        super().__init__(pipeline, fps)
        if self.transformer and (self.transformer.config.patch_size, self.transformer.config.patch_size_t) != (1, 1):
            raise VideoAlignError("this LTX transformer packs several latents in a token, which no released one does")

    @property
    def ratios(self) -> tuple[int, int]:
        return self.pipeline.vae_temporal_compression_ratio, self.pipeline.vae_spatial_compression_ratio

    @property
    def text_width(self) -> int:
        return self.transformer.config.caption_channels

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation from the autoencoder's buffers, (1, C, 1, 1, 1) each."""
        mean, std = (part.float().view(1, -1, 1, 1, 1) for part in (self.vae.latents_mean, self.vae.latents_std))
        return mean, std / self.vae.config.scaling_factor

    @staticmethod
    def packed(latents: Tensor) -> Tensor:
        """Pack latents (B, C, F, H, W) as tokens (B, F*H*W, C)."""
        return latents.flatten(2).transpose(1, 2)

    @staticmethod
    def unpacked(latents: Tensor, call: dict) -> Tensor:
        """Unpack tokens (B, F*H*W, C) to latents (B, C, F, H, W)."""
        return latents.transpose(1, 2).unflatten(2, (call["num_frames"], call["height"], call["width"]))

    @staticmethod
    def encoded(found: tuple) -> Condition:
        """Embeddings and mask from the output of the pipeline's ``encode_prompt``."""
        return {"embeds": found[0], "mask": found[1].long()}

    def _decode(self, latents: Tensor) -> Tensor:
        if self.vae.config.timestep_conditioning:  # time 0: the latents are clean
            return self.vae.decode(latents, latents.new_zeros(len(latents)), return_dict=False)[0]
        return super()._decode(latents)

    def velocity(self, x: Tensor, t: Tensor, condition: Condition, transformer: nn.Module | None = None) -> Tensor:
        net = transformer or self.transformer
        (time, space), kind = self.ratios, net.dtype
        _, _, frames, height, width = x.shape
        v = net(
            self.packed(x).to(kind),
            condition["embeds"].to(kind),
            1000 * t,
            condition["mask"],
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(time / self.fps, space, space),
            return_dict=False,
        )[0]  # (B, F*H*W, C)
        return v.float().transpose(1, 2).unflatten(2, (frames, height, width))

    def _denoise(self, condition: Condition, null: Condition | None, noise: Tensor, **options: object) -> Tensor:
        time, space = self.ratios
        _, _, frames, height, width = noise.shape
        empty = {}
        if null:
            empty = {"negative_prompt_embeds": null["embeds"], "negative_prompt_attention_mask": null["mask"]}
        packed = self.pipeline(
            prompt_embeds=condition["embeds"],
            prompt_attention_mask=condition["mask"],
            latents=self.packed(noise),
            output_type="latent",
            num_frames=(frames - 1) * time + 1,
            height=height * space,
            width=width * space,
            frame_rate=self.fps,
            **empty,
            **options,
        ).frames  # (B, F*H*W, C)
        return packed.transpose(1, 2).unflatten(2, (frames, height, width))
