"""Checks that nothing with NaN or infinity is written: later a NaN in a weight looks like any other number."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .. import VideoAlignError

WEIGHTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes that weights in files may have."""
NOT_WRITTEN = "nothing is written; export an earlier checkpoint"
"""The remedy for weights that are to be exported."""


def plain(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor consists of: itself, or the numbers and scales of a quantised one."""
    if hasattr(tensor, "__tensor_flatten__") and not isinstance(tensor, DTensor):  # torchao's
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain(getattr(tensor, name))
        return
    yield tensor.detach()
    if state := getattr(tensor, "quant_state", None):  # bitsandbytes, 4 bits
        yield from state.as_dict(packed=True).values()
    elif (scales := getattr(tensor, "SCB", None)) is not None:  # bitsandbytes, 8 bits
        yield scales


def is_finite(tensor: Tensor) -> bool:
    """Whether no value of a tensor is NaN or infinite. The smallest and the largest value show it, without a copy."""
    parts = list(plain(tensor))
    if len(parts) > 1:
        return all(is_finite(part) for part in parts)
    (tensor,) = parts
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # torch compares no numbers of 8 bits
    low, high = (tensor.float() if tensor.element_size() == 1 else tensor).aminmax()
    return bool(torch.isfinite(low) and torch.isfinite(high))


def require_finite(what: str, rows: Mapping[str, Tensor], remedy: str) -> None:
    """Refuse tensors if one of them is not finite.

    Args:
        what: Plural noun for the tensors, for the message, such as "latents of sampled videos".
        rows: Tensors by name: a key, a prompt or a tensor's own name.
        remedy: What the user can do about it, as the last words of the message.

    Raises:
        VideoAlignError: Where a tensor holds NaN or infinity; names the first ones.
    """
    if bad := [name for name, tensor in rows.items() if not is_finite(tensor)]:
        raise VideoAlignError(
            f"{what} are not finite: {len(bad)} tensors hold NaN or infinity, such as {bad[:3]}; {remedy}"
        )


def require_weights(where: str, tensors: Mapping[str, Tensor], remedy: str) -> None:
    """Refuse tensors that are quantised or not finite: torch would cast fp8 or int8 numbers without their scales.

    Args:
        where: File or folder that holds the tensors, for the message.
        tensors: Tensors by name.
        remedy: What the user can do about it, as the last words of the message.

    Raises:
        VideoAlignError: Where a tensor has a dtype outside :data:`WEIGHTS`, or holds NaN or infinity.
    """
    if foreign := [name for name, tensor in tensors.items() if tensor.dtype not in WEIGHTS]:
        raise VideoAlignError(
            f"{where}: {len(foreign)} of {len(tensors)} tensors are quantised or no weights, such as {foreign[0]!r} "
            f"({tensors[foreign[0]].dtype}); float32, bfloat16 and float16 are read"
        )
    require_finite(f"{where}: its tensors", tensors, remedy)


def by_name(names: Sequence[str], batch: Tensor) -> dict[str, Tensor]:
    """Give the rows of a batch by the names of its samples, for :func:`require_finite`."""
    return dict(zip(names, batch, strict=True))
