"""Trainers that predict and nothing else: `score`, `bench`, `generate` and a reward model that judges run on one."""

import logging
import os
from typing import NoReturn

import lightning as L
import torch

from .. import VideoAlignError
from ..callbacks.progress import Progress
from ..callbacks.stoppable import stoppable
from ..models.locks import first_process
from .devices import DEVICES, supported
from .quiet import quiet


def predicting(
    device: str, callbacks: list[L.Callback], bar: bool, devices: int = 1, dtype: str = "float32"
) -> L.Trainer:
    """A trainer that predicts, and prints nothing of its own but a progress bar.

    Under torchrun the work is shared by the processes of all nodes.

    Args:
        device: Where to compute: ``auto``, ``cpu`` or ``gpu``.
        callbacks: Callbacks of the run.
        bar: Whether to show how far it is.
        devices: Number of processes that share the work; where torchrun has started them, their number on each node.
        dtype: Dtype of the weights. Where it is ``bfloat16``, a GPU computes all layers in it, as a training in
            bf16-mixed does; a CPU computes in the weights' own.
    """
    if device not in DEVICES:
        raise VideoAlignError(f"device must be {', '.join(DEVICES[:-1])} or {DEVICES[-1]}, got {device!r}")
    nodes, devices = _nodes(devices)
    mixed = dtype == "bfloat16" and device != "cpu" and torch.cuda.is_available()
    quiet()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # the results are printed, and nothing else
    trainer = L.Trainer(
        accelerator=device,
        devices=devices,
        num_nodes=nodes,
        strategy="auto" if nodes * devices == 1 else "ddp",
        precision="bf16-mixed" if mixed else "32-true",
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[*([Progress()] if bar else []), *callbacks],
        enable_progress_bar=bar,
    )
    return stoppable(supported(trainer))


def _nodes(devices: int) -> tuple[int, int]:
    """Number of nodes, and of processes on each: what torchrun says, or else one node.

    Args:
        devices: Number of processes that the user asks for; 1 by default.
    """
    if not torch.distributed.is_torchelastic_launched():
        return 1, devices
    nodes, each = int(os.environ["GROUP_WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if devices not in (1, each):
        _refuse(f"devices is {devices}, but torchrun has started {each} on each node: leave it out, or start as many")
    return nodes, each


def alone(command: str) -> None:
    """Refuse several processes of torchrun, for a command that one process does.

    Args:
        command: Name of the command, for the message.

    Raises:
        VideoAlignError: Where torchrun has started more than one.
    """
    if torch.distributed.is_torchelastic_launched() and (count := int(os.environ["WORLD_SIZE"])) > 1:
        _refuse(f"{command} works in one process, and torchrun has started {count}: start it by itself")


def _refuse(why: str) -> NoReturn:
    """End every process of torchrun; the first one says why."""
    if not first_process():
        raise SystemExit(2)
    raise VideoAlignError(why)
