"""The best and the worst sample of some groups, with what every reward says of them: what on-policy training learns."""

from typing import Any

import lightning as L

from ..datamodules.contracts import DrawsGroups, ShowsRollout, require
from ..datamodules.prompt_groups import Places
from ..datamodules.stream import at_least
from .run_media import media_of
from .side_clips import Clip, frames_of


class GroupExtremes(L.Callback):
    """Shows animations of the best and the worst sample of some groups, by their advantage, with all of their rewards.

    They are under ``samples/`` in the run's loggers, and on the page ``samples.html`` in the run's folder. Rewards that
    are hacked show here first. On several ranks they are the best and worst of those of the first rank.

    Args:
        groups: Number of groups that are shown, the first ones of an iteration.
        every: Number of iterations from one showing to the next.
        fps: Frame rate of the videos, in frames per second.
    """

    def __init__(self, groups: int = 2, every: int = 1, fps: float = 16.0) -> None:
        at_least(1, groups=groups, every=every)
        self.groups, self.every, self.fps = groups, every, fps

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a module or a DataModule that samples no groups."""
        require(pl_module, ShowsRollout, f"callbacks.{type(self).__name__}")
        require(trainer.datamodule, DrawsGroups, f"callbacks.{type(self).__name__}")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Places, batch_idx: int
    ) -> None:
        """Show samples of an iteration once it trains."""
        if batch.first and batch.iteration % self.every == 0 and (media := media_of(trainer)) is not None:
            module, items = require(pl_module, ShowsRollout, "callbacks.GroupExtremes"), trainer.datamodule.items
            for group in range(self.groups):
                if clip := self._clip(module, items, group):
                    media.clip(f"samples/group {group}", clip)

    def _clip(self, module: ShowsRollout, items: list, group: int) -> Clip | None:
        """Best and worst of a group, or None where this rank has fewer than two of its samples."""
        rollout = module.rollout
        rows = [row for row, one in enumerate(rollout.drawn) if one.group == group]
        if len(rows) < 2:
            return None
        rows.sort(key=lambda row: float(rollout.advantages[rollout.places[row]]))
        ends = {"best": rows[-1], "worst": rows[0]}
        prompt = items[rollout.drawn[rows[0]].item].prompt
        names = [f"{end} of {prompt[:60]!r}" for end in ends]
        videos = module.generator.decode(rollout.latents[[*ends.values()]].to(module.generator.vae.device), names)
        numbers = {"advantage": rollout.advantages, **rollout.scores}
        table = [["", *ends]]
        table += [
            [name, *(f"{float(of[rollout.places[row]]):.3f}" for row in ends.values())] for name, of in numbers.items()
        ]
        return Clip(dict(zip(ends, map(frames_of, videos.cpu()))), self.fps, prompt, table, height=128)
