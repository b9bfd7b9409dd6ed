"""Tensors of a *latents* set on disk; :mod:`.latents` loads batches of them.

Beside a sample's latents (:data:`OF`) stand the tensors that it is conditioned on: ``prompt`` (L, E) and further
encodings of the prompt, whose names begin with ``prompt_``; of image-to-video also ``image`` (C, F', H, W), and perhaps
``image_embeds`` (L, E).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from .. import VideoAlignError
from .contents import ShardError

if TYPE_CHECKING:  # it imports diffusers, which readers of sets do without
    from ..models.family import Encoded

NULL = "null.safetensors"
OF = {"pairs": ("a", "b"), "videos": ("video",)}
"""Names of a sample's latents, by the kind of the videos."""
IMAGE = ("image", "image_embeds")
"""Names of the encodings of an image."""
Sources = Literal["file", "first_frame"]
"""Where the images of encoded samples came from, as the index states it under ``images``: the samples' own files, or
the first frames of the videos."""


def conditions_of(tensors: Mapping[str, Tensor]) -> "Encoded":
    """What a sample is conditioned on: its tensors without the latents of its videos.

    Args:
        tensors: All tensors of a sample by name.
    """
    return {name: tensor for name, tensor in tensors.items() if name in IMAGE or _of_prompt(name)}


def _of_prompt(name: str) -> bool:
    return name == "prompt" or name.startswith("prompt_")


def check_images(stored: Mapping[str, Any], image: str, name: str) -> bool:
    """Refuse latents with images for a generator that takes none, and those without for one that needs them.

    Args:
        stored: Settings of the latents, from the index.
        image: Whether the generator's samples have an image: none, optional or required.
        name: What to call the set in messages.

    Returns:
        Whether the latents have images.

    Raises:
        VideoAlignError: If set and generator do not fit.
    """
    has = stored.get("images") is not None
    if has and image == "none":
        raise VideoAlignError(
            f"{name} holds latents of image-to-video samples, but this generator makes videos of prompts alone; encode "
            "the videos without images (data.images: none), or name an image-to-video pipeline"
        )
    if not has and image == "required":
        raise VideoAlignError(
            f"{name} holds latents without images, but this generator begins every video with one; encode the videos "
            "with this generator, which stores an image beside each sample"
        )
    return has


def load_latents(content: bytes, name: str) -> dict[str, Tensor]:
    """Tensors of a sample by name.

    Args:
        content: Content of its safetensors file.
        name: What to call the sample in messages.

    Raises:
        ShardError: If the content is damaged, or holds other tensors, latents of two shapes, an image of another size
            or values that are not finite.
    """
    try:
        tensors = safetensors.torch.load(content)
    except SafetensorError as error:
        raise ShardError(f"{name} holds no latents ({error})") from None
    others = tensors.keys() - conditions_of(tensors).keys()
    sides = next((sides for sides in OF.values() if others == {*sides}), None)
    if sides is None or "prompt" not in tensors:
        raise ShardError(
            f"{name} holds {sorted(tensors)}, not latents of a pair (a, b) or of a video, with their prompt"
        )
    shapes = {tuple(tensors[side].shape) for side in sides}
    if len(shapes) > 1 or any(tensors[side].ndim != 4 for side in sides) or tensors["prompt"].ndim != 2:
        raise ShardError(f"{name}: latents of shapes {sorted(shapes)} do not make a pair")
    if (image := tensors.get("image")) is not None and (
        image.ndim != 4 or image.shape[2:] != tensors[sides[0]].shape[2:]
    ):
        raise ShardError(
            f"{name}: its image has the shape {tuple(image.shape)}, which does not fit latents of {shapes.pop()}"
        )
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ShardError(f"{name} holds NaN or infinity")
    return tensors
