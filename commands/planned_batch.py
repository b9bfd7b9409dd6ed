"""The batch that `videoalign plan` counts a step of: shapes of a latents set's first sample, or of a clip's size."""

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import VideoAlignError
from ..alignment.training import Training
from ..datamodules.latent_files import OF, load_latents
from ..datamodules.shards import ShardSet
from ..models.dimensions import DIMENSIONS
from ..models.generator import Generator

CLIP_TOKENS = 257
"""Tokens of an image by Wan 2.1's encoder: CLIP's patches and its class token."""
SIZE = ("num_frames", "height", "width")
"""Options that state a clip's size."""


@dataclass(frozen=True)
class Clip:
    """One sample of the training data, as shapes.

    Attributes:
        latents: Shape (C, F, H, W) of a video's latents.
        sides: Number of videos of a sample.
        encoded: Shapes of what the sample is conditioned on, by name.
        source: Where the shapes come from.
    """

    latents: tuple[int, ...]
    sides: int
    encoded: dict[str, tuple[int, ...]]
    source: str


def clip_of(module: Training, train: str | None, options: argparse.Namespace) -> Clip:
    """The sample whose shapes are counted.

    Args:
        module: Module that trains.
        train: Latents set of the experiment; None where none is named.
        options: Options ``num_frames``, ``height``, ``width`` and ``image``, which stand in for a set.

    Raises:
        VideoAlignError: Where neither a set nor a size is given, or both are, or the generator takes no such clip.
    """
    size = [getattr(options, name) for name in SIZE]
    if train is not None and any(size):
        raise VideoAlignError(f"data.train {train} has its own shapes; leave out --num-frames, --height and --width")
    if train is not None:
        return _stored(train)
    if not all(size):
        raise VideoAlignError(
            "plan needs the shape of the latents: name a set (--data.train LATENTS), or a clip's size "
            "(--num-frames 81 --height 480 --width 832)"
        )
    return _asked(module, *size, options.image)


def _stored(train: str) -> Clip:
    """The first sample of a latents set."""
    contents = ShardSet(train, "latents").contents()
    if not len(contents):
        raise VideoAlignError(f"data.train {train} holds no samples")
    first = contents[0]
    tensors = load_latents(first.read("safetensors"), first.name)
    sides = next(sides for sides in OF.values() if sides[0] in tensors)
    encoded = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name not in sides}
    return Clip(tuple(tensors[sides[0]].shape), len(sides), encoded, train)


def _asked(module: Training, frames: int, height: int, width: int, image: bool) -> Clip:
    """A clip of a size, with a prompt of the greatest length, and with an image where the generator asks for it."""
    generator = module.generator
    latents = generator.latent_shape(frames, height, width)
    encoded: dict[str, tuple[int, ...]] = dict(generator.prompt_shapes())
    if image and generator.image == "none":
        raise VideoAlignError(f"--image: a {generator.class_name} takes no images")
    if image or generator.image == "required":
        encoded |= _image_shapes(generator, frames, latents)
    sides = 2 if getattr(module, "sides", None) is None else 1 + max(module.sides)
    return Clip(
        latents, sides, encoded, f"{frames} frames of {height} x {width}{' from an image' * ('image' in encoded)}"
    )


def _image_shapes(generator: Generator, frames: int, latents: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of an encoded image."""
    seen = generator._image_frames(torch.zeros(1, 3, 1, 1, 1), frames).shape[2]
    encoded = {"image": (latents[0], (seen - 1) // generator.ratios[0] + 1, *latents[2:])}
    if width := generator.config.get("image_dim") or generator.config.get("image_embed_dim"):
        encoded["image_embeds"] = (getattr(generator.pipeline, "vision_num_semantic_tokens", CLIP_TOKENS), width)
    return encoded


def batch_of(clip: Clip, size: int, cached: bool) -> dict[str, Any]:
    """A micro-batch like those of :class:`~videoalign.datamodules.latents.LatentPairs`.

    Args:
        clip: Shapes of each sample.
        size: Number of samples.
        cached: Whether the reference's errors are known.
    """
    error = 1.0 if cached else torch.nan
    return {
        "keys": [str(number) for number in range(size)],
        "latents": torch.zeros(clip.sides, size, *clip.latents),
        "conditions": [{name: torch.zeros(shape) for name, shape in clip.encoded.items()} for _ in range(size)],
        "texts": [""] * size,
        "scores": torch.zeros(clip.sides, size),
        "labels": torch.zeros(size, len(DIMENSIONS)),
        "rewards": torch.zeros(clip.sides, size, len(DIMENSIONS)),
        "reference": _real([[error] * size] * clip.sides),
        "seeds": _real([*range(size)]),
        "valid": torch.ones(size, dtype=torch.bool),
        "dropped": [],
    }


def _real(values: list) -> Tensor:
    """A tensor with values also where others are shapes, for what the step looks at."""
    with torch._C._DisableTorchDispatch():
        return torch.tensor(values)
