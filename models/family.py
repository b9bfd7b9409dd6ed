"""What a family of generators defines: how latents are normalised, how the transformer is called, which sizes it takes.

Latents are (B, C, F, H, W), normalised; times are in [0, 1], 1 is noise; velocities are noise minus data. diffusers'
flow transformers predict that velocity and take 1000 t. :mod:`.generator` has all that families share.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import diffusers
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from PIL.Image import Image
from torch import Tensor, nn

from .. import VideoAlignError
from .flow import TIMES

Encoded = dict[str, Tensor]
"""What one sample is conditioned on, without padding: ``prompt`` (L, E) and, in some families, further parts whose
names begin with ``prompt_``; for image-to-video ``image`` (C, F', H, W), latents, and maybe ``image_embeds`` (L, E)."""
Condition = dict[str, Tensor]
"""A batch of :data:`Encoded` as the transformer takes it: ``prompt`` (B, L, E), zero after each prompt's end, and
``prompt_mask`` (B, L), 1 at tokens and 0 after them, the same for each further part; ``image`` (B, C, F', H, W) and
``image_embeds`` (B, L, E) as they are."""
PROMPTS_AT_ONCE = 16
"""Prompts that are embedded at once: attention between the 512 tokens of each takes memory for all of them."""


class Step(NamedTuple):
    """A step of sampling.

    Attributes:
        x: Noisy latents (B, C, F, H, W).
        t: Times (B,) in [0, 1].
        sigma: The time as the scheduler has it, which its time steps round.
        condition: Prompts, and images, of the batch.
        null: The same with the empty prompt; None without classifier-free guidance.
        scale: Scale of classifier-free guidance.
        net: Transformer to call.
    """

    x: Tensor
    t: Tensor
    sigma: Tensor
    condition: Condition
    null: Condition | None
    scale: float
    net: nn.Module


class Family(nn.Module):
    """The part of a generator that families override; what has a body here need not be.

    Attributes:
        pipeline: Pipeline of diffusers.
        fps: Frame rate of the videos, in frames per second.
        structure: Transformer and autoencoder by name, on the meta device where they were not loaded; they know their
            settings.
        vae: The pipeline's autoencoder, or None.
    """

    pipeline: DiffusionPipeline
    fps: float
    structure: dict[str, nn.Module]
    class_name: ClassVar[str]
    """Name of the pipeline's class in diffusers."""
    blocks: ClassVar[str]
    """Name of the transformer's attribute that holds its blocks."""
    max_tokens: int
    """Length of the longest prompt, in tokens: the family's value in training, or the tokenizer's if it is smaller."""
    side: int
    """Number of pixels that height and width of videos are multiples of."""
    image: Literal["none", "optional", "required"] = "none"
    """Whether samples have an image that the video begins with."""
    begins_with_image: bool = False
    """Whether the image is the first latent frame itself, which is then neither noised nor learned; otherwise the image
    is a further input of the transformer."""
    embeds_images: bool = False
    """Whether the transformer takes embeddings of images by an encoder of images, beside their latents."""
    reads_fps: bool = False
    """Whether the positions of latent frames depend on the frame rate of the videos."""
    further_parts: ClassVar[Mapping[str, Sequence[str]]] = {}
    """Further parts of the pipeline that are loaded with one of :data:`PARTS`, such as the encoder of images with the
    text encoder."""
    left_out: ClassVar[Sequence[str]] = ()
    """Parts of the pipeline that are never loaded."""
    plain_pipeline: bool = True
    """Whether :func:`.guidance.guided` can steer the pipeline itself: its scheduler gets the latents as :meth:`packed`
    gives them, and its ``encode_prompt`` what :meth:`encoded` takes."""
    behind: ClassVar[Sequence[str]] = ("norm_out", "proj_out", "scale_shift_table")
    """Beginnings of the names of the transformer's parameters behind its blocks, which a noisy reward leaves out."""

    # --- what a family defines --------------------------------------------------------------------------------

    @classmethod
    def pipeline_class(cls) -> type[DiffusionPipeline]:
        """The pipeline's class in diffusers."""
        return getattr(diffusers, cls.class_name)

    @staticmethod
    def check(index: dict, path: object) -> None:
        """Refuse pipelines of this class that work in another way.

        Args:
            index: Content of the pipeline's ``model_index.json``.
            path: Folder or hub id, for messages.

        Raises:
            VideoAlignError: Where the family cannot take the pipeline.
        """

    @property
    def ratios(self) -> tuple[int, int]:
        """Compression of the autoencoder: frames per latent in time, and pixels per latent along each side."""
        raise NotImplementedError

    @property
    def text_width(self) -> int:
        """Width E of the prompt embeddings."""
        raise NotImplementedError

    def prompt_shapes(self) -> dict[str, tuple[int, int]]:
        """Largest length and width (L, E) of each part of an encoded prompt, by name."""
        return {"prompt": (self.max_tokens, self.text_width)}

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the autoencoder's latents, broadcasting over (B, C, F, H, W)."""
        raise NotImplementedError

    def normalised(self, latents: Tensor) -> Tensor:
        """Latents of the autoencoder's own scale (B, C, F, H, W), normalised as the pipeline rounds them."""
        mean, std = self.moments()
        return (latents - mean) / std

    def velocity(self, x: Tensor, t: Tensor, condition: Condition, transformer: nn.Module | None = None) -> Tensor:
        """Velocity (B, C, F, H, W) of the transformer, in fp32.

        Args:
            x: Noisy latents (B, C, F, H, W); where :attr:`begins_with_image`, with the image as first frame.
            t: Times (B,) in [0, 1].
            condition: Prompts, and images, of the batch.
            transformer: Transformer to call instead of the generator's own.
        """
        raise NotImplementedError

    def _step_velocity(self, step: Step) -> Tensor:
        """Velocity (B, C, F, H, W) of a sampling step, computed as the pipeline does."""
        v = self.velocity(step.x, step.t, step.condition, step.net)
        if step.null is not None:
            empty = self.velocity(step.x, step.t, step.null, step.net)
            v = empty + step.scale * (v - empty)
        return v

    def official_shift(self) -> float | None:
        """Shift of the sampling schedule that the authors use, where the scheduler's own differs; else None."""
        return None

    def schedule(self, scheduler: SchedulerMixin, steps: int, x: Tensor) -> None:
        """Set a scheduler's time steps, as the pipeline does.

        Args:
            scheduler: The pipeline's scheduler, or one like it with another shift.
            steps: Number of steps.
            x: Latents (B, C, F, H, W), on which the steps of some families depend.
        """
        scheduler.set_timesteps(steps, device=x.device)

    def adaptable(self, layer: str, blocks: int | None = None) -> bool:
        """Whether a layer of the transformer takes part in the velocity, so that it, or an adapter of it, can train.

        Args:
            layer: Name of the layer, or of a parameter.
            blocks: Number of the transformer's blocks, where there are fewer than in the generator's own.
        """
        return True

    def truncated(self, blocks: int) -> dict[str, Any]:
        """Settings of a transformer that has only the first blocks, which a noisy reward copies.

        Args:
            blocks: Number of blocks to keep.
        """
        return {**self.config, "num_layers": blocks}

    @staticmethod
    def cleaned(prompt: str) -> str:
        """A prompt after the cleaning that the pipeline does before tokenising."""
        return prompt

    def token_counts(self, prompts: list[str]) -> list[int]:
        """Number of tokens of each prompt, with those that the pipeline adds."""
        return [len(ids) for ids in self.pipeline.tokenizer([self.cleaned(p) for p in prompts]).input_ids]

    @staticmethod
    def timesteps(t: Tensor) -> Tensor:
        """Times in [0, 1] in diffusers' unit, fp32; the product is exact, so that the scheduler's own come back."""
        return (TIMES * t.double()).float()

    def token_times(self, t: Tensor, x: Tensor, clean: int, patch: int = 1) -> Tensor:
        """Times (B, L) of each token in diffusers' unit, fp32: 0 for those of the image's frames.

        Args:
            t: Times (B,) in [0, 1].
            x: Latents (B, C, F, H, W).
            clean: Number of first latent frames that are the image's.
            patch: Latents along each side of a token.
        """
        frames = (torch.arange(x.shape[2], device=x.device) >= clean).float()  # (F,)
        noised = frames.repeat_interleave((x.shape[3] // patch) * (x.shape[4] // patch))  # (L,)
        return self.timesteps(t)[:, None] * noised

    @staticmethod
    def packed(latents: Tensor) -> Tensor:
        """Latents (B, C, F, H, W) in the shape that the pipeline's scheduler works on."""
        return latents

    @staticmethod
    def unpacked(latents: Tensor, call: dict) -> Tensor:
        """The inverse of :meth:`packed`.

        Args:
            latents: Latents in the scheduler's shape.
            call: Keyword arguments of the transformer's last call, which state the size.
        """
        return latents

    @staticmethod
    def encoded(found: tuple) -> Condition:
        """The condition that corresponds to the output of the pipeline's ``encode_prompt``."""
        mask = torch.ones(found[0].shape[:2], dtype=torch.long, device=found[0].device)
        return {"prompt": found[0], "prompt_mask": mask}

    def _image_frames(self, first: Tensor, num_frames: int) -> Tensor:
        """Frames (B, 3, T, H, W) whose latents are the image's, from the image (B, 3, 1, H, W): the image itself."""
        return first

    def _embed_images(self, images: list[Image]) -> Tensor | None:
        """Embeddings (B, L, E) of images by an encoder of images, where the transformer takes them."""
        return None

    def _decode(self, latents: Tensor) -> Tensor:
        """Frames (B, 3, T, H, W) in [-1, 1] that the autoencoder decodes from latents in its own scale."""
        return self.vae.decode(latents, return_dict=False)[0]

    # --- shapes -----------------------------------------------------------------------------------------------

    @property
    def config(self) -> Any:
        """Settings of the transformer, which are known also where it is not loaded."""
        return self.structure["transformer"].config

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Shape (C, F, H, W) of a video's latents.

        Args:
            frames: Number of frames.
            height: Height of the video, in pixels.
            width: Width of the video, in pixels.

        Raises:
            VideoAlignError: Where the autoencoder or the transformer cannot take such a video.
        """
        time, space = self.ratios
        if frames < 1 or (frames - 1) % time:
            good = max(0, round((frames - 1) / time)) * time + 1
            raise VideoAlignError(
                f"num_frames is {frames}, but this autoencoder takes 1 more than a multiple of {time}, such as {good}"
            )
        near = [max(1, round(length / self.side)) * self.side for length in (height, width)]
        if near != [height, width]:
            raise VideoAlignError(
                f"videos of {height} x {width} pixels: height and width must be multiples of {self.side}, such as "
                f"{near[0]} x {near[1]}"
            )
        channels = self.config.out_channels or self.config.in_channels
        return channels, (frames - 1) // time + 1, height // space, width // space

    def check_latents(self, shape: Sequence[int]) -> None:
        """Refuse latents that the transformer cannot take.

        Args:
            shape: Shape (..., C, F, H, W) of the latents.

        Raises:
            VideoAlignError: Where the number of channels or a side is not one of this generator's.
        """
        (channels, _, *sides), space = shape[-4:], self.ratios[1]
        own = self.config.out_channels or self.config.in_channels
        if channels != own or any(length * space % self.side for length in sides):
            pixels = " x ".join(str(length * space) for length in sides)
            raise VideoAlignError(
                f"latents of {channels} channels and {pixels} pixels, but this generator takes {own} channels, and "
                f"sides that are multiples of {self.side}: encode the videos for this generator, at such a size"
            )
