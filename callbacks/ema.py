"""An exponential moving average of the trained weights."""

import contextlib
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor

from .. import VideoAlignError
from ..models.parallelize import dealt_like, gathered, shard_again


class EMA(L.Callback):
    """Averages the trained parameters, such as LoRA adapters, in fp32; validation, test and export use the average.

    Args:
        decay: Share of the average that an optimizer step keeps, in (0, 1). Step n keeps at most (1 + n) / (10 + n).
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 < decay < 1:
            raise VideoAlignError(f"EMA.decay must be in (0, 1), got {decay}")
        self.decay, self.steps = decay, 0
        self.average: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] | None = None

    @staticmethod
    def _trained(module: L.LightningModule) -> dict[str, Tensor]:
        shard_again(module)
        return {name: p for name, p in module.named_parameters() if p.requires_grad}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start from the weights, or from the average that a checkpoint holds."""
        begin = {name: p.detach().float().clone() for name, p in self._trained(pl_module).items()}
        self.average = {name: dealt_like(self.average.get(name, value), value) for name, value in begin.items()}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *rest: Any) -> None:
        """Move the average once per optimizer step, however many micro-batches it has."""
        if trainer.global_step <= self.steps:
            return
        self.steps = trainer.global_step
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, parameter in self._trained(pl_module).items():
            self.average[name].lerp_(parameter.float(), 1 - decay)

    @torch.inference_mode(False)  # in which Lightning validates, and in which shards cannot be exchanged
    @torch.no_grad()
    def _swap_in(self, module: L.LightningModule) -> None:
        if self.average and self.kept is None:
            parameters = self._trained(module)
            self.kept = {name: p.detach().clone() for name, p in parameters.items()}
            for name, parameter in parameters.items():
                parameter.copy_(dealt_like(self.average[name], parameter))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _swap_out(self, module: L.LightningModule) -> None:
        if self.kept is not None:
            for name, parameter in self._trained(module).items():
                parameter.copy_(self.kept[name])
            self.kept = None

    @contextlib.contextmanager
    def in_place(self, module: L.LightningModule) -> Iterator[None]:
        """The average in the place of the weights for the time of a ``with`` block.

        Args:
            module: The module that trains.
        """
        already = self.kept is not None
        self._swap_in(module)
        try:
            yield
        finally:
            if not already:
                self._swap_out(module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the average in the place of the weights."""
        self._swap_in(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the weights back to train on."""
        self._swap_out(pl_module)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Move to the front of the callbacks, before those that export."""
        trainer.callbacks.sort(key=lambda callback: not isinstance(callback, EMA))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the average in the model, to be tested and exported."""
        self._swap_in(pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the weights also where the model has the average, which is saved in this callback's state."""
        for name, value in (self.kept or {}).items():
            checkpoint["state_dict"][name] = value

    def state_dict(self) -> dict[str, Any]:
        """The average, and the number of steps in it. Collective where weights are sharded; rank 0 writes it."""
        return {"average": gathered(self.average), "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the average, and the number of steps in it."""
        self.average, self.steps = state_dict["average"], state_dict["steps"]

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the average of a checkpoint in the place of its weights."""
        self._swap_in(pl_module)


@contextlib.contextmanager
def averaged(trainer: L.Trainer, module: L.LightningModule) -> Iterator[None]:
    """The weights that are exported, for a ``with`` block outside of validation: the average, if a callback keeps one.

    Args:
        trainer: The trainer of the run.
        module: The module that trains.
    """
    with contextlib.ExitStack() as stack:
        for callback in trainer.callbacks:
            if isinstance(callback, EMA):
                stack.enter_context(callback.in_place(module))
        yield
