"""Export of the trained reward model as a folder, when training ends."""

from pathlib import Path

import lightning as L
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from ..datamodules.contracts import HasBackbone, HasRewardNetwork, RewardNetwork, require
from ..models.files import check_free
from ..models.locks import Hold
from .reports import Report, exported
from .run_folder import folder_of


class ExportReward(L.Callback):
    """Writes the reward model's folder when training ends; `videoalign export` writes one from a checkpoint.

    Args:
        out: Folder to write. An earlier reward model there is replaced, and anything else is refused before training
            begins. If not given, it is ``export`` in the run's folder, and without a logger nothing is written.
        backbone: Whether the backbone is copied into the folder, which then depends on no other; for small backbones.
    """

    def __init__(self, out: str | None = None, backbone: bool = False) -> None:
        self.out, self.backbone = out, backbone
        self._hold = Hold()
        self._written: Path | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Lock the output folder for this run, and refuse one that holds anything but a reward model."""
        if stage != "fit":
            return
        network = self._network(pl_module)
        if self.out:
            self._hold.take(self.out)
            check_free(self.out, network.record)

    def _network(self, module: L.LightningModule) -> RewardNetwork:
        network = require(module, HasRewardNetwork, "callbacks.ExportReward").network
        if self.backbone:
            return require(network, HasBackbone, "callbacks.ExportReward with backbone: true")
        return require(network, RewardNetwork, "callbacks.ExportReward")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gather the weights from all ranks and write them on the first. Collective: every rank must call it."""
        network = self._network(pl_module)
        state = get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        run = folder_of(trainer)  # collective
        if trainer.is_global_zero and (out := Path(self.out) if self.out else run and run / "export"):
            network.save_pretrained(out, state, **({"backbone": True} if self.backbone else {}))
            self._written = out
        self._hold.drop()

    def run_report(self, trainer: L.Trainer) -> Report:
        """The folder that was written."""
        return exported(self._written, trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Unlock the output folder."""
        self._hold.drop()
