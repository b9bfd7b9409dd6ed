"""Video generators: diffusers pipelines that encode, decode and sample in the terms of this package.

A family (:mod:`.wan`, :mod:`.ltx`, ...) defines what :mod:`.family` asks; this module has the rest. A sample is
*conditioned* on a prompt and, in image-to-video, on the image that the video begins with.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from .. import VideoAlignError
from .conditions import padded
from .family import PROMPTS_AT_ONCE, Condition, Encoded, Family, Step
from .fingerprint import fingerprint
from .finite import by_name, require_finite
from .flow import TIMES
from .norms import keep_dtype_in_norms
from .shifted_schedule import shifted

Steer = Callable[[Tensor, float, Tensor, nn.Module, int], Tensor]
"""Changes the velocity of a sampling step: from latents (B, C, F, H, W), time, velocity (B, C, F, H, W), the
transformer that gave it, and the number of the step."""
PARTS = ("transformer", "vae", "text_encoder")
"""Parts of a pipeline that can be loaded or left out."""
START = "start"
"""Name in peft of the frozen copy of the adapters that training went on from."""
EXPERTS = ("high", "low")
"""Experts of a generator with two transformers: the one for times above its boundary, and the one below."""


class Generator(Family):
    """A video generator around a diffusers pipeline; subclasses adapt one family of pipelines each.

    Args:
        pipeline: Pipeline of diffusers. Parts that are not needed may be None.
        fps: Frame rate of its videos, in frames per second. Only families whose positions depend on it (LTX) use it.
        skeletons: The pipeline's transformer and autoencoder without weights (on the meta device), by name, where they
            were not loaded: their settings are needed in any case.
        expert: Which of two experts trains: ``high`` or ``low``.

    Attributes:
        transformer: The transformer that trains, or that samples; of two experts the one that trains, or ``high``.
        other: The other expert, which sampling needs too; None where there is none, or it was not loaded.
        expert: Which expert :attr:`transformer` is; None where there is one transformer.
        vae: The pipeline's autoencoder, or None.
        text_encoder: The pipeline's text encoder, or None.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        fps: float = 25.0,
        skeletons: Mapping[str, nn.Module] | None = None,
        expert: str | None = None,
    ) -> None:
        super().__init__()
        self.pipeline, self.fps = pipeline, fps
        pipeline.set_progress_bar_config(disable=True)
        experts = {"high": pipeline.transformer, "low": getattr(pipeline, "transformer_2", None)}
        self.boundary: float | None = pipeline.config.get("boundary_ratio")
        self.expert = (expert or "high") if self.boundary else None
        self.transformer = experts.pop(self.expert or "high")
        (self.other,) = experts.values()
        self.vae, self.text_encoder = pipeline.vae, pipeline.text_encoder
        for name in (more for further in self.further_parts.values() for more in further):
            self.register_module(name, getattr(pipeline, name))  # so that they go to the device with the rest
        kept = {"transformer": self.transformer or self.other, "vae": self.vae}
        # a dictionary, so that skeletons are no submodules
        self.structure = {**(skeletons or {}), **{name: part for name, part in kept.items() if part is not None}}
        if pipeline.tokenizer is not None:
            self.max_tokens = min(type(self).max_tokens, pipeline.tokenizer.model_max_length)
        if (shift := self.official_shift()) is not None:
            pipeline.scheduler = shifted(pipeline.scheduler, shift)
        for network in filter(None, (self.transformer, self.other)):
            keep_dtype_in_norms(network)
        self.requires_grad_(False)

    def drop_transformer(self) -> None:
        """Free the transformer; its settings stay known."""
        for name in ("transformer", "other"):
            setattr(self, name, None)
        whole = self.structure["transformer"]
        with torch.device("meta"):
            self.structure["transformer"] = type(whole).from_config(whole.config)
        held = [part for part in ("transformer", "transformer_2") if part in vars(self.pipeline)]
        self.pipeline.register_modules(**dict.fromkeys(held))

    # --- autoencoder and encoders -----------------------------------------------------------------------------

    def require(self, part: str) -> nn.Module:
        """Give a part of the pipeline that must have been loaded.

        Args:
            part: One of :data:`PARTS` or :attr:`further_parts`.

        Raises:
            VideoAlignError: Where the generator was loaded without it.
        """
        module = getattr(self, part)
        if module is None:
            loaded_with = next((name for name, more in self.further_parts.items() if part in more), None)
            named = f"{loaded_with}, with which it comes," if loaded_with else "it"
            raise VideoAlignError(
                f"this generator was loaded without its {part}, which is needed here; name {named} under parts"
            )
        return module

    def pixels(self, video: Tensor) -> Tensor:
        """Frames (B, T, 3, H, W), uint8, as the autoencoder takes them: (B, 3, T, H, W) in [-1, 1].

        Raises:
            VideoAlignError: Where the autoencoder cannot take videos of this size.
        """
        vae = self.require("vae")
        self.latent_shape(video.shape[1], *video.shape[-2:])
        return 2 * (video.transpose(1, 2).to(vae.device, vae.dtype) / 255) - 1

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Normalised latents (B, C, F, H, W), fp32, of frames (B, 3, T, H, W) in [-1, 1]: the posterior's mode."""
        return self.normalised(self.vae.encode(pixels).latent_dist.mode().float())

    def encode_video(self, video: Tensor) -> Tensor:
        """Encode videos to the mode of the autoencoder's posterior.

        Args:
            video: Frames (B, T, 3, H, W), uint8.

        Returns:
            Normalised latents (B, C, F, H, W), fp32.

        Raises:
            VideoAlignError: Where the autoencoder cannot take videos of this size.
        """
        return self.encode_pixels(self.pixels(video))

    def encode_images(self, images: Tensor, num_frames: int) -> list[Encoded]:
        """Encode the images that videos begin with.

        Args:
            images: Images (B, 3, H, W) of the videos' size, uint8.
            num_frames: Number of frames of the videos.

        Returns:
            ``image`` of each sample, and what else the family takes of it; on the autoencoder's device.

        Raises:
            VideoAlignError: Where this generator takes no images, or none of this size.
        """
        if self.image == "none":
            raise VideoAlignError(f"a {self.class_name} takes no images: it makes videos from prompts alone")
        frames = self._image_frames(self.pixels(images[:, None]), num_frames)
        encoded = [{"image": one} for one in self.encode_pixels(frames)]
        with torch.no_grad():
            embeds = self._embed_images([to_pil_image(one.cpu()) for one in images])
        return encoded if embeds is None else [one | {"image_embeds": e} for one, e in zip(encoded, embeds)]

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Frames (B, 3, T, H, W) in [-1, 1] of normalised latents (B, C, F, H, W), with gradients if those have any."""
        vae, (mean, std) = self.require("vae"), self.moments()
        return self._decode((latents.float() * std + mean).to(vae.device, vae.dtype))

    @torch.no_grad()
    def decode(self, latents: Tensor, names: Sequence[str] | None = None) -> Tensor:
        """Decode latents to frames (B, T, 3, H, W), uint8.

        Args:
            latents: Normalised latents (B, C, F, H, W).
            names: Names of the videos, for messages; their numbers if not given.

        Raises:
            VideoAlignError: Where latents or decoded frames are not finite: as uint8 they would be black.
        """
        names = names or [f"video {number}" for number in range(len(latents))]
        remedy = "look at the weights of the generator and its adapters, and at the strength of guidance"
        require_finite("the latents of sampled videos", by_name(names, latents), remedy)
        pixels = self.decode_latents(latents)
        require_finite(
            "the frames decoded from finite latents", by_name(names, pixels), "look at the autoencoder's weights"
        )
        return ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).transpose(1, 2)

    def checked_lengths(self, prompts: Sequence[str]) -> list[int]:
        """Numbers of tokens of prompts, of which none may be too long.

        Args:
            prompts: Texts of the prompts.

        Raises:
            VideoAlignError: Where a prompt is too long.
        """
        lengths = self.token_counts(list(prompts))
        if long := [(p, n) for p, n in zip(prompts, lengths) if n > self.max_tokens]:
            raise VideoAlignError(
                f"prompt {long[0][0][:60]!r}... has {long[0][1]} tokens, but this generator was trained with at most "
                f"{self.max_tokens}; shorten it (in encoding, model.truncate: true cuts it)"
            )
        return lengths

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], truncate: bool = False) -> list[Encoded]:
        """Embeddings of each prompt, without padding, in the text encoder's dtype.

        Args:
            prompts: Texts of the prompts.
            truncate: Whether prompts that are too long are cut; otherwise they are refused.

        Raises:
            VideoAlignError: Where a prompt is too long, or an embedding is not finite.
        """
        self.require("text_encoder")
        lengths = self.token_counts(list(prompts)) if truncate else self.checked_lengths(prompts)
        counts, embedded = [min(n, self.max_tokens) for n in lengths], []
        for some in (slice(first, first + PROMPTS_AT_ONCE) for first in range(0, len(prompts), PROMPTS_AT_ONCE)):
            # copies, because without padding they are views, each of which would keep that of all of them
            embedded += [{n: p.clone() for n, p in e.items()} for e in self._embed(list(prompts[some]), counts[some])]
        for name in embedded[0] if embedded else ():
            parts = [one[name] for one in embedded]
            remedy = "run the text encoder in float32 (dtype)"
            require_finite("the embeddings of prompts", by_name([p[:60] for p in prompts], parts), remedy)
        return embedded

    def _embed(self, prompts: list[str], lengths: list[int]) -> list[Encoded]:
        """Embeddings of prompts without padding.

        Args:
            prompts: Texts of the prompts.
            lengths: Number of tokens of each, at most :attr:`max_tokens`.
        """
        options = {"max_sequence_length": self.max_tokens, "device": self.text_encoder.device}
        try:
            found = self.pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, **options)[0]
        except TypeError as error:
            who = type(self).__name__
            raise VideoAlignError(f"family {who} must override _embed(): its pipeline refuses ({error})") from error
        return [{"prompt": embeds[:n]} for embeds, n in zip(found, lengths)]

    def null_condition(self, encoded: Encoded, device: torch.device | None = None) -> Condition:
        """The condition of an empty (or negative) prompt for classifier-free guidance, with a batch size of 1.

        Args:
            encoded: The encoded prompt.
            device: Where it is put; where the prompt is, if not given.
        """
        return padded([encoded], self.prompt_shapes(), device or encoded["prompt"].device)

    def condition(self, encoded: Sequence[Encoded], device: torch.device | None = None) -> Condition:
        """Put what samples are conditioned on into one batch; prompts are padded with zeros as the family pads them.

        Args:
            encoded: Prompt, and maybe image, of each sample.
            device: Where the batch is put; where the first prompt is, if not given.

        Raises:
            VideoAlignError: Where a part is missing, or of another shape than this generator takes.
        """
        device = device or encoded[0]["prompt"].device
        return padded(encoded, self.prompt_shapes(), device) | self._images(encoded, device)

    def _images(self, encoded: Sequence[Encoded], device: torch.device) -> Condition:
        """The images of a batch, which all samples have or none."""
        names = sorted({name for one in encoded for name in one if name.startswith("image")})
        if lacking := sum(not {"image", *names} <= one.keys() for one in encoded) if names else 0:
            raise VideoAlignError(f"{lacking} of {len(encoded)} samples of a batch have no image, the others have one")
        if self.image == "required" and not names:
            raise VideoAlignError(f"a {self.class_name} makes videos from images, but these samples have none")
        if self.image == "none" and names:
            raise VideoAlignError(f"a {self.class_name} takes no images, but these samples have some")
        if names and ("image_embeds" in names) != self.embeds_images:
            has, takes = ("have", "takes none") if "image_embeds" in names else ("have no", "takes some")
            raise VideoAlignError(
                f"these samples {has} embeddings of their images, but this generator's transformer {takes}: they were "
                "encoded for another one"
            )
        return {name: torch.stack([one[name].to(device, torch.float32) for one in encoded]) for name in names}

    # --- sampling ---------------------------------------------------------------------------------------------

    def clean_frames(self, condition: Condition) -> int:
        """Number of first latent frames that are the image's own: they are not noised, and no error counts them."""
        return condition["image"].shape[2] if self.begins_with_image and "image" in condition else 0

    def with_image(self, x: Tensor, condition: Condition) -> Tensor:
        """Latents (B, C, F, H, W) whose first frames are replaced by the image, where it is part of the video."""
        clean = self.clean_frames(condition)
        return torch.cat([condition["image"].to(x), x[:, :, clean:]], 2) if clean else x

    def expert_at(self, t: float, transformer: nn.Module | None = None) -> nn.Module:
        """The transformer for a time: of two experts the one whose interval holds it.

        Args:
            t: Time in [0, 1].
            transformer: Transformer in place of :attr:`transformer`.

        Raises:
            VideoAlignError: Where it is the expert that was not loaded.
        """
        if self.boundary is None or (t >= self.boundary) == (self.expert == "high"):
            return transformer or self.require("transformer")
        if self.other is None:
            raise VideoAlignError("sampling needs both experts of this generator, and one of them was not loaded")
        return self.other

    def interval(self) -> tuple[float, float]:
        """The times [lowest, highest] of the transformer: all of them, or those of its expert."""
        if self.boundary is None:
            return 0.0, 1.0
        return (self.boundary, 1.0) if self.expert == "high" else (0.0, self.boundary)

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
        steer: Steer | None = None,
        cfg_scale_2: float | None = None,
        shift: float | None = None,
    ) -> Tensor:
        """Sample normalised latents (B, C, F, H, W) with the pipeline's own scheduler.

        Args:
            condition: Prompts, and images, of the batch.
            noise: Noise (B, C, F, H, W) to start from.
            steps: Number of scheduler steps.
            cfg_scale: Classifier-free guidance scale; 1 turns it off.
            null: Condition of the empty prompt, with a batch size of 1; needed where a scale is above 1.
            transformer: Transformer to sample from instead of :attr:`transformer`.
            on_step: Called after each scheduler step.
            steer: Changes the velocity of each step, after classifier-free guidance.
            cfg_scale_2: Scale of the ``low`` expert; ``cfg_scale`` if not given.
            shift: Shift of the time steps; the authors' own if not given.

        Raises:
            VideoAlignError: Where a scale is above 1 without ``null``, an expert is missing, or the scheduler has no
                shift.
        """
        scales = {"high": cfg_scale, "low": cfg_scale if cfg_scale_2 is None else cfg_scale_2}
        if max(scales.values()) > 1 and null is None:
            raise VideoAlignError(f"cfg_scale {max(scales.values())} needs the embedding of the empty prompt")
        if null is not None:  # the image stays
            null = condition | {name: part.expand(len(noise), *part.shape[1:]) for name, part in null.items()}
        x, scheduler = self.with_image(noise.float(), condition), self.pipeline.scheduler
        scheduler = scheduler if shift is None else shifted(scheduler, shift)
        self.schedule(scheduler, steps, x)
        scheduler.set_begin_index(0)
        for number, timestep in enumerate(scheduler.timesteps):
            t = float(timestep) / TIMES
            net = self.expert_at(t, transformer)
            scale = scales["low" if self.boundary and t < self.boundary else "high"]
            times = (timestep.double() / TIMES).expand(len(x))
            empty = null if scale > 1 else None
            v = self._step_velocity(Step(x, times, scheduler.sigmas[number], condition, empty, scale, net))
            v = steer(x, t, v, net, number) if steer else v
            x = self.with_image(scheduler.step(v, timestep, x, return_dict=False)[0], condition)
            if on_step:
                on_step()
        return x.float()

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
