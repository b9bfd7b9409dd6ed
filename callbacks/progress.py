"""Progress as lines of text, for logs and other outputs that are no terminal."""

import sys
import time
from typing import Any

import lightning as L


class LogProgress(L.Callback):
    """Prints step, rate, time left and the loss to standard error.

    Args:
        seconds: Time between two lines.
    """

    def __init__(self, seconds: float = 20.0) -> None:
        self.seconds = seconds

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the time and the step at which the run begins."""
        self.started = self.shown = time.monotonic()
        self.first = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print a line if the last one is old enough."""
        now, done = time.monotonic(), trainer.global_step - self.first
        if not trainer.is_global_zero or not done or now - self.shown < self.seconds:
            return
        self.shown = now
        rate, total = done / (now - self.started), trainer.estimated_stepping_batches
        left = (total - trainer.global_step) / rate
        losses = {k: f"{v:.3f}" for k, v in trainer.progress_bar_metrics.items() if isinstance(v, float)}
        line = f"step {trainer.global_step}/{total:.0f}, {rate:.1f}/s, {left:.0f} s left {losses}"
        print(line, file=sys.stderr, flush=True)


class PredictProgress(L.Callback):
    """Prints batches, rate and time left of a predict run to standard error, where that is no terminal.

    Args:
        seconds: Time between two lines.
    """

    def __init__(self, seconds: float = 20.0) -> None:
        self.seconds = seconds

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the time at which the run begins."""
        self.started = self.shown = time.monotonic()

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Print a line if the last one is old enough."""
        now, done, total = time.monotonic(), batch_idx + 1, sum(trainer.num_predict_batches)
        if not trainer.is_global_zero or sys.stderr.isatty() or now - self.shown < self.seconds:
            return
        self.shown, rate = now, done / (now - self.started)
        print(f"batch {done}/{total}, {rate:.2f}/s, {(total - done) / rate:.0f} s left", file=sys.stderr, flush=True)
