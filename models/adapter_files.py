"""LoRA adapters in files: their tensors, rank and alpha, and the names that several tools give to them.

The following names are understood, with ``X`` for a linear layer:

    transformer.X.lora_A.weight           diffusers, and the exports of this package
    base_model.model.X.lora_A.weight      peft; ``adapter_config.json`` beside the file states rank and alpha
    X.lora_A.default.weight               plain peft, and DiffSynth-Studio, which uses the original Wan names
    diffusion_model.X.lora_A.weight       ComfyUI, with original names, or ``lora_down`` and ``lora_up``
    lora_unet_X.lora_down.weight          kohya's tools (musubi-tuner), with underscores for dots

Original names are those of :mod:`.lora_names`. Nothing is unpickled.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .. import VideoAlignError
from .checksums import check_seal
from .finite import require_weights
from .generator import EXPERTS
from .hub import resolved
from .lora_names import COMFYUI, DIFFUSERS, by_any_name

FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""Names of the files of diffusers and peft. A file with another name is read if it is the only one in its folder."""
METADATA = "lora_adapter_metadata"
"""Key under which diffusers keeps rank and alpha in a file's metadata."""
EXPERT = "videoalign.expert"
"""Key of the metadata under which an export of this package states the expert that its adapters belong to."""
_SIDES = {"lora_A": "A", "lora_B": "B", "lora_down": "A", "lora_up": "B"}
_INSIDE = re.compile(r"\.(base_layer|lora_[AB])(\.|$)")
"""Modules that peft puts inside an adapted layer."""
_ENTRY = re.compile(rf"(.+)\.(?:({'|'.join(_SIDES)})(?:\.default)?\.weight|(alpha))")
_KINDS = {
    "lora_magnitude_vector": "DoRA",
    "dora_scale": "DoRA",
    ".lokr_": "LoKr",
    ".hada_": "LoHa",
    ".oft_": "OFT",
    ".diff_b": "full differences",
}
"""Parts of names that show another kind of adapters."""
_ENCODERS = ("text_encoder.", "text_encoder_2.", "lora_te", "text_model.")
_UNSUPPORTED = {
    "use_dora": False,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "bias": "none",
    "modules_to_save": None,
}
"""Settings of peft that change the meaning of an update, and the only values that are supported."""


@dataclass
class Stated:
    """Rank and alpha that a file states; None or empty where it states nothing.

    Attributes:
        rank: Rank of all layers.
        alpha: Alpha of all layers.
        ranks: Ranks by patterns of layer names.
        alphas: Alphas by patterns of layer names.
        expert: Expert that the adapters belong to, one of :data:`.generator.EXPERTS`.
    """

    rank: int | None = None
    alpha: float | None = None
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    expert: str | None = None

    @classmethod
    def read(cls, settings: Mapping[str, Any], path: str) -> "Stated":
        """Read the settings of peft's ``LoraConfig``.

        Args:
            settings: Settings by name.
            path: Path that the user named, for messages.

        Raises:
            VideoAlignError: Where rank or alpha is missing, or the adapters are no plain LoRA.
        """
        given = {key: (settings[key], ours) for key, ours in _UNSUPPORTED.items() if key in settings}
        if other := [f"{key}: {value}" for key, (value, ours) in given.items() if (value or ours) != ours]:
            raise VideoAlignError(
                f"adapters {path} are of a kind that is not supported ({', '.join(other)}); plain LoRA is"
            )
        try:
            patterns = (dict(settings.get(key) or {}) for key in ("rank_pattern", "alpha_pattern"))
            return cls(int(settings["r"]), float(settings["lora_alpha"]), *patterns)
        except (KeyError, TypeError, ValueError) as error:
            raise VideoAlignError(
                f"adapters {path} state no rank (r) and alpha (lora_alpha) as numbers ({error})"
            ) from None

    def of(self, layer: str, rank: int) -> tuple[int, float]:
        """Rank and alpha of a layer; where the file states none, both are the rank of its tensors.

        Args:
            layer: Name of the layer.
            rank: Rank of its tensors.
        """
        stated = self.ranks.get(get_pattern_key(self.ranks, layer), self.rank)
        alpha = self.alphas.get(get_pattern_key(self.alphas, layer), self.alpha)
        return rank if stated is None else stated, rank if alpha is None else alpha


def refusal(path: str, why: str) -> VideoAlignError:
    """The error for adapters that are not used.

    Args:
        path: Path that the user named.
        why: Clause that gives the reason.
    """
    return VideoAlignError(f"adapters {path} cannot be loaded into this generator: {why}")


def read_adapters(path: str) -> tuple[dict[str, Tensor], Stated]:
    """Read the tensors of adapters, in fp32 or finer, and the rank and alpha that are stated for them.

    Args:
        path: Folder with one safetensors file of adapters, that file, or an address of either on the hub.

    Raises:
        VideoAlignError: Where the file is missing, damaged, empty or ambiguous, or states no plain LoRA.
    """
    file = file_of(path)
    tensors, metadata = _content(file, path)
    config = file.parent / "adapter_config.json"
    try:
        said = [json.loads(config.read_text(encoding="utf-8"))] if config.is_file() else []
        if METADATA in metadata:
            said.append({k.removeprefix("transformer."): v for k, v in json.loads(metadata[METADATA]).items()})
    except (OSError, ValueError, AttributeError) as error:
        raise refusal(path, f"rank and alpha cannot be read ({error})") from None
    if not all(isinstance(settings, dict) for settings in said):
        raise refusal(path, f"{config} is no configuration of peft")
    stated = [Stated.read(settings, path) for settings in said] or [Stated()]
    if stated[0] != stated[-1]:
        raise refusal(path, f"{config.name} and the metadata of {file.name} state different ranks or alphas")
    stated[0].expert = metadata.get(EXPERT)
    if stated[0].expert not in (None, *EXPERTS):
        raise refusal(path, f"their metadata name the expert {stated[0].expert!r}; experts are {' and '.join(EXPERTS)}")
    low = (torch.bfloat16, torch.float16)
    return {name: t.float() if t.dtype in low else t for name, t in tensors.items()}, stated[0]


def file_of(path: str) -> Path:
    """Find the one safetensors file of a folder or hub id, or take the file itself.

    Args:
        path: Folder, file, or an address of either on the hub.

    Raises:
        VideoAlignError: Where there is no such file, or several.
    """
    place = resolved(path, "folder or file of adapters", parts=("*.safetensors", "adapter_config.json"), file=True)
    if place.is_file():
        if place.suffix != ".safetensors":
            raise refusal(path, "only safetensors files are read, nothing is unpickled; convert it first")
        return place
    known = [place / name for name in FILES if (place / name).is_file()]
    held = known or sorted(place.glob("*.safetensors"))
    if not held:
        raise refusal(path, f"the folder holds no safetensors file, such as {FILES[0]}")
    if len(held) > 1:
        raise refusal(path, f"the folder holds {', '.join(p.name for p in held[:4])}; name the one that is meant")
    return held[0]


def _content(file: Path, path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file's tensors and metadata; refuses a damaged or empty file, and quantised or non-finite tensors."""
    check_seal(file)
    try:
        with safe_open(file, "pt") as content:
            tensors = {name: content.get_tensor(name) for name in sorted(content.keys())}
            metadata = content.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise refusal(path, f"{file.name} is damaged or no safetensors file ({error})") from None
    if not tensors:
        raise refusal(path, f"{file.name} holds no tensor")
    where = f"adapters {path} cannot be loaded into this generator"
    require_weights(where, tensors, "take another checkpoint of theirs")
    return tensors, metadata


# --- names ------------------------------------------------------------------------------------------------------------


def converted(transformer: nn.Module, tensors: dict[str, Tensor], path: str) -> dict[str, dict[str, Tensor]]:
    """Sort tensors by the transformer's own layers, whatever tool named them.

    Args:
        transformer: Transformer that the adapters are for; it may be on the meta device.
        tensors: Tensors by the names in the file.
        path: Path that the user named, for messages.

    Returns:
        For each layer its tensors, under ``A``, ``B`` and ``alpha``.

    Raises:
        VideoAlignError: Where the tensors are no LoRA of a transformer, or not all of them belong to this one.
    """
    _refuse_others(tensors, path)
    layers = linear_layers(transformer)
    known = by_any_name(layers, type(transformer).__name__)
    bare = _without("base_model.model.", list(tensors), path)
    for prefix in (DIFFUSERS, COMFYUI):
        bare = _without(prefix, bare, path)
    found: dict[str, dict[str, Tensor]] = {}
    foreign = []
    for name, short in zip(tensors, bare):
        entry = _ENTRY.fullmatch(short)
        layer = known.get(entry[1]) if entry else None
        if layer is None:
            foreign.append(name)
            continue
        kind, of_layer = entry[3] or _SIDES[entry[2]], found.setdefault(layer, {})
        if kind in of_layer:
            raise refusal(path, f"they hold {layer} twice, once as {name!r}")
        of_layer[kind] = tensors[name]
    if foreign:
        raise refusal(
            path,
            f"{len(foreign)} of their {len(tensors)} tensors do not belong to this transformer, such as "
            f"{listed(foreign)}; a name that does is {example_name(layers)!r}. They are of another model, or another "
            "tool's.",
        )
    return found


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first of some names in quotes, for messages.

    Args:
        names: All names.
        most: Number of names that are shown.
    """
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + more


def _refuse_others(tensors: dict[str, Tensor], path: str) -> None:
    """Refuse other kinds of adapters, and adapters of text encoders."""
    for mark, kind in _KINDS.items():
        if marked := [name for name in tensors if mark in name or (name.endswith(".diff") and mark == ".diff_b")]:
            found = f"{len(marked)} of {len(tensors)} tensors are {kind}, such as {marked[0]!r}"
            raise refusal(path, f"{found}; plain LoRA alone is supported")
    if foreign := [name for name in tensors if name.startswith(_ENCODERS)]:
        found = f"{len(foreign)} of {len(tensors)} tensors are the text encoder's, such as {foreign[0]!r}"
        raise refusal(path, f"{found}; only adapters of the transformer are supported")


def _without(prefix: str, names: list[str], path: str) -> list[str]:
    """Remove a prefix that all names have, or none; refuses a mixture, which no tool reads whole."""
    those = [name for name in names if name.startswith(prefix)]
    if those and len(those) < len(names):
        other = next(name for name in names if not name.startswith(prefix))
        raise refusal(
            path,
            f"{len(those)} of {len(names)} names begin with {prefix!r}, such as {those[0]!r}, and the rest do not, "
            f"such as {other!r}; write all of them in one tool's names",
        )
    return [name.removeprefix(prefix) for name in names]


def example_name(layers: list[str]) -> str:
    """Example of a name in a file of adapters: a layer of the transformer's first block.

    Args:
        layers: Names of the transformer's linear layers.
    """
    return f"{DIFFUSERS}{next((name for name in layers if '.0.' in name), layers[0])}.lora_A.weight"


def linear_layers(transformer: nn.Module) -> list[str]:
    """Names of the layers that adapters can be added to, or have been."""
    layers = (nn.Linear, BaseTunerLayer)
    return [n for n, m in transformer.named_modules() if isinstance(m, layers) and not _INSIDE.search(n)]
