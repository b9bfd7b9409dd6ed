"""The precision of what trains, decided in one place: fp32, whatever the dtype of what is frozen beside it.

In bf16 a step of 1e-5 on a weight of 0.02 is less than half of the distance to the next number, and vanishes.
"""

import torch
from torch import Tensor, nn


def train_in_float32(module: nn.Module) -> None:
    """Make every parameter that trains fp32, in place; frozen ones keep their dtype.

    Call it after adapters were added and before an optimizer is built or the module is sharded. Adapters of peft cast
    their input and give back the dtype of the layer that they stand beside; other layers in which fp32 parameters train
    beside frozen ones of another dtype need :func:`cast_inputs`, or to be fp32 as a whole.
    """
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.float()


def cast_inputs(module: nn.Module) -> None:
    """Let a module that trains in fp32 take the output of a frozen one of another dtype, in and outside of autocast."""

    def to_own_dtype(module: nn.Module, arguments: tuple) -> tuple:
        dtype = next(module.parameters()).dtype
        return tuple(a.to(dtype) if isinstance(a, Tensor) and torch.is_floating_point(a) else a for a in arguments)

    module.register_forward_pre_hook(to_own_dtype)
