"""Loading generators from pipeline folders: the registry of families, and checks that every tensor is accounted for."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn

from .. import VideoAlignError
from .files import check_readable
from .generator import PARTS, Generator
from .hub import resolved
from .ltx import LTX
from .registry import Registry
from .wan import Wan
from .whole import load_whole, only_shapes

GENERATORS: Registry[type[Generator]] = Registry(
    "videoalign.generators",
    "generator family",
    {family.class_name: family for family in (Wan, LTX)},
    lambda thing: isinstance(thing, type) and issubclass(thing, Generator),
    "a subclass of videoalign.models.generator.Generator",
)
"""Families by the class name of their diffusers pipeline."""
_WEIGHTS = ("*.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-*-of-*.safetensors")
_WEIGHTS += ("model.safetensors", "model-*-of-*.safetensors")
"""Files of a part that are read; other ones are of other precisions or other programs."""


def files_of(parts: Sequence[str]) -> list[str]:
    """Patterns of a pipeline's files that are read, for :func:`.hub.resolved`.

    Args:
        parts: Names of the parts whose weights are read.
    """
    if only_shapes():
        return ["model_index.json", "scheduler/", *(f"{part}/config.json" for part in parts)]
    return ["model_index.json", "scheduler/", "tokenizer/", *(f"{p}/{end}" for p in parts for end in _WEIGHTS)]


def load_generator(
    path: str | Path,
    dtype: str = "float32",
    parts: Sequence[str] = PARTS,
    fps: float = 25.0,
    family: str | type[Generator] | None = None,
) -> Generator:
    """Load a generator from a pipeline folder or hub id, with every tensor of the loaded parts accounted for.

    Args:
        path: Folder of a pipeline, or hub id.
        dtype: Dtype of transformer and text encoder, such as ``bfloat16``. The autoencoder is always fp32, as its
            authors run it.
        parts: Names of the parts to load, from ``transformer``, ``vae`` and ``text_encoder``.
        fps: Frame rate of the videos, in frames per second. Only LTX uses it.
        family: Class of the family, its name in :data:`GENERATORS` or its import path; the one that has the name of the
            pipeline's class if not given.

    Raises:
        VideoAlignError: Where there is no such pipeline, it is of no known family, its files do not fit its models
            (see :func:`.whole.load_whole`), or they are not the files that were exported.
    """
    files = files_of([part for part in PARTS if part in parts])
    folder = resolved(path, "folder of a generator", parts=files, now=["model_index.json"])
    check_readable(folder)
    try:
        index = DiffusionPipeline.load_config(folder)
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0][:160]
        raise VideoAlignError(f"generator {str(path)!r} is no pipeline folder ({why})") from None
    name = index.get("_class_name")
    kind = _family_of(path, name, family)
    if unknown := set(parts) - set(PARTS):
        raise VideoAlignError(f"generator parts {sorted(unknown)} are unknown; they are {', '.join(PARTS)}")
    kind.check(index, path)
    folder = resolved(path, "folder of a generator", parts=files)
    modules = {part: _load_part(folder, path, part, index, dtype) if part in parts else None for part in PARTS}
    if only_shapes():
        modules["tokenizer"] = None
    try:
        pipeline = kind.pipeline_class().from_pretrained(folder, dtype=torch.float32, **modules)
    except Exception as error:  # diffusers raises errors of many kinds for the tokenizer's and scheduler's files
        text = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise VideoAlignError(f"generator {path}: {text[:300]}") from error
    return kind(pipeline, fps)


def _family_of(path: str | Path, name: object, family: str | type[Generator] | None) -> type[Generator]:
    """The family of a pipeline.

    Args:
        path: Folder or hub id, for messages.
        name: Name of the pipeline's class, as its folder gives it; it imports nothing but what is installed for it.
        family: The family that was asked for, if any.
    """
    if family is None:
        if name not in GENERATORS:
            path_too = "; or name its class under family"
            raise VideoAlignError(f"generator {path}: {GENERATORS.unknown(name, by_path=False)}{path_too}")
        return GENERATORS.find(str(name), by_path=False)
    kind = GENERATORS.find(family) if isinstance(family, str) else family
    if kind.class_name != name:
        raise VideoAlignError(
            f"generator {path} is a {name}, but family {kind.__qualname__} is for pipelines of {kind.class_name}"
        )
    return kind


def _load_part(folder: Path, path: str | Path, part: str, index: dict, dtype: str) -> nn.Module | None:
    """Load a part of a pipeline; None where its index has none. ``path`` is what the user named, for messages."""
    entry = index.get(part) or [None, None]
    if not isinstance(entry, list | tuple) or len(entry) != 2:
        raise VideoAlignError(
            f"generator {path}: model_index.json gives its {part} as {entry!r}, not as library and class"
        )
    library, kind = entry
    if kind is None:
        return None
    if library not in ("diffusers", "transformers") or not hasattr(import_module(library), str(kind)):
        raise VideoAlignError(
            f"generator {path}: its {part} is a {library}.{kind}, which is no model of diffusers or transformers"
        )
    # transformers raises at a wrong shape without naming the tensor; with this option it goes on and reports it
    more = {"ignore_mismatched_sizes": True} if library == "transformers" else {}
    return load_whole(
        getattr(import_module(library), kind),
        folder,
        f"the {part} of generator {path}",
        part,
        dtype=torch.float32 if part == "vae" else getattr(torch, dtype),
        **more,
    )
