"""Videos of policy and reference beside each other, from the same prompts and noise at every validation."""

import lightning as L
import torch

from .. import VideoAlignError
from ..datamodules.contracts import AlignsGenerator, require
from ..datamodules.prompts import Item, read_items
from .prompt_sampler import PromptSampler, SamplesPrompts, Sampling
from .run_media import media_of
from .side_clips import Clip, frames_of


class SideBySide(SamplesPrompts):
    """Shows animations with the policy's video on the left and the reference's on the right.

    They are under ``val/samples/`` in the run's loggers, and on the page ``samples.html`` in the run's folder.

    Args:
        prompts: Prompts of the videos; a few are enough. Or a CSV file with a column ``prompt`` (and ``image`` for
            image-to-video), or a text file with one prompt a line.
        sampling: Size of the videos, and how they are sampled.
        every: Number of validations from one sampling to the next.
    """

    def __init__(self, prompts: list[str] | str, sampling: Sampling, every: int = 1) -> None:
        if every < 1:
            raise VideoAlignError(f"SideBySide.every must be at least 1, got {every}")
        super().__init__(read_items(prompts) if isinstance(prompts, str) else [*map(Item, prompts)], sampling)
        self.every, self.count = every, 0
        self.sampler: PromptSampler | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a size of videos that the generator cannot sample, before training begins."""
        self.check_size(pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sample and show the videos. Collective under sharding: every rank samples the same ones."""
        if trainer.sanity_checking:
            return
        self.count += 1
        if (self.count - 1) % self.every:
            return
        self.sampler = self.sampler or PromptSampler(pl_module, self.sampling, self.items)
        with self.sampler.sampling_of("SideBySide", len(self.prompts)):
            for number in range(len(self.prompts)):
                self._show(trainer, pl_module, number)

    def _show(self, trainer: L.Trainer, module: L.LightningModule, number: int) -> None:
        """Sample and show the videos of a prompt."""
        prompt, media = self.prompts[number], media_of(trainer)
        policy, reference = self.sampler.both([(number, 0)])
        if media is None:
            return
        sides = [f"{side}, prompt {prompt[:60]}" for side in ("policy", "reference")]
        generator = require(module, AlignsGenerator, "callbacks.SideBySide").generator
        videos = generator.decode(torch.cat([policy, reference]), sides).cpu()  # (2, T, 3, H, W)
        both = dict(zip(("policy", "reference"), map(frames_of, videos)))
        media.clip(f"val/samples/{number} {prompt[:60]}", Clip(both, self.sampling.fps, prompt, height=128))
