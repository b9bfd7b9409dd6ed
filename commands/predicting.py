"""Trainers that predict and nothing else: `score`, `bench`, `generate` and a reward model that judges run on one."""

import logging

import lightning as L
import torch

from .. import VideoAlignError
from ..callbacks.progress import Progress
from ..callbacks.stoppable import stoppable
from .devices import DEVICES
from .quiet import quiet


def predicting(
    device: str, callbacks: list[L.Callback], bar: bool, devices: int = 1, dtype: str = "float32"
) -> L.Trainer:
    """A trainer that predicts, and prints nothing of its own but a progress bar.

    Args:
        device: Where to compute: ``auto``, ``cpu`` or ``gpu``.
        callbacks: Callbacks of the run.
        bar: Whether to show how far it is.
        devices: Number of processes that share the work.
        dtype: Dtype of the weights. Where it is ``bfloat16``, a GPU computes all layers in it, as a training in
            bf16-mixed does; a CPU computes in the weights' own.
    """
    if device not in DEVICES:
        raise VideoAlignError(f"device must be {', '.join(DEVICES[:-1])} or {DEVICES[-1]}, got {device!r}")
    mixed = dtype == "bfloat16" and device != "cpu" and torch.cuda.is_available()
    quiet()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # the results are printed, and nothing else
    return stoppable(
        L.Trainer(
            accelerator=device,
            devices=devices,
            strategy="auto" if devices == 1 else "ddp",
            precision="bf16-mixed" if mixed else "32-true",
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            callbacks=[*([Progress()] if bar else []), *callbacks],
            enable_progress_bar=bar,
        )
    )
