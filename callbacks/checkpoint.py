"""Checkpoints whose ``last.ckpt`` holds the last step."""

from typing import Any, Literal, Protocol, runtime_checkable

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint


@runtime_checkable
class MeasuredAtEnd(Protocol):
    """A LightningModule whose checkpoints hold numbers that are measured on its weights."""

    def measure_last_weights(self) -> bool:
        """Measure them on the weights of the last step. Collective: every rank must call it.

        Returns:
            Whether anything was measured: False where the numbers are those of this step already. The same on every
            rank.
        """


class Checkpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, which writes ``last.ckpt`` once more when training ends between two savings.

    So ``--ckpt_path .../last.ckpt`` gives the weights that are exported, with the statistics that were measured on them
    (see :class:`MeasuredAtEnd`), and a longer training goes on from there as if it had never stopped. All arguments are
    those of :class:`~lightning.pytorch.callbacks.ModelCheckpoint`, but ``save_last`` is on.
    """

    def __init__(self, *args: Any, save_last: Literal["link"] | bool | None = True, **kwargs: Any) -> None:
        super().__init__(*args, save_last=save_last, **kwargs)
        self._loops: dict[str, Any] = {}
        """State of the training loops after the last optimizer step."""
        self._step, self._last_step = 0, -1
        self._measured = self._ending = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget an earlier training: before its first step there is nothing to save, also in a resumed one."""
        super().on_train_start(trainer, pl_module)
        self._step, self._last_step, self._loops, self._measured = trainer.global_step, -1, {}, False

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *rest: Any) -> None:
        """Save as Lightning does, and remember the state of the loops after this step.

        When training ends, Lightning counts an epoch that was left early as finished, and batches whose gradients no
        step has used as done.
        """
        super().on_train_batch_end(trainer, pl_module, *rest)
        if trainer.global_step != self._step:
            self._step, self._loops = trainer.global_step, trainer.fit_loop.state_dict()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save as Lightning does, and remember that a validation may have changed a reward model's statistics."""
        self._measured = not trainer.sanity_checking
        super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write ``last.ckpt``, unless it is of this step and nothing was measured after it. Collective.

        The module's own ``on_train_end`` would measure too late: Lightning calls those of the callbacks first.
        """
        if not self.save_last or not self._loops or trainer.fast_dev_run:
            return
        if isinstance(pl_module, MeasuredAtEnd) and pl_module.measure_last_weights():
            for callback in trainer.checkpoint_callbacks:  # one measures for all of them
                if isinstance(callback, Checkpoint):
                    callback._measured = True
        if self._last_step == trainer.global_step and not self._measured:
            return
        kept, self.save_last, self._ending = self.save_last, True, True  # a link would lead to an earlier step
        try:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        finally:
            self.save_last, self._ending = kept, False

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """When training ends, save the loops in the state after the last step."""
        if self._ending:
            checkpoint["loops"]["fit_loop"] = self._loops
            checkpoint["epoch"] = self._loops["epoch_progress"]["current"]["completed"]

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        if filepath == self.last_model_path:
            self._last_step, self._measured = trainer.global_step, False
