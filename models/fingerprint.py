"""Telling models apart by their weights."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(model: nn.Module | Mapping[str, Tensor]) -> str:
    """A digest of every parameter: name, shape, first values, and the exact sum of all values' bit patterns.

    Whole numbers add up the same in any order, so it is the same on any device. Layers that adapters wrap count under
    their own names.
    """
    digest = hashlib.sha256()
    for name, parameter in model.items() if isinstance(model, Mapping) else model.named_parameters():
        bits = parameter.detach().contiguous().view(_INTEGERS[parameter.element_size()])
        first = bits.flatten()[:256].to(torch.int64).cpu()
        total = int(bits.sum(dtype=torch.int64))
        digest.update(
            f"{name.replace('.base_layer.', '.')} {tuple(parameter.shape)} {total}".encode() + first.numpy().tobytes()
        )
    return digest.hexdigest()
