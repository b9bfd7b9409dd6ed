"""What a reward model gets right and wrong on held-out pairs, at each validation."""

import math
from typing import Any

import lightning as L
from matplotlib.figure import Figure

from .. import VideoAlignError
from ..datamodules.contracts import HasExamples, ScoresPairs, require
from ..models.dimensions import DIMENSIONS
from .example_pairs import rated_clip
from .held_out import OUTCOMES, Confusion, HeldOut, Rows, confusion, source_accuracies, surprises
from .plots import panels
from .run_media import Media, media_of

MOST_SOURCES = 40
"""Number of rows of the table of sources."""


class RewardReport(L.Callback):
    """Shows at each validation where a reward model agrees with people.

    - ``val/rewards/DIMENSION``: Histograms of the raw rewards of both videos of all held-out pairs.
    - ``val/confusion``: What people said against what the model says, at the tie threshold with the best accuracy, as
      a chart and as a table.
    - ``val/sources``: Accuracy without ties for each pair of generating models.
    - ``val/mistakes`` and ``val/agreements``: Clips of the pairs with the least probable label, and of those whose
      labels are the most probable ones. One label is enough for a mistake; agreement is the mean over a pair's labels.

    Args:
        mistakes: Number of mistakes to show.
        agreements: Number of agreements to show.
        fps: Frame rate at which clips are shown, in frames per second.
        height: Least height of a video, in pixels.
    """

    def __init__(self, mistakes: int = 4, agreements: int = 2, fps: float = 4.0, height: int = 160) -> None:
        if min(mistakes, agreements) < 0:
            raise VideoAlignError("RewardReport.mistakes and RewardReport.agreements must be at least 0")
        self.mistakes, self.agreements, self.fps, self.height = mistakes, agreements, fps, height
        self.rows = Rows()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a module that scores no pairs, and a DataModule that does not find the pairs to show."""
        if stage in ("fit", "validate"):
            require(pl_module, ScoresPairs, "callbacks.RewardReport")
            if self.mistakes or self.agreements:
                require(trainer.datamodule, HasExamples, "callbacks.RewardReport")

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the rewards of the last validation."""
        self.rows = Rows()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: dict,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the rewards of a batch of pairs."""
        if outputs and "rewards" in outputs and "labels" in batch and "benchmark" not in batch:
            self.rows.add(batch, outputs["rewards"])

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gather the pairs of all ranks, and show them on the first one. Collective: every rank must call it."""
        if trainer.sanity_checking or not trainer.loggers:
            return
        pairs = self.rows.gathered()
        if pairs is None or not (media := media_of(trainer)):
            return
        for i, name in enumerate(DIMENSIONS):
            media.histogram(f"val/rewards/{name}", pairs.rewards[:, :, i].flatten().numpy())
        found = {
            name: confusion(pairs.labels[:, i], pairs.margins[:, i])
            for i, name in enumerate(DIMENSIONS)
            if not pairs.labels[:, i].isnan().all()
        }
        if found:
            media.figure("val/confusion", confusion_chart(found))
            media.table("val/confusion", *confusion_table(found))
        if sources := source_accuracies(pairs):
            media.table("val/sources", *source_table(sources))
        self._clips(trainer, media, pairs, require(pl_module, ScoresPairs, "callbacks.RewardReport").theta)

    def _clips(self, trainer: L.Trainer, media: Media, pairs: HeldOut, theta: float) -> None:
        """Decode and show the pairs at both ends of the order."""
        mistakes, agreements = surprises(pairs, theta)
        chosen = {"mistakes": mistakes[: self.mistakes], "agreements": agreements[: self.agreements]}
        numbers = [number for part in chosen.values() for number in part]
        if not numbers:
            return
        data = require(trainer.datamodule, HasExamples, "callbacks.RewardReport")
        videos = iter(data.find_pairs([pairs.keys[number] for number in numbers]))
        for kind, part in chosen.items():
            for place, number in enumerate(part, 1):
                clip = rated_clip(next(videos), pairs.rewards[number], theta, self.fps, self.height)
                media.clip(f"val/{kind}/{place}", clip)


def confusion_table(found: dict[str, Confusion]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of all confusion matrices.

    Args:
        found: Confusion matrices by dimension.
    """
    head = ["", "people said", *(f"model says {word}" for word in OUTCOMES), "tie threshold", "accuracy with ties"]
    rows = []
    for name, (threshold, counts) in found.items():
        accuracy = counts.diagonal().sum() / counts.sum()
        edge = "no ties" if threshold < 0 else f"{threshold:.4g}"
        for word, row in zip(OUTCOMES, counts.tolist()):
            rows.append([name, word, *map(str, row), edge, f"{accuracy:.3f}"])
    return head, rows


def confusion_chart(found: dict[str, Confusion]) -> Figure:
    """A panel per dimension; the shade of a field is its share of the pairs with that label.

    Args:
        found: Confusion matrices by dimension.
    """
    figure, axes = panels(len(found), (3.2 * len(found), 3.4))
    for axis, (name, (threshold, counts)) in zip(axes, found.items()):
        shares = (counts / counts.sum(1, keepdim=True)).nan_to_num().numpy()
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for row in range(3):
            for column in range(3):
                colour = "white" if shares[row, column] > 0.6 else "black"
                axis.text(column, row, int(counts[row, column]), ha="center", va="center", color=colour)
        edge = "no predicted ties" if threshold < 0 else f"tie where |margin| ≤ {threshold:.3g}"
        axis.set(title=f"{name}: {edge}", xlabel="model says")
        axis.title.set_fontsize(9)
        axis.set_xticks(range(3), OUTCOMES)
        axis.set_yticks(range(3), OUTCOMES)
    axes[0].set_ylabel("people said")
    return figure


def source_table(found: dict[str, list[tuple[float, int]]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of accuracies per pair of sources.

    Args:
        found: Accuracy and number of decided pairs per dimension, by pair of sources.
    """
    head = ["sources", *(title for name in DIMENSIONS for title in (name, f"decided in {name}"))]
    rows = [
        [name, *(cell for accuracy, count in row for cell in (_share(accuracy), str(count)))]
        for name, row in list(found.items())[:MOST_SOURCES]
    ]
    if len(found) > MOST_SOURCES:
        rows.append([f"and {len(found) - MOST_SOURCES} more", *[""] * (len(head) - 1)])
    return head, rows


def _share(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"
