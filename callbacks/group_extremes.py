"""The best and the worst sample of some groups, with what every reward says of them: what on-policy training learns."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

from ..datamodules.contracts import DrawsGroups, ShowsRollout, require
from ..datamodules.prompt_groups import Places
from ..models.number_checks import at_least, positive
from .run_media import media_of
from .side_clips import Clip, frames_of


class GroupExtremes(L.Callback):
    """Shows animations of the best and the worst sample of some groups, by their advantage, with all of their rewards.

    They are under ``samples/`` in the run's loggers, and on the page ``samples.html`` in the run's folder. Rewards that
    are hacked show here first.

    Args:
        groups: Number of groups that are shown, the first ones of an iteration.
        every: Number of iterations from one showing to the next.
        fps: Frame rate of the videos, in frames per second.
    """

    def __init__(self, groups: int = 2, every: int = 1, fps: float = 16.0) -> None:
        at_least(1, "GroupExtremes.", groups=groups, every=every)
        positive("GroupExtremes.", fps=fps)
        self.groups, self.every, self.fps = groups, every, fps

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a module or a DataModule that samples no groups."""
        require(pl_module, ShowsRollout, f"callbacks.{type(self).__name__}")
        require(trainer.datamodule, DrawsGroups, f"callbacks.{type(self).__name__}")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Places, batch_idx: int
    ) -> None:
        """Show samples of an iteration once it trains. Collective: the ends of a group may lie on different ranks."""
        if not batch.first or batch.iteration % self.every:
            return
        module, data = require(pl_module, ShowsRollout, "callbacks.GroupExtremes"), trainer.datamodule
        of_group = module.rollout.order.view(data.groups, -1)[: self.groups]  # (groups, K)
        size = of_group.shape[1]
        ends = [
            {"best": group * size + int(some.argmax()), "worst": group * size + int(some.argmin())}
            for group, some in enumerate(of_group)
        ]
        latents = module.latents_at([place for one in ends for place in one.values()])
        if (media := media_of(trainer)) is not None:
            drawn = data.drawn(batch.iteration)
            for group, places in enumerate(ends):
                prompt = data.items[drawn[group * size].item].prompt
                media.clip(f"samples/group {group}", self._clip(module, prompt, places, latents))

    def _clip(
        self, module: ShowsRollout, prompt: str, places: Mapping[str, int], latents: Mapping[int, Tensor]
    ) -> Clip:
        """Best and worst of a group, by their places."""
        rollout, ends = module.rollout, [*places]
        names = [f"{end} of {prompt[:60]!r}" for end in ends]
        both = torch.stack([latents[place] for place in places.values()])  # (2, C, F, H, W)
        videos = module.generator.decode(both.to(module.generator.vae.device), names)
        numbers = {"advantage": rollout.advantages, **rollout.scores}
        table = [["", *ends]]
        table += [[name, *(f"{float(of[place]):.3f}" for place in places.values())] for name, of in numbers.items()]
        return Clip(dict(zip(ends, map(frames_of, videos.cpu()))), self.fps, prompt, table, height=128)
