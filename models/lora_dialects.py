"""LoRA adapters in the names and the form of diffusers, ComfyUI and musubi-tuner.

What is written in the original names is given to diffusers' own converter before it is kept: what diffusers does not
read back as the same updates is refused. Three traits of its converters show in the files:

- ComfyUI's form may state alpha beside each layer of Wan's blocks, and nowhere else; elsewhere it is baked into B.
- musubi-tuner's form states alpha for every layer (the rank, where it is baked), and knows layers of blocks only.
- musubi-tuner's form must hold every layer of every block: those without adapters get zeros of rank 1, which all
  tools apply as no change, and which :func:`.adapters.read_updates` leaves out.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import VideoAlignError
from .adapter_files import EXPERT, METADATA, file_of, linear_layers, listed
from .adapters import Update, expert_of, folders_of, read_updates, settings_of
from .checksums import seal
from .files import check_free, new_file
from .generator_folder import load_generator
from .locks import held
from .lora_names import COMFYUI, DIFFUSERS, original_name, underscored
from .lora_specs import LoraSpec

DialectName = Literal["diffusers", "comfyui", "musubi"]
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Dialect:
    """A form of files with adapters.

    Attributes:
        tool: Name of the tool, for messages.
        name: Gives a layer's name, from its own name and the class of the transformer.
        sides: Names of A and B.
        states: Says whether a layer of an original name states its alpha beside its tensors; None: in the metadata.
        whole: Whether every layer of every block must be there.
    """

    tool: str
    name: Callable[[str, str], str]
    sides: tuple[str, str] = ("lora_A", "lora_B")
    states: Callable[[str], bool] | None = None
    whole: bool = False


DIALECTS: dict[str, Dialect] = {
    "diffusers": Dialect("diffusers", lambda layer, kind: DIFFUSERS + layer),
    "comfyui": Dialect(
        "ComfyUI", lambda layer, kind: COMFYUI + original_name(layer, kind), states=lambda name: "blocks." in name
    ),
    "musubi": Dialect(
        "musubi-tuner",
        lambda layer, kind: underscored(original_name(layer, kind)),
        sides=("lora_down", "lora_up"),
        states=lambda name: True,
        whole=True,
    ),
}
"""Forms that are written, by their names in ``videoalign convert-lora --to``."""


def written(
    updates: Mapping[str, Update], dialect: DialectName, transformer: nn.Module
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Write updates in the form of a tool.

    Args:
        updates: Updates by the names of the transformer's layers.
        dialect: One of :data:`DIALECTS`.
        transformer: Transformer that they are for; it may be on the meta device.

    Returns:
        Tensors by name, and the file's metadata.
    """
    form, kind = DIALECTS[dialect], type(transformer).__name__
    if form.whole:
        updates = _filled(updates, transformer)
    tensors: dict[str, Tensor] = {}
    for layer, update in updates.items():
        name = form.name(layer, kind)
        stated = form.states is not None and form.states(name)
        if form.states is not None and not stated:
            update = update.baked()
        tensors |= {f"{name}.{side}.weight": t for side, t in zip(form.sides, (update.a, update.b))}
        if stated and (form.whole or update.scale != 1):
            tensors[f"{name}.alpha"] = torch.tensor(update.alpha)
    return tensors, {"format": "pt"} if form.states else stating(settings_of(updates))


def stating(settings: Mapping[str, object], expert: str | None = None) -> dict[str, str]:
    """Metadata of a file in diffusers' form.

    Args:
        settings: Arguments of peft's ``LoraConfig``. Sets are sorted, so that equal adapters give equal bytes.
        expert: Expert that the adapters belong to, of a generator with two.
    """
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}
    text = json.dumps({DIFFUSERS + name: value for name, value in plain.items()}, indent=2, sort_keys=True)
    return {"format": "pt", METADATA: text, **({EXPERT: expert} if expert else {})}


def _filled(updates: Mapping[str, Update], transformer: nn.Module) -> dict[str, Update]:
    """Updates with zeros of rank 1 for all other layers of the transformer's blocks."""
    filled = dict(updates)
    for layer in linear_layers(transformer):
        if "blocks." in layer and layer not in updates:
            module = transformer.get_submodule(layer)
            filled[layer] = Update(torch.zeros(1, module.in_features), torch.zeros(module.out_features, 1), 1.0)
    return filled


def check_read_by_diffusers(
    tensors: Mapping[str, Tensor], updates: Mapping[str, Update], pipeline: type, dialect: DialectName
) -> None:
    """Give what was written to diffusers' own converter, and refuse it where other updates come back.

    Args:
        tensors: Tensors by name, as they are written.
        updates: Updates by the names of the transformer's layers.
        pipeline: Class of the pipeline in diffusers.
        dialect: Form in which they are written.

    Raises:
        VideoAlignError: Where diffusers has no converter, it fails, or it gives other names or values.
    """
    form = DIALECTS[dialect]
    if form.states is None:
        return
    where, reader = f"these adapters cannot be written in the names of {form.tool}", f"diffusers' {pipeline.__name__}"
    remedy = "so they cannot be checked; diffusers' own form (--to diffusers) holds them"
    if not hasattr(pipeline, "lora_state_dict"):
        raise VideoAlignError(f"{where}: {reader} reads no files of adapters, {remedy}")
    try:
        # some converters change tensors in place
        found = pipeline.lora_state_dict({name: tensor.clone() for name, tensor in tensors.items()})
    except Exception as error:  # a converter fails in many ways on names that it was not written for
        why = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:160]
        raise VideoAlignError(f"{where}: {reader} does not read them ({why}), {remedy}") from None
    want = {f"{DIFFUSERS}{layer}.lora_{side}.weight" for layer in updates for side in "AB"}
    extra = [name for name in found if name not in want and found[name].any()]
    if lost := sorted(want - found.keys()) or extra:
        alpha = " (or bake alpha in: --alpha baked)" if any(name.endswith(".alpha") for name in lost) else ""
        raise VideoAlignError(
            f"{where}: {reader} does not read {len(lost)} of their tensors, such as {listed(lost)}, {remedy}{alpha}"
        )
    if wrong := [layer for layer, update in updates.items() if not _same(update, found, DIFFUSERS + layer)]:
        raise VideoAlignError(f"{where}: {reader} reads other values of {listed(wrong)}, {remedy}")


def _same(update: Update, found: Mapping[str, Tensor], name: str) -> bool:
    """Whether tensors that are applied at scale 1 are an update, tried on a random vector in fp64."""
    probe = torch.randn(update.a.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, b = (found[f"{name}.lora_{side}.weight"].double() for side in "AB")
    want = update.scale * (update.b.double() @ (update.a.double() @ probe))
    return torch.allclose(b @ (a @ probe), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def save_adapters(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file of adapters with its checksum.

    Args:
        file: File to write.
        tensors: Tensors by name.
        metadata: Metadata of the file.
    """
    save_file({name: tensors[name].contiguous() for name in sorted(tensors)}, file, metadata=dict(metadata))
    seal(file)


def convert_adapters(
    source: LoraSpec,
    dialect: DialectName,
    out: str | Path,
    generator: str | Path,
    alpha: Literal["baked", "written"] | None = None,
    family: str | None = None,
) -> int:
    """Write a file of adapters in the form of another tool. No weights of the generator are read.

    Args:
        source: Adapters to read, in any form that :mod:`.adapter_files` lists. A scale is multiplied in.
        dialect: One of :data:`DIALECTS`.
        out: File to write, which must not exist yet.
        generator: Folder or hub id of the pipeline, whose configuration gives names and shapes.
        alpha: Whether alpha / rank is multiplied into B, or stated. By default it is baked for ComfyUI, which many
            programs imitate without reading alpha, and written for the others.
        family: Class of the generator's family, see :func:`.generator_folder.load_generator`.

    Returns:
        The number of layers that were written.

    Raises:
        VideoAlignError: Where the adapters do not fit the generator, the form cannot hold them, or ``out`` exists.
    """
    if Path(out).suffix != ".safetensors":
        raise VideoAlignError(f"output {out}: adapters are written into one file, whose name ends in .safetensors")
    with held(out):
        check_free(out)
        pipeline = load_generator(generator, parts=(), family=family)
        transformer = pipeline.structure["transformer"]
        updates, stated = read_updates(transformer, source.path)
        expert = None
        if stated.expert or source.expert:  # a file that states none may go on doing so
            expert = expert_of(folders_of(pipeline), stated.expert, source.expert, source.path)
        updates = {layer: replace(u, alpha=u.alpha * source.scale) for layer, u in updates.items()}
        if (alpha or ("baked" if dialect == "comfyui" else "written")) == "baked":
            updates = {layer: update.baked() for layer, update in updates.items()}
        tensors, metadata = written(updates, dialect, transformer)
        tensors = _stored(tensors, source.path)
        check_read_by_diffusers(tensors, updates, type(pipeline.pipeline), dialect)
        if expert:
            metadata[EXPERT] = expert
        with new_file(out) as partial:
            save_adapters(partial, tensors, metadata)
    return len(updates)


def _stored(tensors: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """Tensors in the dtype of the file that they come from, where it holds their values; in fp32 elsewhere."""
    with safe_open(file_of(path), "pt") as content:
        kinds = {content.get_slice(name).get_dtype() for name in content.keys() if not name.endswith(".alpha")}
    dtype = _DTYPES[kinds.pop()] if len(kinds) == 1 else torch.float32
    weights = {name: tensor for name, tensor in tensors.items() if not name.endswith(".alpha")}
    if not all(torch.equal(tensor.to(dtype).to(tensor.dtype), tensor) for tensor in weights.values()):
        return tensors
    return tensors | {name: tensor.to(dtype) for name, tensor in weights.items()}
