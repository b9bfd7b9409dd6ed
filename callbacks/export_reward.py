"""The trained reward model as a folder, when training ends."""

from pathlib import Path

import lightning as L
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from ..datamodules.contracts import HasBackbone, HasRewardNetwork, RewardNetwork, require
from ..models.files import check_free
from ..models.locks import Hold
from .tensorboard import folder_of


class ExportReward(L.Callback):
    """Writes the network's folder when fitting ends; `videoalign export` does so for a checkpoint.

    Args:
        out: folder to write; an earlier reward model there is replaced, anything else refused before training begins.
            ``export`` in the run's folder if not given (nothing is written without a logger).
        backbone: copy the backbone along, so that the folder stands on its own. For miniature backbones.
    """

    def __init__(self, out: str | None = None, backbone: bool = False) -> None:
        self.out, self.backbone = out, backbone
        self._hold = Hold()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Hold the output until it is written; refuse one that is in the way."""
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
        """Gather what is sharded (collective), write on the first rank."""
        network = self._network(pl_module)
        state = get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        run = folder_of(trainer)  # collective
        if trainer.is_global_zero and (out := Path(self.out) if self.out else run and run / "export"):
            network.save_pretrained(out, state, **({"backbone": True} if self.backbone else {}))
        self._hold.drop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let other runs write the folder."""
        self._hold.drop()
