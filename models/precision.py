"""The precision of trained parameters: fp32, whatever the dtype of the frozen ones.

In bf16 a step of 1e-5 on a weight of 0.02 is less than half of the distance to the next number, and vanishes.
"""

import torch
from torch import Tensor, nn


def train_in_float32(module: nn.Module) -> None:
    """Convert every parameter that trains to fp32, in place; frozen ones keep their dtype.

    Call it after adapters were added, and before an optimizer is built or the module is sharded. Adapters of peft cast
    their input, and return the dtype of the layer that they adapt. Other layers in which fp32 parameters train beside
    frozen ones of another dtype need :func:`cast_inputs`, or must be fp32 as a whole.

    Args:
        module: Module with trained and frozen parameters.
    """
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.float()


def cast_inputs(module: nn.Module) -> None:
    """Let a module that trains in fp32 accept the output of a frozen one of another dtype, with and without autocast.

    Args:
        module: Module whose floating-point inputs are cast to the dtype of its parameters.
    """

    def to_own_dtype(module: nn.Module, arguments: tuple) -> tuple:
        dtype = next(module.parameters()).dtype
        return tuple(a.to(dtype) if isinstance(a, Tensor) and torch.is_floating_point(a) else a for a in arguments)

    module.register_forward_pre_hook(to_own_dtype)
