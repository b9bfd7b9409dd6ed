"""Export of the tuned generator in diffusers' own format, when training ends."""

from pathlib import Path

import lightning as L
import torch
from peft import get_peft_model_state_dict
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from .. import VideoAlignError
from ..datamodules.contracts import TrainsTransformer, require
from ..models.checksums import seal
from ..models.files import check_free, new_folder
from ..models.finite import NOT_WRITTEN, require_finite
from ..models.generator_folder import files_of, read_index
from ..models.hub import resolved
from ..models.locks import Hold
from ..models.lora_dialects import save_adapters, stating
from ..models.lora_names import DIFFUSERS
from .reports import Report, exported
from .run_folder import folder_of

LORA_FILE = "pytorch_lora_weights.safetensors"
"""Name that diffusers gives to a file of LoRA adapters."""


class ExportGenerator(L.Callback):
    """Writes the trained weights as a folder that plain diffusers loads.

    LoRA adapters are written for ``pipe.load_lora_weights(folder)``. Those of the expert for low noise are for
    ``pipe.load_lora_weights(folder, load_into_transformer_2=True)``; the file states the expert. A fully trained
    transformer is written for ``WanPipeline.from_pretrained(..., transformer=...)``, or ``transformer_2=...`` of that
    expert (name the class: ``DiffusionPipeline`` ignores the argument). Weights that are not finite are refused. Files
    carry checksums, which are compared when they are loaded.

    Args:
        out: Folder to write. An earlier export there is replaced, and anything else is refused before training begins.
            If not given, it is ``export`` in the run's folder, and without a logger nothing is written.
        pipeline: Whether the whole pipeline is written, with the fully trained transformer in it.
    """

    def __init__(self, out: str | None = None, pipeline: bool = False) -> None:
        self.out, self.pipeline = out, pipeline
        self._hold = Hold()
        self._written: Path | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Lock the output folder for this run, and refuse one that holds anything but an earlier export."""
        if stage != "fit" and not self.pipeline:
            return
        module = require(pl_module, TrainsTransformer, "callbacks.ExportGenerator")
        if self.out and stage == "fit":
            self._hold.take(self.out)
            check_free(self.out, self._record(module))
        if self.pipeline and module.lora:
            raise VideoAlignError("ExportGenerator.pipeline writes a fully trained transformer: set model.lora: null")
        if self.pipeline and self.out and Path(self.out).resolve() == Path(module.name).resolve():
            raise VideoAlignError(
                f"ExportGenerator.out is the generator that is trained, {self.out}; name another folder"
            )

    def _record(self, module: TrainsTransformer) -> str:
        """The file by which a folder is known to be an earlier export."""
        return LORA_FILE if module.lora else "model_index.json" if self.pipeline else "config.json"

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gather what is sharded (collective), write on the first rank."""
        module = require(pl_module, TrainsTransformer, "callbacks.ExportGenerator")
        # of adapters nothing frozen: a copy of all weights would be made in the main memory for nothing
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=module.lora is not None)
        if getattr(
            module.policy, "hf_quantizer", None
        ):  # never sharded; bitsandbytes' layers state what they do not have
            trained = {name: p for name, p in module.policy.named_parameters() if p.requires_grad}
            state = {name: p.detach().cpu() for name, p in trained.items()}
        else:
            state = get_model_state_dict(module.policy, options=options)
        run = folder_of(trainer)  # collective
        out = Path(self.out) if self.out else run and run / "export"
        if trainer.is_global_zero and out:
            self._write(module, state, out)
            self._written = out
        self._hold.drop()

    def run_report(self, trainer: L.Trainer) -> Report:
        """The folder that was written."""
        return exported(self._written, trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Unlock the output folder."""
        self._hold.drop()

    def _write(self, module: TrainsTransformer, state: dict[str, Tensor], out: Path) -> None:
        require_finite(f"weights for {out}", state, NOT_WRITTEN)
        with new_folder(out, replaces=self._record(module)) as folder:
            if module.lora is None:
                self._write_whole(folder, module, state)
                for path in folder.rglob("*.safetensors"):
                    seal(path)
            else:
                self._write_adapters(folder, module, state)

    def _write_whole(self, folder: Path, module: TrainsTransformer, state: dict[str, Tensor]) -> None:
        with torch.device("meta"):  # the state's tensors take the place of its own
            whole = type(module.policy).from_config(module.policy.config)
        whole.load_state_dict(state, assign=True)
        if self.pipeline:
            trained = "transformer_2" if module.generator.expert == "low" else "transformer"
            others = [name for name, entry in read_index(module.name)[0].items() if isinstance(entry, list | tuple)]
            source = resolved(module.name, "folder of a generator", parts=files_of(others))
            type(module.generator.pipeline).from_pretrained(source, **{trained: whole}).save_pretrained(folder)
        else:
            whole.save_pretrained(folder)

    @staticmethod
    def _write_adapters(folder: Path, module: TrainsTransformer, state: dict[str, Tensor]) -> None:
        """Write adapters with alpha and rank, without which diffusers would apply them at scale 1, and their expert."""
        tensors = get_peft_model_state_dict(module.policy, state)
        settings = module.policy.peft_config["default"].to_dict()
        save_adapters(
            folder / LORA_FILE,
            {DIFFUSERS + name: tensor for name, tensor in tensors.items()},
            stating(settings, module.generator.expert),
        )
