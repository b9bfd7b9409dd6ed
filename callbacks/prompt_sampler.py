"""Samples of policy and reference from the same prompts and noise, for the callbacks that compare their videos."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from .. import VideoAlignError
from ..bars import Bar
from ..datamodules.contracts import AlignsGenerator, require
from ..datamodules.data_ranks import data_ranks
from ..datamodules.encode_list import ClipSize
from ..datamodules.prompts import Item, check_items
from ..datamodules.sample_images import read_image
from ..models.conditions import check_negative
from ..models.family import Encoded
from ..models.flow import draw, interpolate
from ..models.generator import EXPERTS, Generator
from ..models.generator_folder import load_generator
from ..models.number_checks import at_least, positive


@dataclass(kw_only=True)
class Sampling:
    """Size of sampled videos, and how they are sampled."""

    num_frames: int | None = None
    """Frames of a video; the generator's autoencoder says which numbers it can decode. In a training: if not given,
    frames, height and width are those of the held-out latents."""
    height: int | None = None
    """Height of a video, in pixels."""
    width: int | None = None
    """Width of a video, in pixels."""
    fps: int = 16
    """Frame rate that the videos are meant for, in frames per second."""
    steps: int = 50
    """Number of scheduler steps."""
    cfg_scale: float = 1.0
    """Classifier-free guidance scale; 1 turns it off."""
    cfg_scale_2: float | None = None
    """Scale of the second of two experts (Wan2.2-A14B), which works at low noise; ``cfg_scale`` if not given."""
    shift: float | None = None
    """Shift of the scheduler's time steps; the authors' own if not given."""
    negative: str = ""
    """Negative prompt of classifier-free guidance."""
    batch_size: int = 1
    """Number of videos that are sampled at once."""
    seed: int = 0
    """Seed of the noise."""

    def __post_init__(self) -> None:
        if 0 < len(self.missing) < 3:
            raise VideoAlignError(f"sampling.{self.missing[0]} is missing: give num_frames, height and width, or none")
        whole = {name: getattr(self, name) for name in ("steps", "batch_size", "fps")}
        scales = {name: getattr(self, name) for name in ("cfg_scale", "cfg_scale_2")}
        at_least(1, "sampling.", **whole, **scales)
        positive("sampling.", shift=self.shift)
        check_negative("sampling.", self.negative, self.cfg_scale, self.cfg_scale_2)

    @property
    def missing(self) -> list[str]:
        """Names of the sizes that are not given."""
        return [name for name in ("num_frames", "height", "width") if getattr(self, name) is None]

    def check_scales(self, generator: Generator) -> None:
        """Refuse the scale of a second expert where there is one transformer.

        Args:
            generator: Generator that samples.
        """
        if self.cfg_scale_2 is not None and generator.boundary is None:
            raise VideoAlignError(
                "sampling.cfg_scale_2 is the scale of a second expert, and this generator has one transformer; leave "
                "it out"
            )

    def check_fps(self, generator: Generator) -> None:
        """Refuse another frame rate than the one that a generator's positions are made for, where they depend on it.

        Args:
            generator: Generator that samples.
        """
        if generator.reads_fps and generator.fps != self.fps:
            raise VideoAlignError(
                f"sampling.fps is {self.fps}, and model.fps {generator.fps:g}: this generator moves things for the "
                "rate of model.fps, and judges and players would see them at another; set both to that of the videos"
            )

    def complete(self) -> "Sampling":
        """Return these settings, or refuse them where no latents say how large videos are.

        Raises:
            VideoAlignError: If the size of the videos is not given.
        """
        if self.missing:
            raise VideoAlignError(f"sampling needs {', '.join(self.missing)}")
        return self


LONG = 600.0
"""Seconds of sampling at one validation above which a callback warns."""


class SamplesPrompts(L.Callback):
    """A callback that samples videos of prompts, of the held-out latents' size where none is given.

    Args:
        items: Prompts of the videos, and the images that they begin with.
        sampling: Size of the videos, and how they are sampled.
    """

    def __init__(self, items: Sequence[Item], sampling: Sampling) -> None:
        self.items, self.prompts, self.sampling = items, [item.prompt for item in items], sampling

    def check_size(self, pl_module: L.LightningModule) -> None:
        """Refuse a module that aligns no generator, and a size of videos or prompts that its generator cannot take.

        Args:
            pl_module: Module that is trained or tested.
        """
        who = f"callbacks.{type(self).__name__}"
        generator = require(pl_module, AlignsGenerator, who).generator
        check_items(self.items, generator.image, f"{who}.prompts")
        self.sampling.check_scales(generator)
        self.sampling.check_fps(generator)
        if not self.sampling.missing:
            generator.latent_shape(self.sampling.num_frames, self.sampling.height, self.sampling.width)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: dict[str, Any], *rest: int
    ) -> None:
        """Take the size of videos from held-out latents."""
        if self.sampling.missing and "latents" in batch:
            ratio, space = require(pl_module, AlignsGenerator, f"callbacks.{type(self).__name__}").generator.ratios
            frames, height, width = batch["latents"].shape[-3:]
            size = {"num_frames": (frames - 1) * ratio + 1, "height": height * space, "width": width * space}
            self.sampling = replace(self.sampling, **size)

    on_test_batch_end = on_validation_batch_end


class SamplingProgress:
    """Shows how far sampling is, and warns once where it will take long on this device.

    Args:
        who: Class of the callback that samples, for messages.
        videos: Number of videos that are sampled one after the other.
        steps: Number of scheduler steps of a video.
        device: Device that samples.
        shown: Whether this rank reports.
    """

    def __init__(self, who: str, videos: int, steps: int, device: torch.device, shown: bool) -> None:
        self.who, self.videos, self.steps, self.device = who, videos, steps, device
        self.bar = Bar(f"{who}, sampling steps", videos * steps) if shown else None
        self.done, self.began = 0, 0.0

    def __call__(self) -> None:
        """Count a scheduler step. The second one is timed: the first may compile or allocate."""
        self.done += 1
        if self.bar is None:
            return
        if self.done <= 2 and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.done == 1:
            self.began = time.monotonic()
        if self.done == 2:
            self._estimate(time.monotonic() - self.began)
        self.bar.update()
        if self.done == self.videos * self.steps:
            self.bar.close()

    def _estimate(self, seconds: float) -> None:
        if (whole := seconds * self.steps * self.videos) > LONG:
            rank_zero_warn(
                f"{self.who} will sample for about {whole / 60:.0f} minutes each time: {self.videos} times "
                f"{self.steps} steps of {seconds:.1f} s on {self.device.type}. Fewer prompts, fewer sampling.steps or "
                "smaller videos make it shorter"
            )


class PromptSampler:
    """Samples latents of policy and reference for a list of prompts, and of the images that their videos begin with.

    Args:
        module: The alignment module that holds both.
        sampling: Size of the videos, and how they are sampled.
        items: Prompts and images of the videos. Their encoders are loaded to embed them, and freed afterwards.
        encoded: The items encoded, where that was done before; only a negative prompt is embedded then.
        again: Whether the same videos will be sampled again. The reference's latents are kept then, on the CPU, where
            the module's ``reference_is_fixed`` says that they would be the same.
    """

    def __init__(
        self,
        module: L.LightningModule,
        sampling: Sampling,
        items: Sequence[Item],
        encoded: Sequence[Encoded] | None = None,
        again: bool = False,
    ) -> None:
        self.module, self.sampling, self.items, self.again = module, sampling, list(items), again
        self._kept: dict[tuple[tuple[int, int], ...], Tensor] = {}
        """Latents of the reference, by items."""
        self.aligned = require(module, AlignsGenerator, type(self).__name__)
        shape = self.aligned.generator.latent_shape(sampling.num_frames, sampling.height, sampling.width)
        self.shape = torch.Size(shape)
        self._stepped: SamplingProgress | None = None
        null = getattr(module.trainer.datamodule, "null", None)
        if encoded is not None and null is not None and not sampling.negative:
            self.encoded = [*encoded, null]
        else:
            self.encoded = self._embed(encoded)

    def _embed(self, encoded: Sequence[Encoded] | None) -> list[Encoded]:
        """What videos are conditioned on, and the negative prompt; the encoders are freed afterwards."""
        sampling, device = self.sampling, self.module.device
        dtype = "bfloat16" if device.type == "cuda" else "float32"  # UMT5-XXL is 23 GB in fp32
        files, kind = [item.image for item in self.items if item.image], type(self.aligned.generator)
        parts = ("text_encoder", "vae") if files else ("text_encoder",)
        encoder = load_generator(self.aligned.name, dtype, parts, family=kind).to(device)
        texts = [] if encoded is not None else [item.prompt for item in self.items]
        found = encoder.encode_prompts([*texts, sampling.negative])
        if files:
            size = ClipSize(num_frames=sampling.num_frames, height=sampling.height, width=sampling.width)
            for number, file in enumerate(files):
                picture = size.image(read_image(file, str(file)).content, str(file))[None].to(device)
                found[number] |= encoder.encode_images(picture, sampling.num_frames)[0]
        del encoder
        _free(device)
        return [*(encoded or []), *({name: part.cpu() for name, part in one.items()} for one in found)]

    @contextlib.contextmanager
    def sampling_of(self, who: str, rounds: int) -> Iterator[None]:
        """Show the progress of the next calls of :meth:`both`; meanwhile the expert that does not train is in memory.

        Args:
            who: Class of the callback that samples, for messages.
            rounds: Number of calls.
        """
        shown, device, generator = self.module.trainer.is_global_zero, self.module.device, self.aligned.generator
        videos = 2 * rounds - len(self._kept)
        self._stepped = SamplingProgress(who, videos, self.sampling.steps, device, shown)
        lent = generator.boundary is not None and generator.other is None
        if lent:
            absent = next(name for name in EXPERTS if name != generator.expert)
            dtype = str(generator.transformer.dtype).removeprefix("torch.")
            kind = type(generator)
            memory = getattr(self.module, "memory", None)  # quantised as the expert that trains
            loaded = load_generator(
                self.aligned.name, dtype, ("transformer",), family=kind, expert=absent, memory=memory
            )
            generator.other = loaded.transformer.to(device)
        try:
            yield
        finally:
            if lent:
                generator.other = None
                _free(device)

    def noise(self, items: Sequence[tuple[int, int]]) -> Tensor:
        """Draw the noise of (prompt, number) items, which depends on the seed, prompt, image and number alone.

        Args:
            items: N pairs of a prompt's place in the list and the number of its noise.

        Returns:
            Noise (N, C, F, H, W).
        """
        seeds = torch.tensor([self.items[p].seed(self.sampling.seed, n) for p, n in items])
        return draw(seeds, self.shape, self.module.device)[1]

    def _precision(self):
        """The trainer's precision, which Lightning does not apply in callbacks."""
        return self.module.trainer.precision_plugin.forward_context()

    @torch.no_grad()
    def both(self, items: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Sample videos of policy and reference from the same noise. Collective under sharding.

        Args:
            items: N pairs of a prompt's place in the list and the number of its noise.

        Returns:
            Latents (N, C, F, H, W) of the policy, and of the reference.
        """
        generator, s = self.aligned.generator, self.sampling
        if generator.vae is None:
            raise VideoAlignError("videos cannot be decoded: add vae to model.parts")
        condition = generator.condition([self.encoded[p] for p, _ in items], self.module.device)
        guided = max(s.cfg_scale, s.cfg_scale_2 or 1) > 1
        null = generator.null_condition(self.encoded[-1], self.module.device) if guided else None
        options = {name: getattr(s, name) for name in ("steps", "cfg_scale", "cfg_scale_2", "shift")} | {"null": null}
        noise = self.noise(items)
        with self._precision():
            policy = generator.sample(condition, noise, on_step=self._stepped, **options)
        if (kept := self._kept.get(tuple(items))) is not None:
            return policy, kept.to(policy)
        with self._precision(), self.aligned.as_reference() as net:
            reference = generator.sample(condition, noise, transformer=net, on_step=self._stepped, **options)
        if self.again and getattr(self.module, "reference_is_fixed", False):
            self._kept[tuple(items)] = reference.cpu()
        return policy, reference

    def dealt(self, who: str, samples: int) -> Iterator[tuple[list[tuple[int, int]], Tensor, Tensor]]:
        """Sample videos of all prompts, each rank its share. Collective: every rank takes as many turns.

        Args:
            who: Class of the callback that samples, for messages.
            samples: Number of noises per prompt.

        Yields:
            (prompt, number) items, and latents (N, C, F, H, W) of policy and reference; a rank may get some again.
        """
        items, size = [(p, n) for p in range(len(self.items)) for n in range(samples)], self.sampling.batch_size
        batches = [items[i : i + size] for i in range(0, len(items), size)]
        rank, ranks = data_ranks(self.module.trainer)
        rounds = -(-len(batches) // ranks)
        with self.sampling_of(who, rounds):
            for number in range(rounds):
                batch = batches[(number * ranks + rank) % len(batches)]
                yield batch, *self.both(batch)

    @torch.no_grad()
    def drift(self, latents: Tensor, items: Sequence[tuple[int, int]], draws: int = 4) -> Tensor:
        """Measure how far the policy's velocities are from the reference's. Collective under sharding.

        Args:
            latents: (N, C, F, H, W) latents that are noised for it.
            items: N pairs of a prompt's place in the list and the number of its noise.
            draws: Number of flow times, which are the middles of as many equal parts of the transformer's times.

        Returns:
            (N,) mean squared difference of the two velocities.
        """
        generator = self.aligned.generator
        condition = generator.condition([self.encoded[p] for p, _ in items], self.module.device)
        noise = self.noise(items)
        clean, (lowest, highest) = generator.clean_frames(condition), generator.interval()
        total = torch.zeros(len(items), device=latents.device)
        for i in range(draws):
            t = torch.full((len(items),), lowest + (highest - lowest) * (i + 0.5) / draws, device=latents.device)
            x = generator.with_image(interpolate(latents, noise, t), condition)
            with self._precision():
                mine = generator.velocity(x, t, condition)
            with self._precision(), self.aligned.as_reference() as net:
                change = mine - generator.velocity(x, t, condition, net)
            total += change[:, :, clean:].square().flatten(1).mean(1)
        return total / draws


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
