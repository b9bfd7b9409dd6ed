"""Text-to-video generators: diffusers pipelines with the latents, times and velocities of this package.

A family (:mod:`.wan`, :mod:`.ltx`) defines how latents are normalised and how its transformer is called; this module
has the rest. Latents are (B, C, F, H, W), normalised; times are in [0, 1], 1 is noise; velocities are noise minus data.
diffusers' flow transformers predict that velocity and take 1000 t.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, Literal

import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .. import VideoAlignError
from .fingerprint import fingerprint
from .finite import by_name, require_finite

Condition = dict[str, Tensor]
"""Prompts as the transformer takes them: ``embeds`` (B, L, E), zero after each prompt's end, and ``mask`` (B, L), 1 at
tokens and 0 after them."""
PARTS = ("transformer", "vae", "text_encoder")
"""Parts of a pipeline that can be loaded or left out."""
START = "start"
"""Name in peft of the frozen copy of the adapters that training went on from."""


class Generator(nn.Module):
    """A text-to-video generator around a diffusers pipeline; subclasses adapt one family of pipelines each.

    Args:
        pipeline: Pipeline of diffusers. Parts that are not needed may be None.
        fps: Frame rate of its videos, in frames per second. Only families whose positions depend on it (LTX) use it.

    Attributes:
        transformer: The pipeline's transformer, or None.
        vae: The pipeline's autoencoder, or None.
        text_encoder: The pipeline's text encoder, or None.
    """

    class_name: ClassVar[str]
    """Name of the pipeline's class in diffusers."""
    blocks: ClassVar[str]
    """Name of the transformer's attribute that holds its blocks."""
    max_tokens: int
    """Length of the longest prompt, in tokens: the family's value in training, or the tokenizer's if it is smaller."""
    side: ClassVar[int]
    """Number of pixels that height and width of videos are multiples of."""
    expert: Literal["high", "low"] | None = None
    """Which of two experts :attr:`transformer` is; None where there is one transformer."""
    other: nn.Module | None = None
    """The other expert, where it was loaded."""

    def __init__(self, pipeline: DiffusionPipeline, fps: float = 25.0) -> None:
        super().__init__()
        self.pipeline, self.fps = pipeline, fps
        pipeline.set_progress_bar_config(disable=True)
        if pipeline.tokenizer is not None:
            self.max_tokens = min(type(self).max_tokens, pipeline.tokenizer.model_max_length)
        self.transformer = pipeline.transformer
        self.vae, self.text_encoder = pipeline.vae, pipeline.text_encoder
        self.requires_grad_(False)

    # --- what a family defines --------------------------------------------------------------------------------

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the autoencoder's latents, broadcasting over (B, C, F, H, W)."""
        raise NotImplementedError

    def velocity(self, x: Tensor, t: Tensor, condition: Condition, transformer: nn.Module | None = None) -> Tensor:
        """Velocity (B, C, F, H, W) of the transformer, in fp32.

        Args:
            x: Noisy latents (B, C, F, H, W).
            t: Times (B,) in [0, 1].
            condition: Prompts of the batch.
            transformer: Transformer to call instead of the pipeline's own.
        """
        raise NotImplementedError

    def _denoise(self, condition: Condition, null: Condition | None, noise: Tensor, **options: object) -> Tensor:
        """Latents (B, C, F, H, W) that the pipeline samples from noise of that shape."""
        raise NotImplementedError

    @staticmethod
    def cleaned(prompt: str) -> str:
        """A prompt after the cleaning that the pipeline does before tokenising."""
        return prompt

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
        return {"embeds": found[0], "mask": torch.ones(found[0].shape[:2], dtype=torch.long, device=found[0].device)}

    def _decode(self, latents: Tensor) -> Tensor:
        """Frames (B, 3, T, H, W) in [-1, 1] that the autoencoder decodes from latents in its own scale."""
        return self.vae.decode(latents, return_dict=False)[0]

    # --- shapes -----------------------------------------------------------------------------------------------

    @property
    def ratios(self) -> tuple[int, int]:
        """Compression of the autoencoder: frames per latent in time, and pixels per latent along each side."""
        raise NotImplementedError

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
        if height % self.side or width % self.side or min(height, width) < self.side:
            raise VideoAlignError(
                f"videos of {height} x {width} pixels: height and width must be multiples of {self.side}"
            )
        return self.transformer.config.in_channels, (frames - 1) // time + 1, height // space, width // space

    # --- autoencoder and text encoder -------------------------------------------------------------------------

    def require(self, part: str) -> nn.Module:
        """Give a part of the pipeline that must have been loaded.

        Args:
            part: One of :data:`PARTS`.

        Raises:
            VideoAlignError: Where the generator was loaded without it.
        """
        module = getattr(self, part)
        if module is None:
            raise VideoAlignError(
                f"this generator was loaded without its {part}, which is needed here; name it under parts"
            )
        return module

    @torch.no_grad()
    def encode_video(self, video: Tensor) -> Tensor:
        """Encode videos to the mode of the autoencoder's posterior.

        Args:
            video: Frames (B, T, 3, H, W), uint8.

        Returns:
            Normalised latents (B, C, F, H, W), fp32.

        Raises:
            VideoAlignError: Where the autoencoder cannot take videos of this size.
        """
        vae = self.require("vae")
        self.latent_shape(video.shape[1], *video.shape[-2:])
        pixels = video.transpose(1, 2).to(vae.device, vae.dtype) / 127.5 - 1  # (B, 3, T, H, W)
        mean, std = self.moments()
        return (vae.encode(pixels).latent_dist.mode().float() - mean) / std

    @torch.no_grad()
    def decode(self, latents: Tensor, names: Sequence[str] | None = None) -> Tensor:
        """Decode latents to frames (B, T, 3, H, W), uint8.

        Args:
            latents: Normalised latents (B, C, F, H, W).
            names: Names of the videos, for messages; their numbers if not given.

        Raises:
            VideoAlignError: Where latents or decoded frames are not finite: as uint8 they would be black.
        """
        vae = self.require("vae")
        names = names or [f"video {number}" for number in range(len(latents))]
        remedy = "look at the weights of the generator and its adapters, and at the strength of guidance"
        require_finite("the latents of sampled videos", by_name(names, latents), remedy)
        mean, std = self.moments()
        pixels = self._decode((latents.float() * std + mean).to(vae.device, vae.dtype))
        require_finite(
            "the frames decoded from finite latents", by_name(names, pixels), "look at the autoencoder's weights"
        )
        return ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).transpose(1, 2)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], truncate: bool = False) -> list[Tensor]:
        """Embeddings (L, E) of each prompt, without padding, in the text encoder's dtype.

        Args:
            prompts: Texts of the prompts.
            truncate: Whether prompts that are too long are cut; otherwise they are refused.

        Raises:
            VideoAlignError: Where a prompt is too long, or an embedding is not finite.
        """
        encoder, tokenizer = self.require("text_encoder"), self.pipeline.tokenizer
        lengths = [len(ids) for ids in tokenizer([self.cleaned(p) for p in prompts]).input_ids]
        if not truncate and (long := [(p, n) for p, n in zip(prompts, lengths) if n > self.max_tokens]):
            raise VideoAlignError(
                f"prompt {long[0][0][:60]!r}... has {long[0][1]} tokens, but this generator was trained with at most "
                f"{self.max_tokens}; shorten it, or set truncate: true"
            )
        found = self.pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=self.max_tokens, device=encoder.device
        )[0]
        embedded = [embeds[: min(n, self.max_tokens)] for embeds, n in zip(found, lengths)]
        require_finite(
            "the embeddings of prompts",
            by_name([p[:60] for p in prompts], embedded),
            "run the text encoder in float32 (dtype)",
        )
        return embedded

    def condition(self, embeds: Sequence[Tensor]) -> Condition:
        """Put embeddings of prompts into one batch, padded with zeros to :attr:`max_tokens` as the family pads them.

        Args:
            embeds: Embeddings (L, E), one tensor per prompt.

        Raises:
            VideoAlignError: Where an embedding is longer or of another width than this generator takes.
        """
        width = self.text_width
        if wrong := [tuple(e.shape) for e in embeds if e.ndim != 2 or e.shape[1] != width or len(e) > self.max_tokens]:
            raise VideoAlignError(
                f"prompt embeddings of shape {wrong[0]}, but this generator takes at most {self.max_tokens} x {width}: "
                "they were made with another text encoder"
            )
        padded = torch.zeros(len(embeds), self.max_tokens, width, dtype=embeds[0].dtype, device=embeds[0].device)
        mask = torch.zeros(len(embeds), self.max_tokens, dtype=torch.long, device=embeds[0].device)
        for row, keep, e in zip(padded, mask, embeds):
            row[: len(e)], keep[: len(e)] = e, 1
        return {"embeds": padded, "mask": mask}

    @property
    def text_width(self) -> int:
        """Width E of the prompt embeddings."""
        raise NotImplementedError

    # --- sampling ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        condition: Condition,
        noise: Tensor,
        steps: int,
        cfg_scale: float = 1.0,
        null: Condition | None = None,
        transformer: nn.Module | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> Tensor:
        """Sample normalised latents (B, C, F, H, W) through the pipeline and its own scheduler.

        Args:
            condition: Prompts of the batch.
            noise: Noise (B, C, F, H, W) to start from.
            steps: Number of scheduler steps.
            cfg_scale: Classifier-free guidance scale; 1 turns it off.
            null: Condition of the empty prompt, with a batch size of 1; needed where ``cfg_scale`` is above 1.
            transformer: Transformer to sample from instead of the pipeline's own.
            on_step: Called after each scheduler step.

        Raises:
            VideoAlignError: Where ``cfg_scale`` is above 1 without ``null``.
        """
        if cfg_scale > 1 and null is None:
            raise VideoAlignError(f"cfg_scale {cfg_scale} needs the embedding of the empty prompt")
        if null is not None:
            null = {name: tensor.expand(len(noise), *tensor.shape[1:]) for name, tensor in null.items()}
        options: dict[str, object] = {"num_inference_steps": steps, "guidance_scale": cfg_scale}
        if on_step:
            options["callback_on_step_end"] = lambda *_: on_step() or {}  # diffusers wants a dictionary
        self.pipeline.transformer = transformer or self.transformer
        try:
            return self._denoise(condition, null, noise.float(), **options).float()
        finally:
            self.pipeline.transformer = self.transformer

    def identity(self) -> dict[str, str]:
        """The family and a digest of the autoencoder. Latents work only with generators of the same identity."""
        vae = fingerprint(self.require("vae"))
        moments = torch.cat([part.flatten() for part in self.moments()]).float().cpu().numpy().tobytes()
        kind = type(self)
        # of two packages' families with one name, each has latents of its own
        own = kind.__module__.partition(".")[0] == __name__.partition(".")[0]
        family = kind.__name__ if own else f"{kind.__module__}.{kind.__qualname__}"
        return {"family": family, "vae": hashlib.sha256(vae.encode() + moments).hexdigest()}

    @contextlib.contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Turn the transformer into the reference during a block, by leaving its LoRA adapters out.

        Where training went on from adapters, their frozen copy :data:`START` takes the adapters' place. Only flags of
        the layers change, and no parameter's ``requires_grad``, so that sharded modules and checkpointed activations of
        an earlier pass stay valid. The block must end before the policy's backward pass.
        """
        layers = [m for m in self.transformer.modules() if isinstance(m, BaseTunerLayer)]
        before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
        for layer in layers:
            if START in layer.lora_A:
                layer._active_adapter = [START]
            else:
                layer._disable_adapters = True
        try:
            yield
        finally:
            for layer, (off, active) in zip(layers, before):
                layer._disable_adapters, layer._active_adapter = off, active
