"""LTX-Video (text to video): 128-channel latents, 8 frames and 32 x 32 pixels each, packed as tokens."""

from pathlib import Path

from diffusers import LTXPipeline
from torch import Tensor, nn

from .. import VideoAlignError
from .generator import Condition, Generator


class LTX(Generator):
    """diffusers' :class:`~diffusers.LTXPipeline`. A mask hides what stands behind a prompt's end."""

    class_name = "LTXPipeline"
    blocks = "transformer_blocks"
    max_tokens = 128
    side = 32

    @staticmethod
    def pipeline_class() -> type:
        """Of diffusers."""
        return LTXPipeline

    @staticmethod
    def check(index: dict, path: str | Path) -> None:
        """Nothing is refused by its index."""

    def __init__(self, pipeline: LTXPipeline, fps: float = 25.0) -> None:
        super().__init__(pipeline, fps)
        if self.transformer and (self.transformer.config.patch_size, self.transformer.config.patch_size_t) != (1, 1):
            raise VideoAlignError("this LTX transformer packs several latents in a token, which no released one does")

    @property
    def ratios(self) -> tuple[int, int]:
        """Frames and pixels per latent."""
        return self.pipeline.vae_temporal_compression_ratio, self.pipeline.vae_spatial_compression_ratio

    @property
    def text_width(self) -> int:
        """E."""
        return self.transformer.config.caption_channels

    def moments(self) -> tuple[Tensor, Tensor]:
        """Buffers of the autoencoder, and its scale."""
        shape = (1, -1, 1, 1, 1)
        return self.vae.latents_mean.float().view(shape), self.vae.latents_std.float().view(
            shape
        ) / self.vae.config.scaling_factor

    @staticmethod
    def packed(latents: Tensor) -> Tensor:
        """(B, C, F, H, W) -> (B, F*H*W, C)."""
        return latents.flatten(2).transpose(1, 2)

    @staticmethod
    def unpacked(latents: Tensor, call: dict) -> Tensor:
        """(B, F*H*W, C) -> (B, C, F, H, W)."""
        return latents.transpose(1, 2).unflatten(2, (call["num_frames"], call["height"], call["width"]))

    @staticmethod
    def encoded(found: tuple) -> Condition:
        """Embeddings and their mask."""
        return {"embeds": found[0], "mask": found[1].long()}

    def _decode(self, latents: Tensor) -> Tensor:
        if self.vae.config.timestep_conditioning:  # without noise, as of a clean latent
            return self.vae.decode(latents, latents.new_zeros(len(latents)), return_dict=False)[0]
        return super()._decode(latents)

    def velocity(self, x: Tensor, t: Tensor, condition: Condition, transformer: nn.Module | None = None) -> Tensor:
        """See :class:`Generator`."""
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
        empty = (
            {"negative_prompt_embeds": null["embeds"], "negative_prompt_attention_mask": null["mask"]} if null else {}
        )
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
