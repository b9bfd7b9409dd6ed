"""LoRA adapters folded into the weights of a pipeline: a folder in diffusers' format that needs no adapters."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import VideoAlignError
from ..bars import Bar
from .adapter_files import listed
from .adapters import Update, expert_of, folders_of, read_updates
from .checksums import seal
from .files import new_folder
from .finite import require_finite
from .generator import Generator
from .generator_folder import load_generator
from .hub import resolved
from .lora_specs import LoraSpec
from .whole import STEMS, check_files

Scaled = list[tuple[float, Update]]
"""Updates of one layer, each with its factor."""


def fuse(
    generator: str | Path,
    loras: Sequence[LoraSpec],
    out: str | Path,
    dtype: str | None = None,
    family: str | None = None,
) -> dict[str, int]:
    """Write a pipeline with adapters folded into its weights, W + scale * alpha / rank * B A, computed in fp32.

    Weights files are read and written one at a time, so that memory holds one of them. All parts but transformers are
    copied as they are.

    Args:
        generator: Folder of a pipeline, or hub id.
        loras: Adapters, each for one transformer.
        out: Folder to write; it must not exist yet.
        dtype: Dtype of the transformers' weights, such as ``bfloat16``; that of the files if not given.
        family: Class of the generator's family, see :func:`.generator_folder.load_generator`.

    Returns:
        The number of changed layers by the name of the transformer's folder.

    Raises:
        VideoAlignError: Where adapters do not fit, no adapters are given, or weights are missing, damaged or no longer
            finite.
    """
    if not loras:
        raise VideoAlignError("fuse needs at least one set of adapters")
    pipeline = load_generator(generator, parts=(), family=family)
    with new_folder(out) as folder:
        updates = _by_folder(pipeline, loras)
        source = _source(generator)
        parts = _parts(source)
        if absent := [name for name in parts if not (source / name).is_dir()]:
            raise VideoAlignError(f"generator {generator} is not whole: model_index.json lists {listed(absent)}")
        for name in parts:
            if name not in folders_of(pipeline).values():
                shutil.copytree(source / name, folder / name)
        for path in (source / "model_index.json", *source.glob("LICENSE*")):
            shutil.copyfile(path, folder / path.name)
        for name in folders_of(pipeline).values():
            where = f"the {name} of generator {generator}"
            _fuse_part(source / name, folder / name, updates.get(name, {}), dtype and getattr(torch, dtype), where)
    return {name: len(layers) for name, layers in updates.items()}


def _by_folder(pipeline: Generator, loras: Sequence[LoraSpec]) -> dict[str, dict[str, Scaled]]:
    """Updates of every layer, by the name of the transformer's folder."""
    found: dict[str, dict[str, Scaled]] = {}
    folders = folders_of(pipeline)
    for lora in loras:
        updates, stated = read_updates(pipeline.structure["transformer"], lora.path)
        layers = found.setdefault(folders[expert_of(folders, stated.expert, lora.expert, lora.path)], {})
        for layer, update in updates.items():
            layers.setdefault(layer, []).append((lora.scale, update))
    return found


def _source(generator: str | Path) -> Path:
    """The pipeline's folder on this machine, with all parts that its index lists."""
    index = resolved(generator, "folder of a generator", parts=["model_index.json"])
    return resolved(generator, "folder of a generator", parts=["model_index.json", *(f"{p}/" for p in _parts(index))])


def _parts(folder: Path) -> list[str]:
    """Names of the parts that a pipeline's index lists and that have a folder."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    return [name for name, entry in index.items() if isinstance(entry, list) and any(entry)]


def _fuse_part(source: Path, out: Path, layers: Mapping[str, Scaled], dtype: torch.dtype | None, where: str) -> None:
    """Write a transformer's folder with updates in its weights.

    Args:
        source: Folder of the transformer.
        out: Folder to write.
        layers: Updates by layer.
        dtype: Dtype of the written weights; that of the files if None.
        where: Name of the transformer, for messages.
    """
    check_files(source, where)
    out.mkdir()
    for path in source.glob("*.json"):
        shutil.copyfile(path, out / path.name)
    files = sorted(path for stem in STEMS for path in _weights_files(source, stem))
    left, size = dict(layers), 0
    with Bar(f"weights files of {source.name}", len(files)) as shown:
        for path in files:
            with safe_open(path, "pt") as content:
                metadata = _plain(content.metadata())
                tensors = {
                    name: _fused(content.get_tensor(name), left.pop(name.removesuffix(".weight"), []), dtype, name)
                    for name in content.keys()
                }
            require_finite(f"{where}: fused weights", tensors, "look at the scales of the adapters")
            size += sum(tensor.nbytes for tensor in tensors.values())
            save_file(tensors, out / path.name, metadata=metadata)
            seal(out / path.name)
            shown.update()
    if left:
        raise VideoAlignError(
            f"{where}: {len(left)} layers that have adapters are not in its files, such as {listed(left)}"
        )
    for path in out.glob("*.safetensors.index.json"):
        index = json.loads(path.read_text(encoding="utf-8"))
        index["metadata"] = {**index.get("metadata", {}), "total_size": size}
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _weights_files(folder: Path, stem: str) -> list[Path]:
    """Weights files of a folder; those of other precisions (``STEM.fp16.safetensors``) would be of the old weights."""
    return [*folder.glob(f"{stem}.safetensors"), *folder.glob(f"{stem}-?????-of-?????.safetensors")]


def _plain(metadata: Mapping[str, str] | None) -> dict[str, str]:
    """Metadata of a weights file; its checksum, if it has one, is replaced by the new file's."""
    return {"format": "pt", **(metadata or {})}


def _fused(weight: Tensor, scaled: Scaled, dtype: torch.dtype | None, name: str) -> Tensor:
    """A weight with its updates, computed in fp32, in the dtype that is written."""
    kind = dtype if dtype and weight.is_floating_point() else weight.dtype
    if not scaled:
        return weight.to(kind)
    whole = weight.float()
    for scale, update in scaled:
        if weight.shape != (len(update.b), update.a.shape[1]):
            raise VideoAlignError(f"{name} has the shape {tuple(weight.shape)}, which the adapters do not fit")
        whole = whole + scale * update.scale * (update.b.float() @ update.a.float())
    return whole.to(kind)
