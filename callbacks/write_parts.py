"""Samples that a predict run makes, as a set of shards: each rank writes its own, an interrupted run goes on."""

from typing import Any

import lightning as L
import torch

from .. import EverywhereError
from ..datamodules.contracts import HasExtraFiles, HasParts, require
from ..datamodules.parts import Parts, PartWriter


class WriteParts(L.Callback):
    """Writes what ``predict_step`` returns, (key, members, record) each, to the DataModule's ``parts``.

    The module's ``extra_files()`` join the set at its end. Put it among a predict run's callbacks.

    Args:
        per_shard: Samples after which a shard is closed: what an interruption costs at most.
    """

    def __init__(self, per_shard: int = 64) -> None:
        self.per_shard = per_shard
        self.dropped: list[str] = []
        self.parts: Parts | None = None
        self.writer: PartWriter | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Begin or continue the set, before anyone looks at what is in it already."""
        if stage != "predict":
            return
        self.dropped, self.writer = [], None
        require(pl_module, HasExtraFiles, "callbacks.WriteParts")
        self.parts = require(trainer.datamodule, HasParts, "callbacks.WriteParts").parts
        if trainer.is_global_zero:
            self.parts.begin()
        trainer.strategy.barrier()
        self.writer = self.parts.writer(trainer.global_rank, self.per_shard)

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: dict,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write a batch; count what could not be used."""
        self.dropped += batch["dropped"]
        for key, members, record in outputs or ():
            self.writer.write(key, members, record)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the set, or say on all ranks why not; what was made stays. Collective."""
        self.writer.close()
        dropped, parts = self.dropped, self.parts
        if trainer.world_size > 1:
            gathered: list = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, dropped)
            dropped = [reason for part in gathered for reason in part]
        if len(dropped) > require(trainer.datamodule, HasParts, "callbacks.WriteParts").allowed_drops:
            raise EverywhereError(
                f"{len(dropped)} samples could not be used, more than data.max_dropped allows. The first one: {dropped[0]}. The others are "
                f"in {parts.folder}; run the command again when it is mended."
            )
        if trainer.is_global_zero:
            files = require(pl_module, HasExtraFiles, "callbacks.WriteParts").extra_files()
            parts.finish(files, len(dropped))
            parts.release()
        trainer.strategy.barrier()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Keep what was made."""
        if self.writer:
            self.writer.close()
        if self.parts:
            self.parts.release()
