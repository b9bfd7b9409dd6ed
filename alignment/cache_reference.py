"""Reference errors, computed once: a predict run whose result trains Flow-DPO without a second forward."""

from typing import Any, Literal

import torch
from torch import Tensor

from ..models.flow import TimeLaw
from .flow_sft import FlowSFT


class CacheReference(FlowSFT):
    """Errors of a generator as it is, at fixed draws; see :mod:`~videoalign.datamodules.reference_errors` and experiments/reference.

    Args:
        generator, times, dtype, fps: as the training will have them.
    """

    def __init__(
        self,
        generator: str,
        times: TimeLaw = TimeLaw(),  # noqa: B008  frozen
        dtype: Literal["float32", "bfloat16"] = "float32",
        fps: float = 25.0,
    ) -> None:
        super().__init__(generator, times=times, dtype=dtype, fps=fps)
        self._errors: list[tuple[Tensor, Tensor]] = []

    def on_predict_start(self) -> None:
        """Forget an earlier run."""
        self._errors = []

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """(S, N) errors of a batch of draws, kept for the end: a few bytes each."""
        if not batch["items"]:
            return
        with self.as_reference() as net:
            errors, _ = self.errors(batch["latents"], batch["seeds"], batch["prompts"], net)
        self._errors.append((torch.tensor(batch["items"]), errors.T.cpu()))

    def on_predict_end(self) -> None:
        """Gather and write. Collective."""
        items, errors = (
            (torch.cat(column) for column in zip(*self._errors))
            if self._errors
            else (torch.empty(0, 2), torch.empty(0, 2))
        )
        gathered: list[Any] = [None] * self.trainer.world_size
        if self.trainer.world_size > 1:
            torch.distributed.all_gather_object(gathered, (items.tolist(), errors.tolist()))
        else:
            gathered = [(items.tolist(), errors.tolist())]
        if self.trainer.is_global_zero:
            table = {tuple(map(int, item)): row for part in gathered for item, row in zip(*part)}
            self.trainer.datamodule.save(table, self.reference_made())
