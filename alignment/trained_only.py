"""Checkpoints that hold what trains; what is frozen stands in a folder already."""

from typing import Any

import lightning as L

from .. import VideoAlignError


class TrainedOnly(L.LightningModule):
    """Saves the tensors that train, and refuses a checkpoint that lacks one or has others.

    Sharded checkpoints keep everything: torch's loader wants every tensor of the sharded model.
    """

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False

    def trained_names(self) -> set[str]:
        """Names of the parameters that train, as in ``state_dict``."""
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what is frozen."""
        if self.device_mesh is None:
            trained = self.trained_names()
            checkpoint["state_dict"] = {n: t for n, t in checkpoint["state_dict"].items() if n in trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model."""
        if "state_dict" not in checkpoint:  # sharded: loaded, and checked, already
            return
        own, saved = self.state_dict(), checkpoint["state_dict"]
        want, known, found = self.trained_names(), own.keys(), saved.keys()
        if misshapen := [name for name in found & known if own[name].shape != saved[name].shape]:
            name = sorted(misshapen)[0]
            raise VideoAlignError(
                f"the checkpoint does not fit this model: {len(misshapen)} tensors have other shapes, such as {name}, "
                f"{tuple(saved[name].shape)} in place of {tuple(own[name].shape)}. Use the configuration that it was trained with."
            )
        if not want <= found <= known:
            raise VideoAlignError(
                f"the checkpoint does not fit this model: {len(want - found)} tensors are missing (such as {sorted(want - found)[:3]}), "
                f"{len(found - known)} are unexpected (such as {sorted(found - known)[:3]}). Use the configuration that it was trained with."
            )
