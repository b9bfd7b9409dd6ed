"""LoRA adapters from files, as several tools name them: applied whole, or refused.

diffusers ignores adapters that it does not know, and uses a part of those of a deeper model, with a warning
(huggingface/diffusers#11657). Here every tensor of the file must be in the transformer afterwards, bit for bit in the
transformer's own dtype, and every adapter layer must have come from the file.

Names that are understood, ``X`` being a linear layer:

    transformer.X.lora_A.weight           diffusers, and what this package exports
    base_model.model.X.lora_A.weight      peft; ``adapter_config.json`` beside it states rank and alpha
    X.lora_A.default.weight               plain peft, and DiffSynth-Studio, which uses the original Wan names
    diffusion_model.X.lora_A.weight       ComfyUI, with original names, or ``lora_down`` and ``lora_up``
    lora_unet_X.lora_down.weight          kohya's tools (musubi-tuner), with underscores for dots

Original names are converted by diffusers alone. The update is ``alpha / rank * B A``; where no alpha is stated, it is
``B A``, as diffusers has it.
"""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .. import VideoAlignError
from .checksums import check_seal
from .finite import require_weights
from .generator import Generator

FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""How diffusers and peft call their file; another name is taken where it is the only one."""
METADATA = "lora_adapter_metadata"
"""Key under which diffusers keeps rank and alpha in a file's metadata."""
_SIDES = re.compile(r"\.(lora_A|lora_B|lora_down|lora_up)(\.default)?\.weight$")
_KINDS = {
    "lora_magnitude_vector": "DoRA", "dora_scale": "DoRA", ".lokr_": "LoKr", ".hada_": "LoHa", ".oft_": "OFT", ".diff": "full differences",
}  # fmt: skip
_ENCODERS = ("text_encoder.", "text_encoder_2.", "lora_te", "text_model.")
_UNSUPPORTED = {
    "use_dora": False,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "bias": "none",
    "modules_to_save": None,
}
"""Settings of peft that change what an update means, and the values that are read here."""


@dataclass
class _Stated:
    """Rank and alpha as a file states them, for all layers and by patterns of names; None where it is silent."""

    rank: int | None = None
    alpha: float | None = None
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, settings: Mapping[str, Any], path: str) -> "_Stated":
        """The settings of a ``LoraConfig``."""
        if other := [
            f"{key}: {settings[key]}" for key, ours in _UNSUPPORTED.items() if (settings.get(key) or ours) != ours
        ]:
            raise VideoAlignError(
                f"adapters {path} are of a kind that is not supported ({', '.join(other)}); plain LoRA is"
            )
        try:
            return cls(
                int(settings["r"]),
                float(settings["lora_alpha"]),
                dict(settings.get("rank_pattern") or {}),
                dict(settings.get("alpha_pattern") or {}),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise VideoAlignError(
                f"adapters {path} state no rank (r) and alpha (lora_alpha) as numbers ({error})"
            ) from None

    def of(self, layer: str, rank: int) -> tuple[int, float]:
        """Rank and alpha of a layer whose tensors have a rank."""
        stated = self.ranks.get(get_pattern_key(self.ranks, layer), self.rank)
        alpha = self.alphas.get(get_pattern_key(self.alphas, layer), self.alpha)
        return rank if stated is None else stated, rank if alpha is None else alpha


def load_adapters(generator: Generator, path: str | Path) -> None:
    """Apply LoRA adapters to a generator's transformer, whole.

    Args:
        generator: Generator to change.
        path: Folder with one safetensors file of adapters, that file, or a hub id.

    Raises:
        VideoAlignError: where a tensor of the file does not belong to the transformer, a layer lacks one of its two, the
            file is damaged or empty, or it holds adapters of another kind than LoRA.
    """
    path = str(path)
    file = _file_of(path)
    tensors, stated = _read(file, path)
    found = _converted(generator, tensors, path)
    transformer = generator.require("transformer")
    layers = _fitting(generator, found, list(tensors), stated, path)
    _inject(transformer, found, layers, path)
    _verify(transformer, found, layers, path)


def _refusal(path: str, why: str) -> VideoAlignError:
    """The error that says why adapters are not used."""
    return VideoAlignError(f"adapters {path} cannot be loaded into this generator: {why}")


def _file_of(path: str) -> Path:
    """The one safetensors file of a folder, a file itself, or one of a hub id's."""
    place = Path(path)
    if not place.exists():
        try:
            place = Path(snapshot_download(path, allow_patterns=["*.safetensors", "adapter_config.json"]))
        except Exception as error:  # whatever the hub's client says
            why = str(error).splitlines()[0][:160]
            raise _refusal(path, f"it is neither a folder or file nor a hub id that could be reached ({why})") from None
    if place.is_file():
        if place.suffix != ".safetensors":
            raise _refusal(path, "only safetensors files are read, nothing is unpickled; convert it first")
        return place
    known = [place / name for name in FILES if (place / name).is_file()]
    held = known or sorted(place.glob("*.safetensors"))
    if not held:
        raise _refusal(path, f"the folder holds no safetensors file, such as {FILES[0]}")
    if len(held) > 1:
        raise _refusal(path, f"the folder holds {', '.join(p.name for p in held[:4])}; name the one that is meant")
    return held[0]


def _read(file: Path, path: str) -> tuple[dict[str, Tensor], _Stated]:
    """A file's tensors in fp32 or finer, and what it or its ``adapter_config.json`` states."""
    check_seal(file)
    try:
        with safe_open(file, "pt") as content:
            tensors = {name: content.get_tensor(name) for name in sorted(content.keys())}
            metadata = content.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise _refusal(path, f"{file.name} is damaged or no safetensors file ({error})") from None
    if not tensors:
        raise _refusal(path, f"{file.name} holds no tensor")
    require_weights(
        f"adapters {path} cannot be loaded into this generator", tensors, "take another checkpoint of theirs"
    )
    config = file.parent / "adapter_config.json"
    try:
        said = [json.loads(config.read_text(encoding="utf-8"))] if config.is_file() else []
        if METADATA in metadata:
            said.append({k.removeprefix("transformer."): v for k, v in json.loads(metadata[METADATA]).items()})
    except (OSError, ValueError, AttributeError) as error:
        raise _refusal(path, f"rank and alpha cannot be read ({error})") from None
    if not all(isinstance(settings, dict) for settings in said):
        raise _refusal(path, f"{config} is no configuration of peft")
    stated = [_Stated.read(settings, path) for settings in said] or [_Stated()]
    if stated[0] != stated[-1]:
        raise _refusal(path, f"{config.name} and the metadata of {file.name} state different ranks or alphas")
    return {
        name: t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for name, t in tensors.items()
    }, stated[0]


def _converted(generator: Generator, tensors: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """The tensors by this transformer's own names: ``X.lora_A.weight``, ``X.lora_B.weight``, ``X.alpha``."""
    for mark, kind in _KINDS.items():
        if marked := [name for name in tensors if mark in name]:
            raise _refusal(
                path,
                f"{len(marked)} of {len(tensors)} tensors are {kind}, such as {marked[0]!r}; plain LoRA alone is supported",
            )
    if foreign := [name for name in tensors if name.startswith(_ENCODERS)]:
        raise _refusal(
            path,
            f"{len(foreign)} of {len(tensors)} tensors are the text encoder's, such as {foreign[0]!r}; only adapters of the "
            "transformer are supported",
        )
    names = {name: re.sub(r"(lora_[AB])\.default\.weight$", r"\1.weight", name) for name in tensors}
    if len(set(names.values())) == len(names):
        tensors = {names[name]: t for name, t in tensors.items()}
    tensors = _without("base_model.model.", tensors, path)
    original = any(".self_attn." in name or ".cross_attn." in name for name in tensors)
    if original and not any(name.startswith("diffusion_model.") for name in tensors):
        tensors = {f"diffusion_model.{name}": t for name, t in tensors.items()}
    for prefix in ("diffusion_model.", "lora_unet_"):
        if _all(prefix, tensors, path):
            count = sum(bool(_SIDES.search(name)) for name in tensors)
            try:
                tensors = type(generator.pipeline).lora_state_dict(dict(tensors))
            except Exception as error:  # a converter fails in many ways on what it was not made for
                example = next(iter(tensors))
                raise _refusal(
                    path,
                    f"diffusers cannot convert their {len(tensors)} tensors, such as {example!r}, to this transformer's "
                    f"names, such as {_example(generator)!r} ({str(error).splitlines()[0][:160]})",
                ) from None
            if count != sum(bool(_SIDES.search(name)) for name in tensors):
                raise _refusal(
                    path,
                    f"diffusers converts only a part of their {count} tensors to this transformer's names, such as "
                    f"{_example(generator)!r}",
                )
    return _without("transformer.", tensors, path)


def _all(prefix: str, tensors: dict[str, Tensor], path: str) -> bool:
    """Whether all names begin with a prefix; where only some do, the file is a mixture that nobody reads whole."""
    those = [name for name in tensors if name.startswith(prefix)]
    if those and len(those) < len(tensors):
        other = next(name for name in tensors if not name.startswith(prefix))
        raise _refusal(
            path,
            f"{len(those)} of {len(tensors)} names begin with {prefix!r}, such as {those[0]!r}, and the rest do not, such as "
            f"{other!r}; write all of them in one tool's names",
        )
    return bool(those)


def _without(prefix: str, tensors: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """Tensors by their names without a prefix that all of them have, or none."""
    same = _all(prefix, tensors, path)
    return {name.removeprefix(prefix): t for name, t in tensors.items()} if same else tensors


def _example(generator: Generator) -> str:
    """A name that belongs to the transformer: of its first block's first layer."""
    layer = next(name for name in _linear(generator.transformer) if name.startswith(f"{generator.blocks}."))
    return f"transformer.{layer}.lora_A.weight"


def _linear(transformer: nn.Module) -> list[str]:
    """Names of the layers that adapters may stand beside."""
    return [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]


def _fitting(
    generator: Generator, found: dict[str, Tensor], names: list[str], stated: _Stated, path: str
) -> dict[str, tuple[int, float]]:
    """Rank and alpha of every layer that gets an adapter; refuses what does not belong or does not fit.

    Args:
        generator: Generator whose transformer is to be changed.
        found: Tensors by the transformer's own names.
        names: Names in the file, for messages.
        stated: Ranks and alphas that the file states.
        path: What the user named, for messages.
    """
    transformer = generator.transformer
    known = set(_linear(transformer))
    stems = {name: re.sub(r"\.(lora_[AB]\.weight|alpha)$", "", name) for name in found}
    if foreign := [name for name, stem in stems.items() if stem == name or stem not in known]:
        as_written = [name for name in names if name.replace(".default.", ".").endswith(foreign[0])]
        raise _refusal(
            path,
            f"{len(foreign)} of their {len(found)} tensors do not belong to this transformer, such as "
            f"{(as_written or [f'transformer.{foreign[0]}'])[0]!r}; a name that does is {_example(generator)!r}. They are of another model, or "
            "another tool's.",
        )
    layers: dict[str, tuple[int, float]] = {}
    for layer in dict.fromkeys(stems.values()):
        a, b = (found.get(f"{layer}.lora_{side}.weight") for side in "AB")
        if a is None or b is None:
            raise _refusal(path, f"{layer} has no lora_{'A' if a is None else 'B'}, so its update is not whole")
        module = transformer.get_submodule(layer)
        shapes, rank = (tuple(a.shape), tuple(b.shape)), len(a)
        if shapes != ((rank, module.in_features), (module.out_features, rank)) or not rank:
            raise _refusal(
                path,
                f"lora_A and lora_B of {layer} have the shapes {shapes[0]} and {shapes[1]}, but this transformer takes "
                f"(rank, {module.in_features}) and ({module.out_features}, rank). They are of a model of another width, or damaged.",
            )
        said, alpha = stated.of(layer, rank)
        if (own := found.get(f"{layer}.alpha")) is not None:
            if stated.alpha is not None or own.numel() != 1:
                raise _refusal(path, f"{layer} has an alpha of its own beside the stated one, or one that is no number")
            alpha = float(own)
        if said != rank:
            raise _refusal(path, f"they state rank {said}, but the tensors of {layer} have rank {rank}")
        layers[layer] = rank, alpha
    return layers


def _inject(transformer: nn.Module, found: dict[str, Tensor], layers: dict[str, tuple[int, float]], path: str) -> None:
    """Hand the tensors to diffusers with each layer's rank and alpha."""
    rank, alpha = next(iter(layers.values()))
    settings = {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(layers),
        "rank_pattern": {f"^{re.escape(layer)}": r for layer, (r, _) in layers.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(layer)}": a for layer, (_, a) in layers.items() if a != alpha},
    }
    weights = {name: t for name, t in found.items() if not name.endswith(".alpha")}
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # what it would say is a refusal here
    try:
        transformer.load_lora_adapter(weights, prefix=None, metadata=settings, adapter_name="default")
    except Exception as error:  # whatever diffusers and peft say
        raise _refusal(path, f"diffusers refuses them ({str(error).splitlines()[0][:200]})") from error
    finally:
        logger.setLevel(level)
    transformer.requires_grad_(False)


def _verify(transformer: nn.Module, found: dict[str, Tensor], layers: dict[str, tuple[int, float]], path: str) -> None:
    """Every tensor must be in the transformer, at the stated scale, and every adapter layer must be filled."""
    adapted = {name: m for name, m in transformer.named_modules() if isinstance(m, BaseTunerLayer)}
    wrong = sorted(adapted.keys() ^ layers.keys())
    for name, (rank, alpha) in layers.items():
        if (module := adapted.get(name)) is None:
            continue
        weights = {side: getattr(module, f"lora_{side}")["default"].weight for side in "AB"}
        same = all(torch.equal(w, found[f"{name}.lora_{side}.weight"].to(w)) for side, w in weights.items())
        active = module.active_adapters == ["default"] and not module.disable_adapters
        if not same or not active or module.scaling["default"] != alpha / rank:
            wrong.append(name)
    if wrong:
        raise _refusal(
            path,
            f"after loading, {len(wrong)} of {len(layers)} layers do not hold what the file holds, such as {wrong[0]}; "
            "the versions of diffusers and peft do not work together",
        )
