"""A reliability diagram at each validation: do outcomes come true as often as they were said to be probable?"""

import lightning as L
import torch
from matplotlib.figure import Figure

from ..datamodules.contracts import HasCalibration, require
from ..models.dimensions import DIMENSIONS
from ..models.metrics import Calibration, Reliability
from .plots import BLUE, GREY, panels
from .run_media import media_of


class ReliabilityDiagram(L.Callback):
    """Draws, per dimension, how often outcomes came true against how probable they were said to be."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a module that does not calibrate probabilities."""
        if stage in ("fit", "validate"):
            self._calibration(pl_module)

    @staticmethod
    def _calibration(module: L.LightningModule) -> Calibration:
        return require(module, HasCalibration, "callbacks.ReliabilityDiagram").calibration

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compute on every rank, and draw on the first. Collective: every rank must call it."""
        calibration = self._calibration(pl_module)
        if trainer.sanity_checking:
            return
        # of a rank whose batches were all unusable, the others have some
        updated = torch.tensor(float(calibration.update_called), device=pl_module.device)
        if not trainer.strategy.reduce(updated, reduce_op="sum"):
            return
        reliability = calibration.compute()
        if media := media_of(trainer):
            media.figure("val/reliability", diagram(reliability))


def diagram(reliability: Reliability) -> Figure:
    """A panel per dimension; the area of a point is the share of forecasts in its bin."""
    figure, axes = panels(len(DIMENSIONS), (10, 3.6))
    for axis, name, count, forecast, frequency, error in zip(axes, DIMENSIONS, *(t.cpu() for t in reliability[:4])):
        axis.plot([0, 1], [0, 1], color=GREY, linewidth=0.8)
        axis.plot(forecast, frequency, color=BLUE, linewidth=1)
        axis.scatter(forecast, frequency, s=400 * count / count.sum().clamp(min=1), color=BLUE, alpha=0.7)
        axis.set(title=f"{name}: calibration error {error:.3f}", xlabel="predicted probability")
        axis.set(xlim=(0, 1), ylim=(0, 1))
    axes[0].set_ylabel("frequency")
    return figure
