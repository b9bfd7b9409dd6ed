"""A digest of weights that identifies a model."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .finite import plain

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(model: nn.Module | Mapping[str, Tensor]) -> str:
    """Digest every parameter: its name, shape, first 256 values, and the exact sum of the bit patterns of all values.

    A sum of whole numbers does not depend on their order, so the digest is the same on every device. Layers that
    adapters wrap enter under their own names. Quantised parameters enter as their numbers and scales.

    Args:
        model: Module, or its parameters by name.

    Returns:
        SHA-256 as hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, parameter in model.items() if isinstance(model, Mapping) else model.named_parameters():
        for part in plain(parameter):
            bits = part.contiguous().view(_INTEGERS[part.element_size()])
            first = bits.flatten()[:256].to(torch.int64).cpu()
            total = int(bits.sum(dtype=torch.int64))
            digest.update(
                f"{name.replace('.base_layer.', '.')} {tuple(part.shape)} {total}".encode() + first.numpy().tobytes()
            )
    return digest.hexdigest()
