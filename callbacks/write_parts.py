"""A set of shards from a predict run: each rank writes parts of its own, and an interrupted run goes on."""

import shlex
from typing import Any

import lightning as L
import torch

from .. import EverywhereError
from ..datamodules.contracts import HasExtraFiles, HasParts, require
from ..datamodules.parts import Parts, PartWriter
from .reports import Report, shown


class WriteParts(L.Callback):
    """Writes the samples that ``predict_step`` returns as (key, members, record) to the DataModule's ``parts``.

    When the set is finished, the module's ``extra_files()`` are added. It is a callback for predict runs.

    Args:
        per_shard: Number of samples in a shard. An interruption costs at most the samples of an open shard.
    """

    def __init__(self, per_shard: int = 64) -> None:
        self.per_shard = per_shard
        self.dropped: list[str] = []
        self.left_out: list[str] = []
        self.parts: Parts | None = None
        self.writer: PartWriter | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Begin or continue the set, before the DataModule looks for samples that are in it already."""
        if stage != "predict":
            return
        self.dropped, self.left_out, self.writer = [], [], None
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
        """Write the samples of a batch, and remember those that could not be used."""
        self.dropped += batch["dropped"]
        for key, members, record in outputs or ():
            self.writer.write(key, members, record)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Finish the set, or fail on all ranks and keep the parts. Collective: every rank must call it."""
        self.writer.close()
        dropped, parts = self.dropped, self.parts
        if trainer.world_size > 1:
            gathered: list = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, dropped)
            dropped = [reason for part in gathered for reason in part]
        if len(dropped) > require(trainer.datamodule, HasParts, "callbacks.WriteParts").allowed_drops:
            raise EverywhereError(
                f"{len(dropped)} samples could not be used, more than data.max_dropped allows. The first one: "
                f"{dropped[0]}. The others are in {parts.folder}; run the command again when it is mended."
            )
        if trainer.is_global_zero:
            files = require(pl_module, HasExtraFiles, "callbacks.WriteParts").extra_files()
            self.left_out = dropped
            parts.finish(files, len(dropped))
            parts.release()
        trainer.strategy.barrier()

    def run_report(self, trainer: L.Trainer) -> Report:
        """The set that was written, and what is not in it."""
        if self.parts is None:
            return Report()
        folder, gone = shown(self.parts.out), self.left_out
        left_out = {"left out": f"{len(gone)} samples that could not be used; the first one: {gone[0]}"} if gone else {}
        return Report({"set": folder, **left_out}, {f"videoalign shards info {shlex.quote(folder)}": "describe it"})

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Close the parts; they stay for the next run."""
        if self.writer:
            self.writer.close()
        if self.parts:
            self.parts.release()
