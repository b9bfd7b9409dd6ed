"""LoRA adapters in files: their tensors, rank and alpha, and the names that several tools give to them.

The following names are understood, with ``X`` for a linear layer:

    transformer.X.lora_A.weight           diffusers, and the exports of this package
    base_model.model.X.lora_A.weight      peft; ``adapter_config.json`` beside the file states rank and alpha
    X.lora_A.default.weight               plain peft, and DiffSynth-Studio, which uses the original Wan names
    diffusion_model.X.lora_A.weight       ComfyUI, with original names, or ``lora_down`` and ``lora_up``
    lora_unet_X.lora_down.weight          kohya's tools (musubi-tuner), with underscores for dots

Original names are converted by diffusers only. Nothing is unpickled.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .. import VideoAlignError
from .checksums import check_seal
from .finite import require_weights
from .generator import Generator
from .hub import resolved

FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""Names of the files of diffusers and peft. A file with another name is read if it is the only one in its folder."""
METADATA = "lora_adapter_metadata"
"""Key under which diffusers keeps rank and alpha in a file's metadata."""
_SIDES = re.compile(r"\.(lora_A|lora_B|lora_down|lora_up)(\.default)?\.weight$")
_KINDS = {
    "lora_magnitude_vector": "DoRA",
    "dora_scale": "DoRA",
    ".lokr_": "LoKr",
    ".hada_": "LoHa",
    ".oft_": "OFT",
    ".diff": "full differences",
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
    """

    rank: int | None = None
    alpha: float | None = None
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)

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


def converted(generator: Generator, tensors: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """Convert the names of tensors to a transformer's own: ``X.lora_A.weight``, ``X.lora_B.weight``, ``X.alpha``.

    Args:
        generator: Generator with the transformer.
        tensors: Tensors by the names in the file.
        path: Path that the user named, for messages.

    Raises:
        VideoAlignError: Where the tensors are no LoRA of a transformer, or their names cannot be converted.
    """
    _refuse_others(tensors, path)
    names = {name: re.sub(r"(lora_[AB])\.default\.weight$", r"\1.weight", name) for name in tensors}
    if len(set(names.values())) == len(names):
        tensors = {names[name]: t for name, t in tensors.items()}
    tensors = _without("base_model.model.", tensors, path)
    original = any(".self_attn." in name or ".cross_attn." in name for name in tensors)
    if original and not any(name.startswith("diffusion_model.") for name in tensors):
        tensors = {f"diffusion_model.{name}": t for name, t in tensors.items()}
    for prefix in ("diffusion_model.", "lora_unet_"):
        if _all(prefix, tensors, path):
            tensors = _by_diffusers(generator, tensors, path)
    return _without("transformer.", tensors, path)


def _refuse_others(tensors: dict[str, Tensor], path: str) -> None:
    """Refuse other kinds of adapters, and adapters of text encoders."""
    for mark, kind in _KINDS.items():
        if marked := [name for name in tensors if mark in name]:
            found = f"{len(marked)} of {len(tensors)} tensors are {kind}, such as {marked[0]!r}"
            raise refusal(path, f"{found}; plain LoRA alone is supported")
    if foreign := [name for name in tensors if name.startswith(_ENCODERS)]:
        found = f"{len(foreign)} of {len(tensors)} tensors are the text encoder's, such as {foreign[0]!r}"
        raise refusal(path, f"{found}; only adapters of the transformer are supported")


def _by_diffusers(generator: Generator, tensors: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """Let diffusers convert original names; refuses a conversion that fails or loses tensors."""
    count = sum(bool(_SIDES.search(name)) for name in tensors)
    own = f"this transformer's names, such as {example_name(generator)!r}"
    try:
        result = type(generator.pipeline).lora_state_dict(dict(tensors))
    except Exception as error:  # a converter fails in many ways on names that it was not written for
        example, why = next(iter(tensors)), str(error).splitlines()[0][:160]
        all_of_them = f"their {len(tensors)} tensors, such as {example!r},"
        raise refusal(path, f"diffusers cannot convert {all_of_them} to {own} ({why})") from None
    if count != sum(bool(_SIDES.search(name)) for name in result):
        raise refusal(path, f"diffusers converts only a part of their {count} tensors to {own}")
    return result


def _all(prefix: str, tensors: dict[str, Tensor], path: str) -> bool:
    """Whether all names begin with a prefix; refuses a mixture, which no tool reads whole."""
    those = [name for name in tensors if name.startswith(prefix)]
    if those and len(those) < len(tensors):
        other = next(name for name in tensors if not name.startswith(prefix))
        raise refusal(
            path,
            f"{len(those)} of {len(tensors)} names begin with {prefix!r}, such as {those[0]!r}, and the rest do not, "
            f"such as {other!r}; write all of them in one tool's names",
        )
    return bool(those)


def _without(prefix: str, tensors: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """Remove a prefix that all names have, or none."""
    same = _all(prefix, tensors, path)
    return {name.removeprefix(prefix): t for name, t in tensors.items()} if same else tensors


def example_name(generator: Generator) -> str:
    """Example of a name that belongs to a generator's transformer: a layer of its first block."""
    layer = next(name for name in linear_layers(generator.transformer) if name.startswith(f"{generator.blocks}."))
    return f"transformer.{layer}.lora_A.weight"


def linear_layers(transformer: nn.Module) -> list[str]:
    """Names of the layers that adapters can be added to."""
    return [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
