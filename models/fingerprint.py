"""A digest of weights that identifies a model."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .finite import plain

_PIECE = 1 << 22
"""Number of values that are summed at once."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(model: nn.Module | Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """Digest every parameter: its name, shape, first 256 values, and the exact sum of the bit patterns of all values.

    A sum of whole numbers does not depend on their order, so the digest is the same on every device. Layers that
    adapters wrap enter under their own names. Quantised parameters enter as their numbers and scales, sharded ones as
    the whole that they are part of, which is collective.

    Args:
        model: Module, or its parameters by name.
        dtype: Dtype that each parameter is rounded to before; its own if not given.

    Returns:
        SHA-256 as hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, parameter in model.items() if isinstance(model, Mapping) else model.named_parameters():
        for part in plain(parameter):
            part = part.full_tensor() if isinstance(part, DTensor) else part
            part = part if dtype is None else part.to(dtype)
            bits = part.contiguous().view(_INTEGERS[part.element_size()])
            first = bits.flatten()[:256].to(torch.int64).cpu()
            # in pieces, since torch converts what it sums to int64 first: four times the memory of bf16
            total = _wrapped(sum(int(piece.sum(dtype=torch.int64)) for piece in bits.flatten().split(_PIECE)))
            digest.update(
                f"{name.replace('.base_layer.', '.')} {tuple(part.shape)} {total}".encode() + first.numpy().tobytes()
            )
    return digest.hexdigest()


def _wrapped(value: int) -> int:
    """A whole number as an int64 holds it."""
    return (value + 2**63) % 2**64 - 2**63
