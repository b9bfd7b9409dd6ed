"""A callback that samples videos of the policy while it trains."""

from collections.abc import Sequence
from dataclasses import replace

import lightning as L

from ..datamodules.contracts import ShowsRollout, offers
from ..datamodules.prompts import Item
from ..models.number_checks import at_least
from .ema import averaged
from .prompt_sampler import SamplesPrompts, Sampling


class WatchesPolicy(SamplesPrompts):
    """Samples videos of prompts at validations.

    A module that trains on its own samples has none: an iteration stands for one, the videos are of the size of its
    samples if none is given, and the policy is the average of :class:`.EMA` where there is one.

    Args:
        items: Prompts of the videos, and the images that they begin with.
        sampling: Size of the videos, and how they are sampled.
        every: Number of validations (or iterations) from one sampling to the next.
    """

    def __init__(self, items: Sequence[Item], sampling: Sampling, every: int = 1) -> None:
        at_least(1, f"{type(self).__name__}.", every=every)
        super().__init__(items, sampling)
        self.every, self.count = every, 0

    def look(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sample, and show what was found. Collective under sharding.

        Args:
            trainer: The trainer of the run.
            pl_module: Module that trains.
        """
        raise NotImplementedError

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a size of videos that the generator cannot sample, before training begins."""
        if offers(pl_module, ShowsRollout) and self.sampling.missing:
            own = pl_module.sampling
            self.sampling = replace(self.sampling, num_frames=own.num_frames, height=own.height, width=own.width)
        self.check_size(pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look where it is time to. Collective under sharding: every rank must call it."""
        if not trainer.sanity_checking:
            self._look(trainer, pl_module, self.count)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look after an iteration on own samples. Collective under sharding."""
        if offers(pl_module, ShowsRollout):
            training = [module for module in pl_module.modules() if module.training]
            pl_module.eval()  # adapters may have a dropout
            with averaged(trainer, pl_module):
                self._look(trainer, pl_module, trainer.current_epoch)
            for module in training:
                module.training = True

    def _look(self, trainer: L.Trainer, module: L.LightningModule, number: int) -> None:
        """Look if it is the turn of a validation or iteration, and at the first one of a run that goes on: what it logs
        is then there for callbacks that watch it."""
        first, self.count = self.count == 0, self.count + 1
        if first or number % self.every == 0:
            self.look(trainer, module)
