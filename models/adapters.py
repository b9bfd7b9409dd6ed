"""LoRA adapters from files, applied whole or refused.

diffusers ignores adapters that it does not know, and uses a part of those of a deeper model, with a warning
(huggingface/diffusers#11657). Here every tensor of the file must be in the transformer afterwards, bit for bit in the
transformer's own dtype, and every adapter layer must come from the file.

The update is ``alpha / rank * B A``. Where no alpha is stated, it is ``B A``, as in diffusers.
"""

import contextlib
import logging
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .adapter_files import Stated, converted, read_adapters, refusal
from .generator import EXPERTS, Generator
from .lora_specs import Loras, specs_of


@dataclass(frozen=True)
class Update:
    """Update of the weight of one layer, ``alpha / rank * B A``.

    Attributes:
        a: Tensor A, (rank, inputs).
        b: Tensor B, (outputs, rank).
        alpha: Numerator of the update's scale.
    """

    a: Tensor
    b: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Rank of the update."""
        return len(self.a)

    @property
    def scale(self) -> float:
        """Factor of B A."""
        return self.alpha / self.rank

    def baked(self) -> "Update":
        """The same update with its scale inside B, so that it needs no alpha."""
        return replace(self, b=self.b * self.scale, alpha=float(self.rank))


def read_updates(transformer: nn.Module, path: str | Path) -> tuple[dict[str, Update], Stated]:
    """Read the updates of a transformer's layers from a file of adapters, all of them or none.

    Layers whose A and B are both zero are left out: they fill up files for readers that want every layer (see
    :mod:`.lora_dialects`), and neither change a sample nor train.

    Args:
        transformer: Transformer that the adapters are for; it may be on the meta device.
        path: Folder with one safetensors file of adapters, that file, or a hub id. :mod:`.adapter_files` lists the
            names that are understood.

    Returns:
        Updates by the names of the transformer's layers, in fp32 or finer, and what the file states.

    Raises:
        VideoAlignError: Where a tensor of the file does not belong to the transformer, a layer lacks one of its two
            tensors, the file is damaged or empty, or it holds adapters of another kind than LoRA.
    """
    path = str(path)
    tensors, stated = read_adapters(path)
    found = converted(transformer, tensors, path)
    every = {layer: _fitting(transformer, layer, parts, stated, path) for layer, parts in found.items()}
    updates = {layer: update for layer, update in every.items() if update.a.any() or update.b.any()}
    if not updates:
        raise refusal(path, "all of their tensors are zero")
    return updates, stated


def _fitting(transformer: nn.Module, layer: str, parts: Mapping[str, Tensor], stated: Stated, path: str) -> Update:
    """The update of a layer; refuses tensors that do not fit.

    Args:
        transformer: Transformer that the adapters are for.
        layer: Name of the layer.
        parts: Tensors of the layer, under ``A``, ``B`` and ``alpha``.
        stated: Ranks and alphas that the file states.
        path: Path that the user named, for messages.
    """
    a, b = parts.get("A"), parts.get("B")
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
    if (own := parts.get("alpha")) is not None:
        if stated.alpha is not None or own.numel() != 1:
            raise refusal(path, f"{layer} has an alpha of its own beside the stated one, or one that is no number")
        alpha = float(own)
    if said != rank:
        raise refusal(path, f"they state rank {said}, but the tensors of {layer} have rank {rank}")
    return Update(a, b, alpha)


def expert_of(experts: Collection[str | None], said: str | None, asked: str | None, path: str) -> str | None:
    """Find the expert that adapters belong to: what their file says, what the user says, or the only one.

    Args:
        experts: Experts that are there; None alone for a generator without experts.
        said: Expert that the file states, if any.
        asked: Expert that the user named, if any.
        path: Path that the user named, for messages.

    Raises:
        VideoAlignError: Where the two contradict each other, nobody names one of two experts, or the generator was
            loaded without the expert.
    """
    if asked not in (None, *EXPERTS):
        raise refusal(path, f"expert={asked} is unknown; experts are {' and '.join(EXPERTS)}")
    if said and asked and said != asked:
        raise refusal(path, f"they are of the expert {said!r}, as their file states, but expert={asked} was asked for")
    expert = asked or said
    if None in experts:
        if expert:
            raise refusal(
                path, f"they are of the expert {expert!r} of two, but this generator has a single transformer"
            )
        return None
    if expert is None and len(experts) > 1:
        raise refusal(
            path,
            f"the generator has two experts, {' and '.join(EXPERTS)}, and the file states none; say which one by "
            f"{path},expert=high or {path},expert=low",
        )
    expert = expert or next(iter(experts))
    if expert not in experts:
        raise refusal(
            path, f"they are of the expert {expert!r}, but the generator was loaded with {next(iter(experts))!r} alone"
        )
    return expert


def transformers_of(generator: Generator) -> dict[str | None, nn.Module]:
    """Transformers of a generator by expert; one under None where it has no experts.

    Args:
        generator: Generator that was loaded with its transformer.
    """
    own = {generator.expert: generator.require("transformer")}
    if generator.other is None:
        return own
    return own | {next(name for name in EXPERTS if name != generator.expert): generator.other}


def folders_of(generator: Generator) -> dict[str | None, str]:
    """Names of the transformers' folders in a pipeline by expert; one under None where it has no experts.

    Args:
        generator: Generator, with or without weights.
    """
    if generator.boundary is None:
        return {None: "transformer"}
    return dict(zip(EXPERTS, ("transformer", "transformer_2")))


def load_adapters(
    generator: Generator, path: str | Path, scale: float = 1.0, expert: str | None = None, name: str = "default"
) -> None:
    """Apply LoRA adapters to a generator, whole. They add to those that were loaded before under other names.

    Args:
        generator: Generator to change.
        path: Folder with one safetensors file of adapters, that file, or a hub id. :mod:`.adapter_files` lists the
            names that are understood.
        scale: Factor of the update.
        expert: Expert that the adapters belong to, of a generator with two; what the file states if not given.
        name: Name of the adapters in peft.

    Raises:
        VideoAlignError: Where the adapters do not fit, see :func:`read_updates`, or are of another expert.
    """
    path, experts = str(path), transformers_of(generator)
    updates, stated = read_updates(next(iter(experts.values())), path)
    transformer = experts[expert_of(experts, stated.expert, expert, path)]
    _inject(transformer, updates, name, path)
    active = list(transformer.peft_config)
    for module in transformer.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(active)
            module.set_scale(name, scale)
    transformer.requires_grad_(False)
    _verify(transformer, updates, scale, name, path)


def apply_loras(generator: Generator, loras: Loras) -> None:
    """Apply LoRA adapters that a user names, one set after another.

    Args:
        generator: Generator to change.
        loras: Adapters in the form of :data:`.lora_specs.FORM`: none, one, or several.

    Raises:
        VideoAlignError: Where the words cannot be read, or adapters do not fit, see :func:`load_adapters`.
    """
    for number, spec in enumerate(specs_of(loras)):
        name = f"lora{number}" if number else "default"
        load_adapters(generator, spec.path, spec.scale, spec.expert, name)


def settings_of(updates: Mapping[str, Update]) -> dict[str, object]:
    """Arguments of peft's ``LoraConfig`` for updates, ranks and alphas of single layers included.

    Args:
        updates: Updates by layer, at least one.
    """
    first = next(iter(updates.values()))
    ranks = {f"^{re.escape(layer)}": u.rank for layer, u in updates.items() if u.rank != first.rank}
    alphas = {f"^{re.escape(layer)}": u.alpha for layer, u in updates.items() if u.alpha != first.alpha}
    return {
        "r": first.rank,
        "lora_alpha": first.alpha,
        "target_modules": sorted(updates),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }


def tensors_of(updates: Mapping[str, Update]) -> dict[str, Tensor]:
    """Tensors of updates by peft's names, ``X.lora_A.weight`` and ``X.lora_B.weight``."""
    return {f"{layer}.lora_{side}.weight": t for layer, u in updates.items() for side, t in (("A", u.a), ("B", u.b))}


def _inject(transformer: nn.Module, updates: dict[str, Update], name: str, path: str) -> None:
    """Give the tensors to diffusers with the rank and alpha of each layer."""
    settings = settings_of(updates)
    try:
        with unreported():
            transformer.load_lora_adapter(tensors_of(updates), prefix=None, metadata=settings, adapter_name=name)
    except Exception as error:  # diffusers and peft raise errors of many kinds
        raise refusal(path, f"diffusers refuses them ({str(error).splitlines()[0][:200]})") from error


@contextlib.contextmanager
def unreported() -> Iterator[None]:
    """Silence what diffusers and peft report of adapters during a block: this module refuses what is wrong."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)  # several are meant
            yield
    finally:
        logger.setLevel(level)


def _verify(transformer: nn.Module, updates: dict[str, Update], scale: float, name: str, path: str) -> None:
    """Check that every tensor is in the transformer, at the stated scale, and that no adapter layer is left random."""
    every = {layer: m for layer, m in transformer.named_modules() if isinstance(m, BaseTunerLayer)}
    adapted = {layer: module for layer, module in every.items() if name in module.lora_A}
    wrong = sorted(adapted.keys() ^ updates.keys())
    for layer, update in updates.items():
        if (module := adapted.get(layer)) is None:
            continue
        weights = ((module.lora_A[name].weight, update.a), (module.lora_B[name].weight, update.b))
        same = all(torch.equal(weight, tensor.to(weight)) for weight, tensor in weights)
        active = name in module.active_adapters and not module.disable_adapters
        if not same or not active or module.scaling[name] != scale * update.alpha / update.rank:
            wrong.append(layer)
    if wrong:
        raise refusal(
            path,
            f"after loading, {len(wrong)} of {len(updates)} layers do not hold what the file holds, such as "
            f"{wrong[0]}; the versions of diffusers and peft do not work together",
        )
