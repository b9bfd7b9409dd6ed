"""The transformers of a pipeline folder without their weights: names and shapes, from the configurations alone."""

from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import nn

from .. import VideoAlignError
from .files import check_readable
from .hub import resolved

TRANSFORMERS = {"transformer": "high", "transformer_2": "low"}
"""Names of a pipeline's transformers, and the expert that each is where there are two."""


@dataclass(frozen=True)
class Skeleton:
    """The transformers of a pipeline on the meta device.

    Attributes:
        pipeline: Class of the pipeline in diffusers.
        experts: Transformers by expert; one under None where there are no experts.
        folders: Names of their folders inside the pipeline's, by expert.
    """

    pipeline: type[DiffusionPipeline]
    experts: dict[str | None, nn.Module]
    folders: dict[str | None, str]

    @property
    def transformer(self) -> nn.Module:
        """The first transformer; a second one has the same layers."""
        return next(iter(self.experts.values()))


def skeleton_of(path: str | Path) -> Skeleton:
    """Build the transformers of a pipeline on the meta device; no weights are read.

    Args:
        path: Folder of a pipeline, or hub id.

    Raises:
        VideoAlignError: Where there is no such pipeline, or it has no transformer of diffusers.
    """
    files = ["model_index.json", *(f"{name}/config.json" for name in TRANSFORMERS)]
    folder = resolved(path, "folder of a generator", parts=files)
    check_readable(folder)
    try:
        index = DiffusionPipeline.load_config(folder)
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0][:160]
        raise VideoAlignError(f"generator {str(path)!r} is no pipeline folder ({why})") from None
    pipeline = getattr(diffusers, str(index.get("_class_name")), None)
    if not (isinstance(pipeline, type) and issubclass(pipeline, DiffusionPipeline)):
        raise VideoAlignError(f"generator {path}: diffusers has no pipeline {index.get('_class_name')!r}")
    entries = {name: index.get(name) for name in TRANSFORMERS}
    held = [name for name, entry in entries.items() if isinstance(entry, list) and len(entry) == 2 and entry[1]]
    if not held:
        raise VideoAlignError(f"generator {path}: its model_index.json lists no transformer")
    keys = {name: TRANSFORMERS[name] if len(held) > 1 else None for name in held}
    experts = {keys[name]: _empty(folder / name, entries[name], path) for name in held}
    return Skeleton(pipeline, experts, {keys[name]: name for name in held})


def _empty(folder: Path, entry: list, path: str | Path) -> nn.Module:
    """A transformer of random shape-only parameters.

    Args:
        folder: Folder of its configuration.
        entry: Library and class, as the pipeline's index gives them.
        path: Path that the user named, for messages.
    """
    library, name = entry
    kind = getattr(diffusers, str(name), None) if library == "diffusers" else None
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
        raise VideoAlignError(
            f"generator {path}: its {folder.name} is a {library}.{name}, which is no model of diffusers"
        )
    try:
        config = kind.load_config(folder)
        with torch.device("meta"):
            return kind.from_config(config)
    except Exception as error:  # a configuration that does not fit its class fails in many ways
        why = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise VideoAlignError(f"generator {path}: its {folder.name} has no sound configuration ({why[:200]})") from None
