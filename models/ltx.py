"""LTX-Video: 128-channel latents of 8 frames and 32 x 32 pixels each, packed as tokens (HaCohen et al., 2024)."""

import numpy as np
from diffusers import SchedulerMixin
from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift
from torch import Tensor, cat, nn

from .. import VideoAlignError
from .family import Condition, Step
from .generator import Generator


class LTX(Generator):
    """Adapter for diffusers' :class:`~diffusers.LTXPipeline`. A mask hides the padding after a prompt's end."""

    class_name = "LTXPipeline"
    blocks = "transformer_blocks"
    max_tokens = 128
    side = 32
    reads_fps = True
    shifts = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    """Smallest and largest number of tokens, and the schedule's shift there, where the scheduler states none."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)
        if (self.config.patch_size, self.config.patch_size_t) != (1, 1):
            raise VideoAlignError("this LTX transformer packs several latents in a token, which no released one does")

    @property
    def ratios(self) -> tuple[int, int]:
        vae = self.structure["vae"]
        return vae.temporal_compression_ratio, vae.spatial_compression_ratio

    @property
    def text_width(self) -> int:
        return self.config.caption_channels

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation from the autoencoder's buffers, (1, C, 1, 1, 1) each."""
        buffers = self.vae.latents_mean, self.vae.latents_std  # of the root, which an offloaded autoencoder never moves
        mean, std = (part.to(self.vae.device).float().view(1, -1, 1, 1, 1) for part in buffers)
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
        return {"prompt": found[0], "prompt_mask": found[1].long()}

    def _decode(self, latents: Tensor) -> Tensor:
        if self.vae.config.timestep_conditioning:  # time 0: the latents are clean
            return self.vae.decode(latents, latents.new_zeros(len(latents)), return_dict=False)[0]
        return super()._decode(latents)

    def schedule(self, scheduler: SchedulerMixin, steps: int, x: Tensor) -> None:
        """Set time steps whose shift grows with the number of tokens, where the scheduler is so configured."""
        tokens = x[0, 0].numel()
        stated = [scheduler.config.get(name, value) for name, value in self.shifts.items()]
        sigmas = np.linspace(1.0, 1 / steps, steps)
        scheduler.set_timesteps(sigmas=sigmas, mu=calculate_shift(tokens, *stated), device=x.device)

    def velocity(self, x: Tensor, t: Tensor, condition: Condition, transformer: nn.Module | None = None) -> Tensor:
        net, clean = transformer or self.transformer, self.clean_frames(condition)
        (time, space), kind = self.ratios, net.dtype
        _, _, frames, height, width = x.shape
        v = net(
            self.packed(x).to(kind),
            condition["prompt"].to(kind),
            self.token_times(t, x, clean) if clean else self.timesteps(t),
            condition["prompt_mask"],
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(time / self.fps, space, space),
            return_dict=False,
        )[0]  # (B, F*H*W, C)
        return v.float().transpose(1, 2).unflatten(2, (frames, height, width))

    def _step_velocity(self, step: Step) -> Tensor:
        if step.null is None:
            return super()._step_velocity(step)
        both = {name: cat([step.null[name], step.condition[name]]) for name in step.condition}  # one batch, as there
        empty, v = self.velocity(cat([step.x] * 2), cat([step.t] * 2), both, step.net).chunk(2)
        return empty + step.scale * (v - empty)


class LTXImage(LTX):
    """Adapter for :class:`~diffusers.LTXImageToVideoPipeline`: the image is the first latent frame, at time 0."""

    class_name = "LTXImageToVideoPipeline"
    image, plain_pipeline = "required", False
    begins_with_image = True
