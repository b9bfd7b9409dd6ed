"""The precision of trained parameters: fp32, whatever the dtype of the frozen ones.

In bf16 a step of 1e-5 on a weight of 0.02 is less than half of the distance to the next number, and vanishes.
"""

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


def train_in_float32(module: nn.Module) -> None:
    """Convert every parameter that trains to fp32, in place; frozen ones keep their dtype.

    Call it after adapters were added, and before an optimizer is built or the module is sharded. Adapters of peft cast
    their input, but not in vain (:func:`adapter_input`), and return the dtype of the layer that they adapt. Other
    layers in which fp32 parameters train beside frozen ones of another dtype need :func:`cast_inputs`, or must be fp32
    as a whole.

    Args:
        module: Module with trained and frozen parameters.
    """
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for layer in module.modules():
        if isinstance(layer, BaseTunerLayer):
            layer._cast_input_dtype = adapter_input  # peft's own switch is on or off, with and without autocast


def adapter_input(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The input of an adapter in the adapter's dtype, except where autocast computes in the input's dtype anyway.

    Autocast would cast such a copy back, and each adapter would keep a copy of its own for the backward pass, where the
    adapters of queries, keys and values have one input.

    Args:
        x: Input of the layer that is adapted.
        dtype: Dtype of the adapter's weights.
    """
    if x is None or (torch.is_autocast_enabled(x.device.type) and x.dtype == torch.get_autocast_dtype(x.device.type)):
        return x
    return x.to(dtype)


def cast_inputs(module: nn.Module) -> None:
    """Let a module that trains in fp32 accept the output of a frozen one of another dtype, with and without autocast.

    Args:
        module: Module whose floating-point inputs are cast to the dtype of its parameters.
    """

    def to_own_dtype(module: nn.Module, arguments: tuple) -> tuple:
        dtype = next(module.parameters()).dtype
        return tuple(a.to(dtype) if isinstance(a, Tensor) and torch.is_floating_point(a) else a for a in arguments)

    module.register_forward_pre_hook(to_own_dtype)
