"""What every training shares: optimizer and schedule, checkpoints of what trains, finite losses, logged means."""

import math
import os
from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .. import EverywhereError, VideoAlignError
from ..models.flow import draw_seed
from .means import Means

Decay = Literal["constant", "cosine", "linear"]


class Training(L.LightningModule):
    """A LightningModule that trains some of its parameters.

    Checkpoints hold the tensors that train and nothing else, and one that lacks any of them or has others is refused.
    (Sharded checkpoints keep everything: torch's loader wants every tensor of the sharded model.)

    Args:
        optimizer: of what trains.
        warmup: share of the steps in which the learning rate rises, in [0, 1).
        decay: what the learning rate does afterwards.
    """

    def __init__(self, optimizer: OptimizerCallable, warmup: float, decay: Decay) -> None:
        super().__init__()
        if not 0 <= warmup < 1:
            raise VideoAlignError(f"model.warmup is a share of the steps in [0, 1), got {warmup}")
        self.strict_loading = False
        self.optimizer, self.warmup, self.decay = optimizer, warmup, decay
        self.step_means, self.held_out_means = Means(), Means()

    # --- what trains ------------------------------------------------------------------------------------------------

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by their names in ``state_dict``."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimizer over what trains, and warm-up with the chosen decay.

        Raises:
            VideoAlignError: where something would train in another precision than float32 (or float64).
        """
        if low := {n: p.dtype for n, p in self.trained().items() if p.dtype not in (torch.float32, torch.float64)}:
            name, kind = next(iter(low.items()))
            raise VideoAlignError(
                f"{len(low)} tensors would train in {kind}, such as {name}; small steps vanish in that precision. With "
                f"trainer.precision {self.trainer.precision!r}: use bf16-mixed, which computes in bfloat16 and trains in float32"
            )
        optimizer = self.optimizer(list(self.trained().values()))
        schedule = warmup_schedule(optimizer, stepping_batches(self.trainer), self.warmup, self.decay)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what is frozen."""
        if self.device_mesh is None:
            trained = self.trained()
            checkpoint["state_dict"] = {n: t for n, t in checkpoint["state_dict"].items() if n in trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model."""
        if "state_dict" not in checkpoint:  # sharded: loaded, and checked, already
            return
        own, saved = self.state_dict(), checkpoint["state_dict"]
        want, known, found = self.trained().keys(), own.keys(), saved.keys()
        if misshapen := [name for name in found & known if own[name].shape != saved[name].shape]:
            name = sorted(misshapen)[0]
            raise VideoAlignError(
                f"the checkpoint does not fit this model: {len(misshapen)} tensors have other shapes, such as {name}, "
                f"{tuple(saved[name].shape)} in place of {tuple(own[name].shape)}. Use the configuration that it was trained with."
            )
        if not want <= found <= known:
            raise VideoAlignError(
                f"the checkpoint does not fit this model: {len(want - found)} tensors are missing (such as {sorted(want - found)[:3]}), "
                f"{len(found - known)} are unexpected (such as {sorted(found - known)[:3]}). Use the configuration that it was trained with."
            )

    # --- losses -----------------------------------------------------------------------------------------------------

    def finite(self, loss: Tensor, keys: Sequence[str]) -> Tensor:
        """The loss, which every rank must have finite. Collective: every rank must call it.

        Args:
            loss: a number.
            keys: of the samples that it was computed of, for the message.

        Raises:
            EverywhereError: on all ranks, where it is not finite on one of them.
        """
        broken = (~torch.isfinite(loss.detach())).int()
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        if several:
            torch.distributed.all_reduce(broken, torch.distributed.ReduceOp.MAX)
        if not broken:
            return loss
        where = f" on rank {self.global_rank}" if several and self.trainer.world_size > 1 else ""
        text = f"the loss is {loss.item()} at step {self.global_step}{where}, samples {list(keys)}"
        texts = [None if torch.isfinite(loss) else text]
        if several:
            mine, texts = texts[0], [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(texts, mine)
        raise EverywhereError(
            f"{next(t for t in texts if t)}; lower the learning rate or look at these samples. The last checkpoint is as it was."
        )

    # --- logged means -----------------------------------------------------------------------------------------------

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        """What is logged of the means of a step or of an epoch; themselves, unless an algorithm says otherwise."""
        return means

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the means of a step: all its batches are in. Collective."""
        for name, value in self.derived(self.step_means.compute()).items():
            self.log(
                f"train/{name}", value, prog_bar=name.startswith("loss"), on_step=True, on_epoch=False, batch_size=1
            )
        self.step_means.reset()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Let what is drawn from torch's own generator, such as dropout, belong to the step: resumed runs draw the same."""
        run = os.environ.get("PL_GLOBAL_SEED", "0")
        torch.manual_seed(draw_seed(run, self.global_step, batch_idx, self.global_rank))

    def on_train_start(self) -> None:
        """Begin with no means; a step may have been left half done."""
        self.step_means.reset()

    def on_validation_epoch_start(self) -> None:
        """Forget what the sanity check or an interrupted epoch left."""
        self.held_out_means.reset()

    def on_validation_epoch_end(self) -> None:
        """Log the means of the held-out samples. Collective."""
        stage = "test" if self.trainer.testing else "val"
        for name, value in self.derived(self.held_out_means.compute()).items():
            self.log(f"{stage}/{name}", value, batch_size=1)

    def on_test_epoch_start(self) -> None:
        """Begin a test like a validation."""
        self.on_validation_epoch_start()

    def on_test_epoch_end(self) -> None:
        """End a test like a validation."""
        self.on_validation_epoch_end()


def stepping_batches(trainer: L.Trainer) -> float:
    """Optimizer steps of a run; infinite where nothing bounds them.

    ``trainer.estimated_stepping_batches`` builds the training loader where the number of epochs bounds the run. Built
    while optimizers are made, that is before a checkpoint's loops are restored, it would never be given its place in
    the epoch (Lightning's issue 20550), so it is put away again here; training builds it anew.
    """
    before = trainer.fit_loop._combined_loader
    steps = trainer.estimated_stepping_batches
    trainer.fit_loop._combined_loader = before
    return float(steps)


def warmup_schedule(optimizer: Optimizer, steps: float, warmup: float, decay: Decay) -> LambdaLR:
    """A linear rise over the first ``warmup * steps`` steps, then a constant rate or a decay to zero at ``steps``."""
    rise = warmup * steps if math.isfinite(steps) else 0

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / (rise + 1)
        progress = min((step - rise) / max(steps - rise, 1), 1.0)
        return {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[decay]

    return LambdaLR(optimizer, factor)
