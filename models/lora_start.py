"""Adapters of a generator's transformer that train, from nothing or from a file of adapters.

Training that goes on from a file has two sets of adapters in peft: ``default``, which trains, and the frozen copy
:data:`.generator.START`, which :meth:`.generator.Generator.without_adapters` puts in its place. So the reference of DPO
is the generator with the adapters that it started from, not the generator without any; an export holds ``default``
alone, whole and usable by itself.
"""

import math

import torch
from peft import LoraConfig
from torch import nn

from .. import VideoAlignError
from .adapter_files import listed
from .adapters import Update, expert_of, read_updates, unreported
from .generator import START, Generator
from .lora import LoRA, linear_names
from .precision import train_in_float32


def add_adapters(generator: Generator, lora: LoRA) -> LoraConfig:
    """Add adapters to a generator's transformer, in place; they train in fp32, and everything else is frozen.

    Args:
        generator: Generator to change.
        lora: Settings of the adapters.

    Returns:
        The configuration of the adapters in peft.

    Raises:
        VideoAlignError: Where a target selects no layer, or ``lora.start`` does not fit the generator or the settings.
    """
    policy = generator.require("transformer")
    names = [name for name in linear_names(policy, lora.targets) if generator.adaptable(name)]
    updates = _start(generator, lora, names) if lora.start else {}
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names)
    policy.add_adapter(config)
    train_in_float32(policy)
    if updates:
        with unreported():
            policy.add_adapter(LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=names), START)
        policy.set_adapter("default")
        _copy(policy, updates)
    return config


def _start(generator: Generator, lora: LoRA, names: list[str]) -> dict[str, Update]:
    """Updates of the file that training goes on from; refuses one that the settings contradict.

    Args:
        generator: Generator whose transformer trains.
        lora: Settings of the adapters.
        names: Layers that ``lora.targets`` selects.
    """
    transformer, path = generator.transformer, str(lora.start)
    updates, stated = read_updates(transformer, path)
    expert_of({generator.expert: transformer}, stated.expert, None, path)
    for key, wanted in (("rank", lora.rank), ("alpha", lora.alpha)):
        found = sorted({getattr(update, key) for update in updates.values()})
        if len(found) > 1 or not math.isclose(found[0], wanted, rel_tol=1e-6):  # files state alpha in fp32
            remedy = f"set lora.{key}: {found[0]:g}" if len(found) == 1 else "take adapters with one for all layers"
            held = ", ".join(f"{value:g}" for value in found[:4])
            raise VideoAlignError(f"lora.{key} is {wanted:g}, but lora.start {path} has {key} {held}; {remedy}")
    more, less = sorted(updates.keys() - set(names)), sorted(set(names) - updates.keys())
    if more or less:
        words = [f"it also has {listed(more)}" if more else "", f"it lacks {listed(less)}" if less else ""]
        ends = sorted({layer.partition("blocks.")[2].partition(".")[2] or layer for layer in updates})
        raise VideoAlignError(
            f"lora.targets {lora.targets} select {len(names)} layers, but lora.start {path} has adapters on "
            f"{len(updates)}: {' and '.join(filter(None, words))}; set lora.targets: [{', '.join(ends)}]"
        )
    return updates


@torch.no_grad()
def _copy(policy: nn.Module, updates: dict[str, Update]) -> None:
    """Put updates into the adapters that train and into the frozen ones, both in fp32."""
    for layer, update in updates.items():
        module = policy.get_submodule(layer)
        for side, tensor in ((module.lora_A, update.a), (module.lora_B, update.b)):
            for name in ("default", START):
                weight = side[name].weight
                weight.data = tensor.to(weight.device, torch.float32, copy=True)
