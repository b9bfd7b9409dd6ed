"""Samples that a predict run makes, as a set of shards: each rank writes its own, an interrupted run goes on."""

from typing import Any

import lightning as L

from .. import VideoAlignError


class WriteParts(L.Callback):
    """Writes what ``predict_step`` returns, (key, members, record) each, to the DataModule's ``parts``.

    The module's ``extra_files()`` join the set at its end. Put it among a predict run's callbacks.

    Args:
        per_shard: samples after which a shard is closed: what an interruption costs at most.
    """

    def __init__(self, per_shard: int = 64) -> None:
        self.per_shard, self.dropped = per_shard, 0

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin or continue the set."""
        parts = trainer.datamodule.parts
        if trainer.is_global_zero:
            parts.begin()
        trainer.strategy.barrier()
        self.writer = parts.writer(trainer.global_rank, self.per_shard)

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: dict, batch_idx: int, dataloader_idx: int = 0
    ) -> None:  # fmt: skip
        """Write a batch; count what could not be used."""
        self.dropped += len(batch["dropped"])
        if self.dropped > trainer.datamodule.allowed_drops:
            raise VideoAlignError(
                f"{self.dropped} samples could not be used, more than data.max_dropped allows. The last one: {batch['dropped'][-1]}"
            )
        for key, members, record in outputs or ():
            self.writer.write(key, members, record)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the set. Collective."""
        self.writer.close()
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            trainer.datamodule.parts.finish(pl_module.extra_files())
        trainer.strategy.barrier()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Keep what was made."""
        if writer := getattr(self, "writer", None):
            writer.close()
