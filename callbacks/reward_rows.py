"""Rewards of a set's videos on disk, a line each, as they are computed: interrupted scoring goes on where it stopped."""

import json
from pathlib import Path
from typing import Any

import lightning as L

from .. import VideoAlignError
from ..models.files import read_json, write_json
from ..models.preference import DIMENSIONS

RECORD = "scoring.json"


def read_rewards(folder: Path) -> dict[str, list[float]]:
    """Raw rewards VQ, MQ, TA by key, of all ranks. A line that was cut short does not count."""
    rewards = {}
    for path in sorted(folder.glob("rewards.*.jsonl")):
        for line in path.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                try:
                    row = json.loads(line)
                    rewards[row["key"]] = [float(row[d]) for d in DIMENSIONS]
                except (ValueError, KeyError, TypeError) as error:
                    raise VideoAlignError(f"{path} holds a line that is no reward ({error}); remove {folder}") from None
    return rewards


def open_scores(folder: Path, record: dict[str, Any]) -> None:
    """Begin or continue a folder of rewards.

    Args:
        record: what the rewards depend on; a folder with another record is refused.
    """
    record = json.loads(json.dumps(record))
    if not folder.exists():
        folder.mkdir(parents=True)
        write_json(folder / RECORD, record)
    found = read_json(folder / RECORD, "a folder of rewards")
    if different := sorted(k for k in {*found, *record} if found.get(k) != record.get(k)):
        raise VideoAlignError(
            f"{folder} holds rewards of another run ({', '.join(different)} differ). Name another --out, or remove that folder."
        )


class RewardRows(L.Callback):
    """Appends the rewards of every predicted batch to ``rewards.RANK.jsonl``.

    Args:
        keys: of the videos by their number. folder: of the lines. record: what the rewards depend on; a folder that
            holds rewards of something else is refused.
    """

    def __init__(self, keys: list[str], folder: Path, record: dict[str, Any]) -> None:
        self.keys, self.folder, self.record = keys, folder, record

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open this rank's file behind its last whole line."""
        if trainer.is_global_zero:
            open_scores(self.folder, self.record)
        trainer.strategy.barrier()
        self.file = open(self.folder / f"rewards.{trainer.global_rank}.jsonl", "ab")
        content = Path(self.file.name).read_bytes()
        self.file.truncate(content.rfind(b"\n") + 1)

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: dict, batch_idx: int, dataloader_idx: int = 0
    ) -> None:  # fmt: skip
        """Write a batch at once. Every video must be scored, or the numbers would be of another benchmark."""
        if batch["dropped"]:
            number, reason = batch["dropped"][0]
            raise VideoAlignError(f"video {self.keys[number]!r} cannot be scored: {reason}")
        if not outputs.isfinite().all():
            bad = [self.keys[n] for n, row in zip(batch["numbers"], outputs) if not row.isfinite().all()]
            raise VideoAlignError(f"the rewards of {bad} are not finite; the model is broken")
        rows = zip(batch["numbers"], outputs.tolist())
        lines = [json.dumps({"key": self.keys[number], **dict(zip(DIMENSIONS, row))}) + "\n" for number, row in rows]
        self.file.write("".join(lines).encode())
        self.file.flush()

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Wait until every rank has written. Collective."""
        self.file.close()
        trainer.strategy.barrier()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Nothing is lost: what was written stays."""
        if file := getattr(self, "file", None):
            file.close()
