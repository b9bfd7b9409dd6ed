"""Nothing that is not finite is written: one NaN in a video, a reward or a weight looks like any other number later on."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .. import VideoAlignError

WEIGHTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes that a weight may have in a file."""
NOT_WRITTEN = "nothing is written; export an earlier checkpoint"
"""The remedy for weights that are to be exported."""


def is_finite(tensor: Tensor) -> bool:
    """Whether no value of a tensor is NaN or infinite. It makes no copy: the smallest and the largest value tell."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = tensor.detach().aminmax()
    return bool(torch.isfinite(low) and torch.isfinite(high))


def require_finite(what: str, rows: Mapping[str, Tensor], remedy: str) -> None:
    """Refuse tensors of which one is not finite.

    Args:
        what: What the tensors are, for the message: "latents of sampled videos".
        rows: Tensors by name: a key, a prompt or a tensor's own name.
        remedy: What the user can do about it, as the message's last words.

    Raises:
        VideoAlignError: where a tensor holds NaN or infinity; names the first ones.
    """
    if bad := [name for name, tensor in rows.items() if not is_finite(tensor)]:
        raise VideoAlignError(
            f"{what} are not finite: {len(bad)} tensors hold NaN or infinity, such as {bad[:3]}; {remedy}"
        )


def require_weights(where: str, tensors: Mapping[str, Tensor], remedy: str) -> None:
    """Refuse tensors that are no unquantised, finite weights: torch would cast fp8 or int8 numbers without their scales.

    Args:
        where: File or folder that holds the tensors, for the message.
        tensors: Tensors by name.
        remedy: What the user can do about it, as the message's last words.

    Raises:
        VideoAlignError: at the first tensors of another dtype, or that hold NaN or infinity.
    """
    if foreign := [name for name, tensor in tensors.items() if tensor.dtype not in WEIGHTS]:
        raise VideoAlignError(
            f"{where}: {len(foreign)} of {len(tensors)} tensors are quantised or no weights, such as {foreign[0]!r} "
            f"({tensors[foreign[0]].dtype}); float32, bfloat16 and float16 are read"
        )
    require_finite(f"{where}: its tensors", tensors, remedy)


def by_name(names: Sequence[str], batch: Tensor) -> dict[str, Tensor]:
    """Rows of a batch by the names of its samples, for :func:`require_finite`."""
    return dict(zip(names, batch, strict=True))
