"""LoRA adapters from files, applied whole or refused.

diffusers ignores adapters that it does not know, and uses a part of those of a deeper model, with a warning
(huggingface/diffusers#11657). Here every tensor of the file must be in the transformer afterwards, bit for bit in the
transformer's own dtype, and every adapter layer must come from the file.

The update is ``alpha / rank * B A``. Where no alpha is stated, it is ``B A``, as in diffusers.
"""

import logging
import re
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .adapter_files import Stated, converted, example_name, linear_layers, read_adapters, refusal
from .generator import Generator


def load_adapters(generator: Generator, path: str | Path) -> None:
    """Apply LoRA adapters to a generator's transformer, whole.

    Args:
        generator: Generator to change.
        path: Folder with one safetensors file of adapters, that file, or a hub id. :mod:`.adapter_files` lists the
            names that are understood.

    Raises:
        VideoAlignError: Where a tensor of the file does not belong to the transformer, a layer lacks one of its two
            tensors, the file is damaged or empty, or it holds adapters of another kind than LoRA.
    """
    path = str(path)
    tensors, stated = read_adapters(path)
    found = converted(generator, tensors, path)
    transformer = generator.require("transformer")
    layers = _fitting(generator, found, list(tensors), stated, path)
    _inject(transformer, found, layers, path)
    _verify(transformer, found, layers, path)


def _fitting(
    generator: Generator, found: dict[str, Tensor], names: list[str], stated: Stated, path: str
) -> dict[str, tuple[int, float]]:
    """Rank and alpha of every layer that gets an adapter; refuses tensors that do not belong or do not fit.

    Args:
        generator: Generator whose transformer is changed later.
        found: Tensors by the transformer's own names.
        names: Names in the file, for messages.
        stated: Ranks and alphas that the file states.
        path: Path that the user named, for messages.
    """
    transformer = generator.transformer
    known = set(linear_layers(transformer))
    stems = {name: re.sub(r"\.(lora_[AB]\.weight|alpha)$", "", name) for name in found}
    if foreign := [name for name, stem in stems.items() if stem == name or stem not in known]:
        as_written = [name for name in names if name.replace(".default.", ".").endswith(foreign[0])]
        example = (as_written or [f"transformer.{foreign[0]}"])[0]
        raise refusal(
            path,
            f"{len(foreign)} of their {len(found)} tensors do not belong to this transformer, such as {example!r}; a "
            f"name that does is {example_name(generator)!r}. They are of another model, or another tool's.",
        )
    layers: dict[str, tuple[int, float]] = {}
    for layer in dict.fromkeys(stems.values()):
        a, b = (found.get(f"{layer}.lora_{side}.weight") for side in "AB")
        if a is None or b is None:
            raise refusal(path, f"{layer} has no lora_{'A' if a is None else 'B'}, so its update is not whole")
        module = transformer.get_submodule(layer)
        shapes, rank, (wide, high) = (tuple(a.shape), tuple(b.shape)), len(a), (module.in_features, module.out_features)
        if shapes != ((rank, wide), (high, rank)) or not rank:
            raise refusal(
                path,
                f"lora_A and lora_B of {layer} have the shapes {shapes[0]} and {shapes[1]}, but this transformer takes "
                f"(rank, {wide}) and ({high}, rank). They are of a model of another width, or damaged.",
            )
        said, alpha = stated.of(layer, rank)
        if (own := found.get(f"{layer}.alpha")) is not None:
            if stated.alpha is not None or own.numel() != 1:
                raise refusal(path, f"{layer} has an alpha of its own beside the stated one, or one that is no number")
            alpha = float(own)
        if said != rank:
            raise refusal(path, f"they state rank {said}, but the tensors of {layer} have rank {rank}")
        layers[layer] = rank, alpha
    return layers


def _inject(transformer: nn.Module, found: dict[str, Tensor], layers: dict[str, tuple[int, float]], path: str) -> None:
    """Give the tensors to diffusers with the rank and alpha of each layer."""
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
    logger.setLevel(logging.CRITICAL)  # this module refuses what diffusers only reports
    try:
        transformer.load_lora_adapter(weights, prefix=None, metadata=settings, adapter_name="default")
    except Exception as error:  # diffusers and peft raise errors of many kinds
        raise refusal(path, f"diffusers refuses them ({str(error).splitlines()[0][:200]})") from error
    finally:
        logger.setLevel(level)
    transformer.requires_grad_(False)


def _verify(transformer: nn.Module, found: dict[str, Tensor], layers: dict[str, tuple[int, float]], path: str) -> None:
    """Check that every tensor is in the transformer, at the stated scale, and that no adapter layer is left random."""
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
        raise refusal(
            path,
            f"after loading, {len(wrong)} of {len(layers)} layers do not hold what the file holds, such as {wrong[0]}; "
            "the versions of diffusers and peft do not work together",
        )
