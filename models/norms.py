"""Normalisation in a generator's transformer, in the dtype of what is normalised."""

from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn


def keep_dtype_in_norms(network: nn.Module) -> None:
    """Let the RMS norms of a transformer return the dtype that they are given, in place.

    With weights in fp32 some give fp32: diffusers' own, and since torch 2.12 all of them under autocast on a GPU.
    Queries and keys, which pass norms, would then be fp32 beside values in bf16, which flash kernels and the backward
    pass of context parallelism refuse.

    Args:
        network: Transformer of diffusers.
    """
    for module in network.modules():
        if isinstance(module, nn.RMSNorm | RMSNorm):
            module.register_forward_hook(_as_given)


def _as_given(norm: nn.Module, arguments: tuple, out: Tensor) -> Tensor:
    return out.to(arguments[0].dtype)
