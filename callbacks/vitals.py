"""Speed, memory, gradient norms and learning rates of a training."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

UNDECAYED = "_undecayed"
"""Ending of the name of an optimizer's group that holds those tensors of another group that do not decay."""


class Vitals(L.Callback):
    """Logs what tells whether a training is well, under ``vitals/``, at the steps that the trainer logs.

    - ``samples_per_second``: Samples of all ranks that trained since the last logged step, by the time from asking for
      a batch to the end of its step. Validation and the writing of checkpoints are not part of it.
    - ``data_wait_share``: Share of that time in which a rank waited for a batch.
    - ``gpu_memory_gib``: Largest memory of a GPU that was allocated at once since the last logged step.
    - ``grad_norm/all`` and ``grad_norm/GROUP``: Norm of the gradient of the whole step before clipping, of all
      parameters and of each named group of the optimizer. It is left out under strategies that flatten their shards
      (FSDP1, DeepSpeed).
    - ``learning_rate/GROUP``: Learning rate of the step; ``learning_rate`` where the optimizer has one group.
    """

    def __init__(self) -> None:
        self._window = _Window()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to measure the time in which the loop waits for data."""
        self._window = _Window()
        if trainer.loggers:
            loop = trainer.fit_loop.epoch_loop  # it hands these two to the fetcher of batches at every epoch
            loop._on_before_fetch = _after(loop._on_before_fetch, self._ask)
            loop._on_after_fetch = _after(loop._on_after_fetch, self._get)
            _reset_peak(pl_module)

    def _ask(self) -> None:
        self._window.asked = time.perf_counter()

    def _get(self) -> None:
        self._window.got = time.perf_counter()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Log gradient norms and learning rates of a step that is logged. Collective where weights are sharded."""
        if not trainer.loggers or not trainer._logger_connector.should_update_logs:
            return
        rates = learning_rates(optimizer)
        if len(rates) == 1:
            rates = {"": next(iter(rates.values()))}
        values: dict[str, Any] = {f"learning_rate/{name}".rstrip("/"): rate for name, rate in rates.items()}
        if not isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
            norms = gradient_norms(optimizer)
            values |= {f"grad_norm/{name}": norm for name, norm in norms.items() if len(norms) > 2 or name == "all"}
        _log(pl_module, values)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add a batch to the window, and log the window at the end of a step that is logged. Collective there."""
        if not trainer.loggers:
            return
        self._window.add(samples_of(batch))
        if trainer.fit_loop._should_accumulate() or not trainer._logger_connector.should_update_logs:
            return
        window, self._window = self._window, _Window()
        cuda = pl_module.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(pl_module.device) if cuda else 0
        _reset_peak(pl_module)
        row = torch.tensor([window.samples, window.seconds, window.waited, peak], dtype=torch.float)
        rows = pl_module.all_gather(row.to(pl_module.device)).reshape(-1, 4).cpu()
        samples, seconds, waited = rows[:, :3].sum(0).tolist()
        if not seconds:
            return
        values = {"data_wait_share": waited / seconds}
        if samples:
            values["samples_per_second"] = samples / (seconds / len(rows))
        if cuda:
            values["gpu_memory_gib"] = float(rows[:, 3].max()) / 2**30
        _log(pl_module, values)


class _Window:
    """Time and samples since the last logged step."""

    def __init__(self) -> None:
        self.samples, self.seconds, self.waited = 0, 0.0, 0.0
        self.asked = self.got = math.nan

    def add(self, samples: int) -> None:
        """Add the batch that was fetched last."""
        if math.isnan(self.got - self.asked):  # fetched before training began
            return
        self.samples += samples
        self.seconds += time.perf_counter() - self.asked
        self.waited += self.got - self.asked
        self.asked = self.got = math.nan


def _after(first: Callable[[], None], then: Callable[[], None]) -> Callable[[], None]:
    def both() -> None:
        first()
        then()

    return both


def _reset_peak(module: L.LightningModule) -> None:
    if module.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(module.device)


def _log(module: L.LightningModule, values: dict[str, Any]) -> None:
    for name, value in values.items():
        module.log(f"vitals/{name}", value, on_step=True, on_epoch=False, batch_size=1)


def samples_of(batch: Any) -> int:
    """Number of samples of a batch that trained: without padding, and without the stand-ins of unusable ones.

    A batch of another form than this package's counts as many as its first tensor has rows.
    """
    if isinstance(batch, dict) and "keys" in batch:
        return len(batch["keys"]) - len(batch.get("dropped", ()))
    values = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, list | tuple) else [batch]
    return next((len(value) for value in values if isinstance(value, Tensor) and value.ndim), 0)


def group_names(optimizer: Optimizer) -> list[str]:
    """Name of each group of an optimizer; groups that differ only in their weight decay share a name."""
    return [
        str(group.get("name", f"group{number}")).removesuffix(UNDECAYED)
        for number, group in enumerate(optimizer.param_groups)
    ]


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """Learning rate by the name of the group."""
    return {name: float(group["lr"]) for name, group in zip(group_names(optimizer), optimizer.param_groups)}


def gradient_norms(optimizer: Optimizer) -> dict[str, Tensor]:
    """Norm of the gradient of ``all`` parameters, and of each named group. Collective where weights are sharded.

    Args:
        optimizer: Optimizer whose parameters have their gradients.

    Returns:
        Norms (scalars) by name.
    """
    grads: dict[str, list[Tensor]] = {}
    for name, group in zip(group_names(optimizer), optimizer.param_groups):
        grads.setdefault(name, []).extend(p.grad for p in group["params"] if p.grad is not None)
    norms = {name: _norm(members) for name, members in grads.items() if members}
    if not norms:
        return {}
    return {"all": torch.stack([norm.double() for norm in norms.values()]).norm().float(), **norms}


def _norm(grads: Sequence[Tensor]) -> Tensor:
    """Norm over tensors, some of which may be sharded."""
    parts = [[g for g in grads if isinstance(g, DTensor) == sharded] for sharded in (False, True)]
    norms = [nn.utils.get_total_norm(part).float() for part in parts if part]
    return torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
