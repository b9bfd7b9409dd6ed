"""LoRA adapters through peft, on chosen parts of a model (Hu et al., 2021; VideoAlign, Tables 10 and 11)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from .. import VideoAlignError


@dataclass(kw_only=True)
class LoRA:
    """Settings of LoRA adapters."""

    rank: int = 64
    """Rank of the low-rank update of each layer, at least 1; 64 in the paper."""
    alpha: float = 128
    """Numerator of the update's scale alpha / rank, above 0; 128 in the paper."""
    dropout: float = 0.0
    """Dropout probability on the adapters' input, in [0, 1); 0 in the paper, 0.05 in the official script."""
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    """Names of the linear layers that get adapters, or the ends of their names, such as ``q_proj``; ``all-linear``
    means every linear layer of the adapted part."""
    start: str | None = None
    """Folder, file or hub id of LoRA adapters that a generator's training goes on from, and that are its reference; if
    not given, training begins without an update. Rank, alpha and targets must be those of the file."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise VideoAlignError(f"lora.rank must be positive, got {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise VideoAlignError(
                f"lora.alpha must be positive and finite, got {self.alpha}: it scales the whole update"
            )
        if not 0 <= self.dropout < 1:
            raise VideoAlignError(f"lora.dropout must be in [0, 1), got {self.dropout}")


def linear_names(model: nn.Module, targets: Sequence[str], inside: str = "", without: Sequence[str] = ()) -> list[str]:
    """Full names of the linear layers that targets select.

    Args:
        model: Model that holds the layers.
        targets: Ends of layer names, or ``all-linear``.
        inside: Submodule that is searched; empty for the whole model.
        without: Submodules that are left out.

    Raises:
        VideoAlignError: Where a target selects no layer; lists the names that exist.
    """
    modules = model.get_submodule(inside).named_modules()
    names = [f"{inside}.{n}".lstrip(".") for n, m in modules if isinstance(m, nn.Linear)]
    names = [n for n in names if not f"{n}.".startswith(tuple(f"{w}." for w in without))]
    if unknown := [t for t in targets if t != "all-linear" and not any(f".{n}".endswith(f".{t}") for n in names)]:
        ends = sorted({".".join(n.split(".")[-2:]) if n.split(".")[-1].isdigit() else n.split(".")[-1] for n in names})
        raise VideoAlignError(
            f"lora.targets {unknown} match no linear layer{f' of {inside}' if inside else ''}. There are: {ends}"
        )
    every = "all-linear" in targets
    return [n for n in names if every or any(f".{n}".endswith(f".{t}") for t in targets)]


def add_lora(model: nn.Module, lora: LoRA, parts: list[str], without: Sequence[str] = ()) -> None:
    """Insert adapters into linear layers of a model, in place.

    Args:
        model: Model to change.
        lora: Settings of the adapters.
        parts: Names of the submodules whose layers get adapters.
        without: Names of submodules inside the parts that get none.

    Raises:
        VideoAlignError: Where a target selects no linear layer of a part; lists the names that exist. Or where a start
            is given.
    """
    if lora.start is not None:
        raise VideoAlignError("lora.start is for generators; adapters of a reward begin without an update")
    names = [name for part in parts for name in linear_names(model, lora.targets, part, without)]
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names)
    # peft freezes everything that is no adapter; other parameters that trained before must go on training
    training = [p for p in model.parameters() if p.requires_grad]
    inject_adapter_in_model(config, model)
    model.peft_lora_config = config
    for parameter in training:
        parameter.requires_grad_(True)


def merge_lora(state: dict[str, Tensor], lora: LoRA) -> dict[str, Tensor]:
    """Fold adapters into the weights of their layers, W + alpha / rank * B A, computed in fp32.

    Args:
        state: State dict with adapters.
        lora: Settings of the adapters.

    Returns:
        The state dict of the model without adapters, in the dtypes of its weights.
    """
    merged = {}
    for name, tensor in state.items():
        if ".lora_" in name:
            continue
        stem = name.removesuffix("base_layer.weight")
        if stem != name:
            a, b = (state[f"{stem}lora_{side}.default.weight"].float() for side in "AB")
            tensor = (tensor.float() + lora.alpha / lora.rank * (b @ a)).to(tensor.dtype)
        merged[name.replace(".base_layer.", ".")] = tensor
    return merged
