"""Loading generators from pipeline folders: the registry of families, and checks that every tensor is accounted for."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import nn

from .. import VideoAlignError
from .family_faults import check_blocks, check_family
from .files import check_readable
from .generator import EXPERTS, PARTS, Generator
from .hub import resolved
from .hunyuan15 import HunyuanVideo15, HunyuanVideo15Image
from .ltx import LTX, LTXImage
from .ltx2 import LTX2, LTX2Image
from .memory import Memory
from .registry import Registry
from .wan import Wan
from .wan_image import WanImage
from .whole import load_whole, only_shapes

_FAMILIES = (Wan, WanImage, LTX, LTXImage, LTX2, LTX2Image, HunyuanVideo15, HunyuanVideo15Image)
GENERATORS: Registry[type[Generator]] = Registry(
    "videoalign.generators",
    "generator family",
    {family.class_name: family for family in _FAMILIES},
    lambda thing: isinstance(thing, type) and issubclass(thing, Generator),
    "a subclass of videoalign.models.generator.Generator",
)
"""Families by the class name of their diffusers pipeline."""
_WEIGHTS = ("*.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-*-of-*.safetensors")
_WEIGHTS += ("model.safetensors", "model-*-of-*.safetensors")
"""Files of a part that are read; other ones are of other precisions or other programs."""
_WITH_ENCODERS = ("tokenizer", "tokenizer_2", "image_processor", "feature_extractor")
_SETTINGS = ("scheduler", "guider", *_WITH_ENCODERS)
"""Folders without weights, which are read whole."""
_SKELETONS = ("transformer/config.json", "vae/config.json")
"""Settings that are read in any case."""


def weight_files(folder: Path) -> list[Path]:
    """The files of weights in a pipeline's folder, those of all parts.

    Args:
        folder: Folder of a pipeline.
    """
    return sorted({path for name in _WEIGHTS[1:] for path in folder.glob(f"*/{name}")})


def files_of(parts: Sequence[str]) -> list[str]:
    """Patterns of a pipeline's files that are read, for :func:`.hub.resolved`.

    Args:
        parts: Names of the parts whose weights are read.
    """
    if only_shapes():
        return ["model_index.json", "scheduler/", "guider/", *(f"{part}/config.json" for part in parts)]
    settings = ["model_index.json", *(f"{name}/" for name in _SETTINGS), *_SKELETONS]
    return [*settings, *(f"{part}/{end}" for part in parts for end in _WEIGHTS)]


def load_generator(
    path: str | Path,
    dtype: str = "float32",
    parts: Sequence[str] = PARTS,
    fps: float = 25.0,
    family: str | type[Generator] | None = None,
    expert: str | None = None,
    memory: Memory | None = None,
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
        expert: Which of two experts is loaded, ``high`` or ``low``; both if not given.
        memory: How weights are held and computed; as they are loaded if not given.

    Raises:
        VideoAlignError: Where there is no such pipeline, it is of no known family, its files do not fit its models
            (see :func:`.whole.load_whole`), they are not the files that were exported, or it has no such expert.
    """
    index, folder = read_index(path)
    kind = _family_of(path, index.get("_class_name"), family)
    if unknown := set(parts) - set(PARTS):
        raise VideoAlignError(f"generator parts {sorted(unknown)} are unknown; they are {', '.join(PARTS)}")
    kind.check(index, path)
    wanted = [*(p for p in PARTS if p in parts), *(more for p in parts for more in kind.further_parts.get(p, ()))]
    if "transformer" in parts:
        experts = experts_of(index, path, expert)
        wanted = [part for part in wanted if part != "transformer"] + experts
    folder = resolved(path, "folder of a generator", parts=files_of(wanted))
    memory = Memory() if memory is None or only_shapes() else memory
    further = {more for names in kind.further_parts.values() for more in names}
    loading = {part: memory.loading(part, getattr(torch, dtype)) for part in wanted}
    every = {*PARTS, *kind.left_out, *further} | ({"transformer_2"} & index.keys())
    modules = dict.fromkeys(every)
    modules |= {part: _load_part(folder, path, part, index, dtype, more) for part, more in loading.items()}
    if only_shapes():
        modules |= dict.fromkeys({*_WITH_ENCODERS} & index.keys())
    skeletons = {part: _skeleton(folder, path, part, index) for part in ("transformer", "vae") if part not in parts}
    # diffusers' constructors read the settings of parts; and it warns of parts of a class that one pipeline alone has
    first = modules | skeletons | dict.fromkeys(further)
    then = {name: modules[name] for name in further if modules[name] is not None} | dict.fromkeys(skeletons)
    try:
        pipeline = kind.pipeline_class().from_pretrained(folder, dtype=torch.float32, **first)
        pipeline.register_modules(**then)
    except Exception as error:  # diffusers raises errors of many kinds for the tokenizer's and scheduler's files
        text = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise VideoAlignError(f"generator {path}: {text[:300]}") from error
    generator = kind(pipeline, fps, skeletons, expert)
    check_blocks(generator)
    memory.apply(generator)
    return generator


def read_index(path: str | Path) -> tuple[dict[str, Any], Path]:
    """Content of a pipeline's ``model_index.json``, and the folder that holds it.

    Args:
        path: Folder of a pipeline, or hub id.

    Raises:
        VideoAlignError: Where there is none.
    """
    folder = resolved(path, "folder of a generator", parts=files_of(PARTS), now=["model_index.json"])
    check_readable(folder)
    try:
        index = DiffusionPipeline.load_config(folder)
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0][:160]
        raise VideoAlignError(f"generator {str(path)!r} is no pipeline folder ({why})") from None
    if not isinstance(index, dict):
        raise VideoAlignError(
            f"generator {path}: model_index.json is no table of a pipeline's parts; copy or download the folder again"
        )
    stated = {name: index[name] for name in PARTS if name in index}
    if wrong := [name for name, entry in stated.items() if not (isinstance(entry, list) and len(entry) == 2)]:
        raise VideoAlignError(
            f"generator {path}: model_index.json states no library and class of its {', '.join(wrong)}; copy or "
            "download the folder again"
        )
    return index, folder


def experts_of(index: Mapping[str, Any], path: str | Path, expert: str | None) -> list[str]:
    """Names of the pipeline's transformers that are loaded.

    Args:
        index: Content of its ``model_index.json``.
        path: Folder or hub id, for messages.
        expert: Which of two experts is loaded, ``high`` or ``low``; both if not given.

    Raises:
        VideoAlignError: Where a second transformer has no boundary or a boundary no second transformer, or there are no
            experts to choose from.
    """
    second, boundary = (index.get("transformer_2") or [None])[0] is not None, index.get("boundary_ratio")
    if expert is not None and expert not in EXPERTS:
        raise VideoAlignError(f"expert {expert!r} is unknown; choose {' or '.join(EXPERTS)}")
    if boundary is None and not second:
        if expert is not None:
            raise VideoAlignError(
                f"generator {path} has one transformer, so there is no expert {expert!r}: leave it out"
            )
        return ["transformer"]
    if boundary is None or not second:
        lacks = "transformer_2" if not second else "boundary_ratio"
        raise VideoAlignError(
            f"generator {path}: model_index.json states no {lacks}, without which its experts cannot sample in turn; "
            "download the folder whole"
        )
    if not isinstance(boundary, float | int) or not 0 < boundary < 1:
        raise VideoAlignError(
            f"generator {path}: boundary_ratio is {boundary!r}, not a time between 0 and 1 at which its experts change"
        )
    both = dict(zip(EXPERTS, ("transformer", "transformer_2")))
    return [both[name] for name in EXPERTS if expert in (None, name)]


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
    kind = family or GENERATORS.find(str(name), by_path=False)
    kind = GENERATORS.find(kind) if isinstance(kind, str) else kind
    check_family(kind)
    if kind.class_name != name:
        raise VideoAlignError(
            f"generator {path} is a {name}, but family {kind.__qualname__} is for pipelines of {kind.class_name}"
        )
    return kind


def _class_of(path: str | Path, part: str, index: dict) -> type[nn.Module] | None:
    """The class of a part of a pipeline; None where its index has none. ``path`` is what the user named."""
    entry = index.get(part) or [None, None]
    if not isinstance(entry, list | tuple) or len(entry) != 2:
        raise VideoAlignError(
            f"generator {path}: model_index.json gives its {part} as {entry!r}, not as library and class"
        )
    library, kind = entry
    if kind is None:
        return None
    # parts that one pipeline alone has are of its own module in diffusers, and the index names that
    own = isinstance(library, str) and library.isidentifier() and hasattr(diffusers.pipelines, library)
    place = f"diffusers.pipelines.{library}" if own else library
    if not (own or place in ("diffusers", "transformers")) or not hasattr(import_module(place), str(kind)):
        raise VideoAlignError(
            f"generator {path}: its {part} is a {library}.{kind}, which is no model of diffusers or transformers"
        )
    return getattr(import_module(place), kind)


def _load_part(
    folder: Path, path: str | Path, part: str, index: dict, dtype: str, options: dict[str, Any]
) -> nn.Module | None:
    """Load a part of a pipeline; None where its index has none. ``path`` is what the user named, for messages."""
    kind = _class_of(path, part, index)
    if kind is None:
        return None
    # transformers raises at a wrong shape without naming the tensor; with this option it goes on and reports it
    more = {"ignore_mismatched_sizes": True} if kind.__module__.startswith("transformers.") else options
    dtype = torch.float32 if part == "vae" else getattr(torch, dtype)
    return load_whole(kind, folder, f"the {part} of generator {path}", part, dtype=dtype, **more)


def _skeleton(folder: Path, path: str | Path, part: str, index: dict) -> nn.Module:
    """A part of a pipeline without weights, on the meta device: it knows its settings."""
    kind = _class_of(path, part, index)
    try:
        with torch.device("meta"):
            return kind.from_config(kind.load_config(folder, subfolder=part))
    except (AttributeError, OSError, TypeError, ValueError) as error:
        why = next(iter(str(error).splitlines()), "")
        raise VideoAlignError(f"generator {path}: the settings of its {part} cannot be read ({why[:200]})") from None
