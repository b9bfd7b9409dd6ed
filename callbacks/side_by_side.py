"""Videos of policy and reference beside each other, from the same prompts and noise as training goes on."""

from typing import Any

import lightning as L
import torch

from .. import EverywhereError, VideoAlignError
from ..datamodules.contracts import AlignsGenerator, ShowsRollout, offers, require
from ..datamodules.data_ranks import merged
from ..datamodules.prompts import Item, read_items
from ..models.family import Encoded
from ..models.number_checks import at_least
from .prompt_sampler import PromptSampler, Sampling
from .run_media import media_of
from .side_clips import Clip, frames_of
from .watches_policy import WatchesPolicy


class SideBySide(WatchesPolicy):
    """Shows animations with the policy's video on the left and the reference's on the right.

    They are under ``val/samples/`` in the run's loggers, and on the page ``samples.html`` in the run's folder, at
    validations or after iterations on own samples (:class:`.WatchesPolicy`). A reference that never changes is sampled
    once.

    Args:
        prompts: Prompts of the videos; a few are enough. Or a CSV file with a column ``prompt`` (and ``image`` for
            image-to-video), or a text file with one prompt a line. Or a number: of so many held-out samples the prompts
            and images are taken, encoded as they are; no encoder is loaded then.
        sampling: Size of the videos, and how they are sampled.
        every: Number of validations (or iterations) from one sampling to the next.
    """

    def __init__(self, prompts: list[str] | str | int, sampling: Sampling, every: int = 1) -> None:
        self.held_out = prompts if isinstance(prompts, int) else None
        at_least(1, "SideBySide.", prompts=self.held_out)
        if self.held_out and not sampling.missing:
            raise VideoAlignError(
                "SideBySide.prompts takes held-out samples, whose size the videos have: leave sampling.num_frames, "
                "height and width out, or name prompts"
            )
        if isinstance(prompts, list) and not (prompts and all(prompt.strip() for prompt in prompts)):
            raise VideoAlignError("SideBySide.prompts is empty, or one of its prompts is: name a prompt or more")
        items = read_items(prompts) if isinstance(prompts, str) else [*map(Item, [] if self.held_out else prompts)]
        super().__init__(items, sampling, every)
        self.found: dict[str, tuple[str, Encoded]] = {}
        self.sampler: PromptSampler | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse held-out samples where there are none, and a size of videos that the generator cannot sample."""
        if not self.held_out:
            super().setup(trainer, pl_module, stage)
        elif offers(pl_module, ShowsRollout):
            raise VideoAlignError(
                f"SideBySide.prompts is {self.held_out}, a number of held-out samples, but {type(pl_module).__name__} "
                "trains on its own samples and has none: name prompts"
            )

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: dict[str, Any], *rest: int
    ) -> None:
        """Take the size of videos, and maybe prompts and images, from held-out latents."""
        super().on_validation_batch_end(trainer, pl_module, outputs, batch, *rest)
        if not self.held_out or "latents" not in batch:
            return
        if self.sampler is None:
            rows = zip(batch["keys"], batch["texts"], batch["conditions"], batch["valid"].tolist())
            for key, text, encoded, valid in rows:
                if valid and len(self.found) < self.held_out:
                    self.found[key] = text, {name: part.cpu() for name, part in encoded.items()}

    def _gather(self) -> list[Encoded]:
        """The held-out samples to show, the same ones on every rank. Collective."""
        found = merged(self.found)
        if not found:
            raise EverywhereError("SideBySide.prompts takes held-out samples, and there are none: name prompts")
        chosen = [found[key] for key in sorted(found)[: self.held_out]]
        self.items = [Item(text) for text, _ in chosen]
        self.prompts = [text for text, _ in chosen]
        return [encoded for _, encoded in chosen]

    def look(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sample and show the videos. Collective under sharding: every rank samples the same ones."""
        if self.sampler is None:
            encoded = self._gather() if self.held_out else None
            self.sampler = PromptSampler(pl_module, self.sampling, self.items, encoded, again=True)
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
