"""Reference errors, computed once by a predict run; with them Flow-DPO trains without the reference's forward."""

from typing import Any, Literal

import torch
from torch import Tensor

from ..datamodules.contracts import SavesReference, require
from ..datamodules.data_ranks import merged
from ..models.flow import TimeLaw
from ..models.lora import LoRA
from ..models.memory import Memory
from .experts import Expert
from .flow_sft import ATTENTION, FlowSFT


class CacheReference(FlowSFT):
    """Computes the velocity errors of an untrained generator at fixed draws of noise and time.

    Run it by `videoalign predict` with :class:`~videoalign.datamodules.reference_errors.ReferenceDraws`; see
    experiments/reference. All arguments must be those of the training that will read the errors.

    Args:
        generator: Folder or hub id of a diffusers pipeline.
        times: Distribution of the training times.
        dtype: Dtype of the frozen weights.
        fps: Frame rate of the videos, where the family asks for it (LTX).
        family: Class of the generator's family, by import path (``package.module:Name``) or name; found by the
            pipeline's class if not given.
        expert: Which of two experts' errors are computed, ``high`` or ``low``.
        lora: Settings of the training's adapters, which matter where it goes on from some (``lora.start``): the
            reference has those.
        memory: How the weights are held and computed; quantised as in the training, or not at all.
    """

    def __init__(
        self,
        generator: str,
        times: TimeLaw = TimeLaw(),  # noqa: B008  frozen
        dtype: Literal["float32", "bfloat16"] = "float32",
        fps: float = 25.0,
        family: str | None = None,
        expert: Expert | None = None,
        lora: LoRA | None = LoRA(targets=ATTENTION),  # noqa: B008  never changed
        memory: Memory = Memory(),  # noqa: B008  frozen
    ) -> None:
        same = {"times": times, "dtype": dtype, "fps": fps, "family": family, "expert": expert, "memory": memory}
        super().__init__(generator, lora, gradient_checkpointing=True, **same)  # there is no backward pass
        self._errors: list[tuple[Tensor, Tensor]] = []
        self._made: dict[str, Any] = {}

    def setup(self, stage: str) -> None:
        """Refuse a DataModule that cannot write the cache."""
        super().setup(stage)
        if stage == "predict":
            self._draws()

    def _draws(self) -> SavesReference:
        return require(self.trainer.datamodule, SavesReference, type(self).__name__)

    def on_predict_start(self) -> None:
        """Forget the errors of an earlier run, and note what they depend on before a forward pass packs weights."""
        self._errors, self._made = [], self.reference_made()

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Compute the errors (S, N) of a batch of draws; a few bytes each, they stay in memory until the end."""
        if not batch["items"]:
            return
        with self.as_reference() as net:
            errors, _ = self.errors(batch["latents"], batch["seeds"], batch["conditions"], net)
        self._errors.append((torch.tensor(batch["items"]), errors.T.cpu()))

    def on_predict_end(self) -> None:
        """Gather the errors of all ranks and write the cache. Collective."""
        rows = [row for items, errors in self._errors for row in zip(items.tolist(), errors.tolist())]
        table = merged({tuple(map(int, item)): errors for item, errors in rows})
        if self.trainer.is_global_zero:
            self._draws().save(table, self._made)
