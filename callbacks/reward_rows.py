"""Rewards of a set's videos on disk, a line per video, so that interrupted scoring goes on where it stopped."""

import json
import math
import os
from pathlib import Path
from typing import Any

import lightning as L
import torch

from .. import EverywhereError, VideoAlignError
from ..models.dimensions import DIMENSIONS
from ..models.files import read_json, write_json

RECORD = "scoring.json"
"""File that says what the rewards of a folder depend on."""


def read_rewards(folder: Path) -> dict[str, list[float]]:
    """Read the raw rewards VQ, MQ and TA of all ranks, by key. A last line that was cut short is left out."""
    rewards = {}
    for path in sorted(folder.glob("rewards.*.jsonl")):
        for line in path.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                try:
                    row = json.loads(line)
                    rewards[row["key"]] = [float(row[d]) for d in DIMENSIONS]
                    if not all(map(math.isfinite, rewards[row["key"]])):
                        raise ValueError(f"the rewards of {row['key']!r} are not finite")
                except (ValueError, KeyError, TypeError) as error:
                    raise VideoAlignError(f"{path} holds a line that is no reward ({error}); remove {folder}") from None
    return rewards


def open_scores(folder: Path, record: dict[str, Any]) -> None:
    """Begin or continue a folder of rewards.

    Args:
        folder: The folder; it is made where it is missing.
        record: What the rewards depend on, as JSON. A folder with another record is refused.
    """
    record = json.loads(json.dumps(record))
    if not folder.exists() or not any(folder.iterdir()):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RECORD, record)
    found = read_json(folder / RECORD, "a folder of rewards")
    if different := sorted(k for k in {*found, *record} if found.get(k) != record.get(k)):
        raise VideoAlignError(
            f"{folder} holds rewards of another model or other settings "
            f"({', '.join(different)} differ). Name another --out, or remove that folder."
        )


class RewardRows(L.Callback):
    """Appends the rewards of every predicted batch to ``rewards.RANK.jsonl``.

    Args:
        keys: Keys of the videos, by the number that batches give them.
        folder: Folder of the files.
        record: What the rewards depend on, as JSON. A folder with another record is refused.
    """

    def __init__(self, keys: list[str], folder: Path, record: dict[str, Any]) -> None:
        self.keys, self.folder, self.record = keys, folder, record
        self.problems: list[str] = []

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open this rank's file, and cut off a line that is not whole."""
        if trainer.is_global_zero:
            open_scores(self.folder, self.record)
        trainer.strategy.barrier()
        self.file = open(self.folder / f"rewards.{trainer.global_rank}.jsonl", "ab")
        content = Path(self.file.name).read_bytes()
        self.file.truncate(content.rfind(b"\n") + 1)

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: dict,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the rewards of a batch. What cannot be scored is reported at the end, when the rest is on disk."""
        for number, reason in batch["dropped"]:
            self.problems.append(f"video {self.keys[number]!r} cannot be scored: {reason}")
        if outputs is None:
            return
        lines = []
        for number, row in zip(batch["numbers"], outputs.tolist()):
            if all(map(math.isfinite, row)):
                lines.append(json.dumps({"key": self.keys[number], **dict(zip(DIMENSIONS, row))}) + "\n")
            else:
                self.problems.append(f"the rewards of {self.keys[number]!r} are not finite; the model is broken")
        self.file.write("".join(lines).encode())
        self.file.flush()
        os.fsync(self.file.fileno())

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Wait until every rank has written, and fail on all of them if one could not score a video. Collective.

        Every video must be scored, or the accuracies would be those of another benchmark.
        """
        self.file.close()
        problems: list = [self.problems]
        if trainer.world_size > 1:
            problems = [None] * trainer.world_size
            torch.distributed.all_gather_object(problems, self.problems)
        if every := [problem for part in problems for problem in part]:
            more = f" ({len(every) - 1} more videos like it)" if len(every) > 1 else ""
            raise EverywhereError(
                f"{self.folder.name}: {every[0]}{more}. The others are scored; run the command again when it is mended."
            )

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Close the file; its rewards stay."""
        if file := getattr(self, "file", None):
            file.close()
