"""The parts of a model, when training begins: parameters, how many of them train, dtype, device."""

import sys

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelSummary
from torch import nn

from .plots import text_table


class PartsSummary(ModelSummary):
    """Prints a line per part of the model to standard error: its parameters, those that train, and its dtypes."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the table, on the first rank."""
        if trainer.is_global_zero:
            print(f"{summary(pl_module)}\non {_where(trainer)}", file=sys.stderr, flush=True)


def summary(module: nn.Module) -> str:
    """A table of the parts that hold parameters. A model that is one part is taken apart once more."""
    parts, prefix = _parts(module), ""
    while len(parts) == 1 and len(inner := _parts(only := next(iter(parts.values())))) > 1:
        prefix, parts = f"{type(only).__name__}.", inner
    rows = [[f"{prefix}{name}", type(part).__name__, *_counts(part)] for name, part in parts.items()]
    if len(rows) > 1:
        rows.append(["all", type(module).__name__, *_counts(module)])
    return text_table(["part", "class", "parameters", "trained", "dtype"], rows)


def _parts(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module.named_children() if any(True for _ in child.parameters())}


def _counts(part: nn.Module) -> list[str]:
    parameters = list(part.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in parameters})
    return [short(sum(p.numel() for p in parameters)), short(trained) if trained else "-", ", ".join(dtypes)]


def short(number: float) -> str:
    """A count with three digits: 371 K, 1.24 M, 2.21 G."""
    units = ["", " K", " M", " G"]
    while number >= 999.5 and len(units) > 1:
        number, units = number / 1000, units[1:]
    return f"{number:.3g}{units[0]}"


def _where(trainer: L.Trainer) -> str:
    """Devices and precision: ``8 x NVIDIA H100, bf16-mixed``."""
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    count = f"{trainer.world_size} x " if trainer.world_size > 1 else ""
    return f"{count}{name}, precision {trainer.precision}"
