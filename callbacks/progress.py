"""Progress of training and prediction where there is no terminal for Lightning's own bar."""

import sys
from typing import Any

import lightning as L

from ..bars import Bar


class LogProgress(L.Callback):
    """Prints step, rate, time left and the loss to standard error.

    Args:
        seconds: Least time between two lines, in seconds.
    """

    def __init__(self, seconds: float = 20.0) -> None:
        self.seconds = seconds

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin at the step that a checkpoint left."""
        total = trainer.estimated_stepping_batches
        self.bar = Bar("step", total, trainer.global_step, self.seconds) if trainer.is_global_zero else None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the steps so far and what the module logged to the progress bar."""
        if self.bar is not None:
            losses = {k: f"{v:.3f}" for k, v in trainer.progress_bar_metrics.items() if isinstance(v, float)}
            self.bar.set_postfix(losses, refresh=False)
            self.bar.update(trainer.global_step - self.bar.n)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the last step."""
        if self.bar is not None:
            self.bar.close()


class PredictProgress(L.Callback):
    """Prints batches, rate and time left of a predict run to standard error, where that is no terminal.

    Args:
        seconds: Least time between two lines, in seconds.
    """

    def __init__(self, seconds: float = 20.0) -> None:
        self.seconds = seconds

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin at the first batch."""
        shown = trainer.is_global_zero and not sys.stderr.isatty()
        self.bar = Bar("batch", sum(trainer.num_predict_batches), 0, self.seconds) if shown else None

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show the batches so far."""
        if self.bar is not None:
            self.bar.update(batch_idx + 1 - self.bar.n)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the last batch."""
        if self.bar is not None:
            self.bar.close()
