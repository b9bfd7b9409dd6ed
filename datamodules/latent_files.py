"""Tensors of a *latents* set on disk; :mod:`.latents` loads batches of them."""

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from .contents import ShardError

NULL = "null.safetensors"
OF = {"pairs": ("a", "b"), "videos": ("video",)}
"""Names of a sample's latents, by the kind of the videos; beside them is ``prompt``."""


def load_latents(content: bytes, name: str) -> dict[str, Tensor]:
    """Tensors of a sample by name.

    Args:
        content: Content of its safetensors file.
        name: What to call the sample in messages.

    Raises:
        ShardError: If the content is damaged, or holds other tensors, latents of two shapes or values that are not
            finite.
    """
    try:
        tensors = safetensors.torch.load(content)
    except SafetensorError as error:
        raise ShardError(f"{name} holds no latents ({error})") from None
    sides = next((sides for sides in OF.values() if tensors.keys() == {*sides, "prompt"}), None)
    if sides is None:
        raise ShardError(
            f"{name} holds {sorted(tensors)}, not latents of a pair (a, b) or of a video, with their prompt"
        )
    shapes = {tuple(tensors[side].shape) for side in sides}
    if len(shapes) > 1 or any(tensors[side].ndim != 4 for side in sides) or tensors["prompt"].ndim != 2:
        raise ShardError(f"{name}: latents of shapes {sorted(shapes)} do not make a pair")
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ShardError(f"{name} holds NaN or infinity")
    return tensors
