"""The trainer's schedule on sets that are smaller than a recipe was made for.

A recipe for hundreds of thousands of pairs accumulates over several batches and validates every so many of them. On a
set that does not fill one step, or one interval, the values are made smaller for the run, and a line says so. On larger
sets nothing changes.
"""

from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from .data_ranks import data_ranks


def fit_schedule(trainer: Any, samples: int, batch: int) -> None:
    """Make accumulation and validation interval of a trainer as small as an epoch of the training set.

    It must be called before Lightning compares them with the length of the training loader.

    Args:
        trainer: The Trainer; its ``accumulate_grad_batches`` and ``val_check_interval`` are changed.
        samples: Number of samples in the training set.
        batch: Samples per rank and micro-batch.
    """
    world = data_ranks(trainer)[1]
    batches, accumulate = samples // (world * batch), trainer.accumulate_grad_batches
    if 0 < batches < accumulate:
        ranks = f" x {world} ranks" if world > 1 else ""
        rank_zero_info(
            f"the training set has {samples} samples, fewer than one step takes (data.batch_size {batch}{ranks} x "
            f"trainer.accumulate_grad_batches {accumulate}): in this run a step takes "
            f"{batches * batch * world} of them, and an epoch is one step"
        )
        trainer.accumulate_grad_batches = accumulate = batches
    interval = trainer.val_check_interval
    if isinstance(interval, int) and trainer.check_val_every_n_epoch is not None:
        batches -= batches % accumulate
        limit = trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        if 0 < batches < interval:
            rank_zero_info(
                f"trainer.val_check_interval {interval} is larger than the {batches} batches of an epoch: this run "
                "validates at the end of an epoch. To count batches across epochs, set "
                "trainer.check_val_every_n_epoch: null"
            )
            trainer.val_check_interval = 1.0
