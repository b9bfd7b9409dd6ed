"""Telling models apart by their weights."""

import hashlib
from collections.abc import Mapping

from torch import Tensor, nn


def fingerprint(model: nn.Module | Mapping[str, Tensor]) -> str:
    """A digest of names, shapes and the first values of every parameter; on any device the same.

    Names are told apart with and without the layers that adapters wrap.
    """
    digest = hashlib.sha256()
    for name, parameter in model.items() if isinstance(model, Mapping) else model.named_parameters():
        name = name.replace(".base_layer.", ".")
        values = parameter.detach().flatten()[:256].float().cpu().numpy()
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + values.tobytes())
    return digest.hexdigest()
