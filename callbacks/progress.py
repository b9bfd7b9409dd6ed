"""Progress of training, evaluation and prediction: bars on a terminal, and lines now and then in a log."""

import sys
from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar

from ..bars import Bar


class Progress(ProgressBar):
    """Shows steps or batches, rate, time left and the loss on standard error.

    Training is counted in optimizer steps of the whole run, so that the time left is that of the run.

    Args:
        seconds: Least time between two lines of a log, in seconds.
    """

    def __init__(self, seconds: float = 20.0) -> None:
        super().__init__()
        self.seconds = seconds
        self.bars: list[Bar] = []
        """Open bars: training's, and that of a validation within it."""

    def disable(self) -> None:
        """Nothing is left to switch off: ranks other than the first open no bars."""

    def _open(self, what: str, counts: int | float | Sequence[int | float], first: int = 0, leave: bool = True) -> None:
        total = sum(counts) if isinstance(counts, list) else counts
        if self.trainer.is_global_zero:
            bar = Bar(what, int(total) if total < float("inf") else 0, first, self.seconds)
            bar.leave = leave and bar.leave
            self.bars.append(bar)

    def _count(self) -> None:
        if self.bars:
            self.bars[-1].update(1)

    def _close(self) -> None:
        if self.bars:
            self.bars.pop().close()

    # --- training -----------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin at the step that a checkpoint left."""
        self._open("step", trainer.estimated_stepping_batches, trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the steps so far and what the module logged to the progress bar."""
        if self.bars:
            losses = {k: f"{v:.3f}" for k, v in trainer.progress_bar_metrics.items() if isinstance(v, float)}
            self.bars[-1].set_postfix(losses, refresh=False)
            self.bars[-1].update(trainer.global_step - self.bars[-1].n)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the last step."""
        self._close()

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin at the first batch of all sets; within a training the bar goes when it is full."""
        counts = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._open("validation batch", counts, leave=trainer.state.fn != "fit")

    def on_validation_batch_end(self, *args: Any) -> None:
        """Show the batches so far."""
        self._count()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the last batch. In a log, a validation that needed no line in between needs none at its end."""
        if self.bars and trainer.state.fn == "fit" and not sys.stderr.isatty():
            self.bars[-1].last_print_n = self.bars[-1].n
        self._close()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin at the first batch of all sets."""
        self._open("test batch", trainer.num_test_batches)

    def on_test_batch_end(self, *args: Any) -> None:
        """Show the batches so far."""
        self._count()

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the last batch."""
        self._close()

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin at the first batch of all sets."""
        self._open("batch", trainer.num_predict_batches)

    def on_predict_batch_end(self, *args: Any) -> None:
        """Show the batches so far."""
        self._count()

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the last batch."""
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Close what is open, so that the message begins on a line of its own."""
        while self.bars:
            self._close()
