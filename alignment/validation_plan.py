"""Whether a training will ever validate, found out before its first step."""

import math

import lightning as L
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden

from .. import VideoAlignError
from ..datamodules.contracts import RollsOut, offers


def check_validation(trainer: L.Trainer) -> None:
    """Say that a run cannot validate, or refuse it where something depends on that.

    What depends on it is a checkpoint or a stop that watches a validation's value (``monitor: val/...``). Without
    held-out data, or where validation is off and no callback would show anything at it, nothing is said.

    Args:
        trainer: The Trainer, which has its training loader.

    Raises:
        VideoAlignError: Where a callback monitors a value of a validation that cannot take place.
    """
    held_out, why = False, "there are no held-out data (data.val)"
    if trainer.limit_val_batches == 0:
        why = "trainer.limit_val_batches is 0"
    elif trainer.enable_validation:
        trainer.fit_loop.epoch_loop.val_loop.setup_data()  # a check of sanity may have left it out; Lightning keeps it
        if held_out := sum(trainer.num_val_batches) > 0:
            why = reason(trainer)
    if why is None:
        return
    watching = [c for c in trainer.callbacks if isinstance(c, ModelCheckpoint | EarlyStopping)]
    if needs := [c for c in watching if str(c.monitor).startswith("val/")]:
        raise VideoAlignError(
            f"{type(needs[0]).__name__} monitors {needs[0].monitor}, but this run can never validate: {why}"
        )
    shown = [c for c in trainer.callbacks if is_overridden("on_validation_epoch_end", c, Callback)]
    if offers(trainer.lightning_module, RollsOut):  # an iteration on own samples stands for a validation
        shown = [c for c in shown if not is_overridden("on_train_epoch_end", c, Callback)]
    silent = [type(c).__name__ for c in shown]
    if held_out:
        rank_zero_warn(f"this run will never validate: {why}")
    elif trainer.limit_val_batches == 0 and silent:
        rank_zero_warn(f"this run will never validate, and {', '.join(silent)} will show nothing: {why}")


def reason(trainer: L.Trainer) -> str | None:
    """Why the schedule of a trainer ends before its first validation; None where it does not, or where time decides.

    Args:
        trainer: The Trainer, which has its training loader.
    """
    batches, interval, every = trainer.num_training_batches, trainer.val_check_batch, trainer.check_val_every_n_epoch
    if not math.isfinite(batches) or interval is None or not math.isfinite(interval):
        return None
    if every is None:
        first, at = interval, f"trainer.val_check_interval asks for the first one after {interval} batches"
    else:
        first = (every - 1) * batches + interval
        at = f"trainer.check_val_every_n_epoch {every} asks for the first one in epoch {every} of {batches} batches"
        if interval < batches:
            at += f", after {interval} of them (trainer.val_check_interval {trainer.val_check_interval})"
    steps, epochs = trainer.max_steps, trainer.max_epochs
    ends: dict[str, float] = {}
    if steps is not None and steps >= 0:
        full, rest = divmod(steps, math.ceil(batches / trainer.accumulate_grad_batches))
        ends[f"trainer.max_steps {steps}"] = full * batches + rest * trainer.accumulate_grad_batches
    if epochs is not None and epochs >= 0:
        ends[f"trainer.max_epochs {epochs}"] = epochs * batches
    name, end = min(ends.items(), key=lambda item: item[1], default=("", math.inf))
    return None if end >= first else f"{at}, and {name} ends it after {end}"
