"""The tuned generator in diffusers' own format, when training ends."""

from pathlib import Path
from typing import Any

import lightning as L
from diffusers.training_utils import _collate_lora_metadata
from peft import get_peft_model_state_dict
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from .. import VideoAlignError
from ..models.files import check_free, new_folder
from ..models.locks import Hold
from .tensorboard import folder_of

LORA_FILE = "pytorch_lora_weights.safetensors"


class ExportGenerator(L.Callback):
    """Writes adapters that ``pipe.load_lora_weights(folder)`` reads in plain diffusers, or a fully trained transformer's
    folder for ``WanPipeline.from_pretrained(..., transformer=...)`` (name the class: ``DiffusionPipeline`` ignores it).

    Args:
        out: folder to write; an earlier export there is replaced, anything else refused before training begins.
            ``export`` in the run's folder if not given (nothing is written without a logger).
        pipeline: write the whole pipeline folder, with the fully trained transformer in it.
    """

    def __init__(self, out: str | None = None, pipeline: bool = False) -> None:
        self.out, self.pipeline = out, pipeline
        self._hold = Hold()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Hold the output until it is written; refuse one that is in the way."""
        if self.out and stage == "fit":
            self._hold.take(self.out)
            check_free(self.out, self._record(pl_module))
        if self.pipeline and pl_module.lora:
            raise VideoAlignError("ExportGenerator.pipeline writes a fully trained transformer: set model.lora: null")

        if self.pipeline and self.out and Path(self.out).resolve() == Path(pl_module.name).resolve():
            raise VideoAlignError(
                f"ExportGenerator.out is the generator that is trained, {self.out}; name another folder"
            )

    def _record(self, module: L.LightningModule) -> str:
        """The file by which a folder is known to be an earlier export."""
        return LORA_FILE if module.lora else "model_index.json" if self.pipeline else "config.json"

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gather what is sharded (collective), write on the first rank."""
        policy = pl_module.policy
        state = get_model_state_dict(policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        run = folder_of(trainer)  # collective
        out = Path(self.out) if self.out else run and run / "export"
        if trainer.is_global_zero and out:
            self._write(pl_module, policy, state, out)
        self._hold.drop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let other runs write the folder."""
        self._hold.drop()

    def _write(self, pl_module: L.LightningModule, policy: Any, state: dict[str, Any], out: Path) -> None:
        if pl_module.lora is None:
            whole = type(policy).from_config(policy.config)
            whole.load_state_dict(state, assign=True)
            with new_folder(out, replaces=self._record(pl_module)) as folder:
                if self.pipeline:
                    family = type(pl_module.generator.pipeline)
                    family.from_pretrained(pl_module.name, transformer=whole).save_pretrained(folder)
                else:
                    whole.save_pretrained(folder)
            return
        with new_folder(out, replaces=LORA_FILE) as folder:
            # with alpha and rank: without them diffusers would apply the update at scale 1
            type(pl_module.generator.pipeline).save_lora_weights(
                folder,
                transformer_lora_layers=get_peft_model_state_dict(policy, state),
                **_collate_lora_metadata({"transformer": policy}),
            )
