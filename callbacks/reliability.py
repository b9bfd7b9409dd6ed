"""Are predicted probabilities what they say? A reliability diagram at each validation."""

import lightning as L
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from ..datamodules.contracts import HasCalibration, require
from ..models.dimensions import DIMENSIONS
from ..models.metrics import Calibration, Reliability
from .tensorboard import writer_of


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
        """Compute on every rank, draw on the first."""
        calibration = self._calibration(pl_module)
        if trainer.sanity_checking or not calibration.update_called:
            return
        reliability = calibration.compute()
        if writer := writer_of(trainer):
            writer.add_figure("val/reliability", diagram(reliability), trainer.global_step)


def diagram(reliability: Reliability) -> Figure:
    """One panel per dimension; the area of a point is the share of forecasts in its bin."""
    figure, axes = plt.subplots(1, len(DIMENSIONS), figsize=(10, 3.6), sharey=True, layout="constrained")
    for axis, name, count, forecast, frequency, error in zip(axes, DIMENSIONS, *(t.cpu() for t in reliability[:4])):
        axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        axis.plot(forecast, frequency, color="#4878a8", linewidth=1)
        axis.scatter(forecast, frequency, s=400 * count / count.sum().clamp(min=1), color="#4878a8", alpha=0.7)
        axis.set(
            title=f"{name}: calibration error {error:.3f}", xlabel="predicted probability", xlim=(0, 1), ylim=(0, 1)
        )
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("frequency")
    return figure
