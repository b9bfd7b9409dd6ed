"""The tables of `videoalign plan`."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..alignment.footprint import Footprint

GIB = 2**30
NOT_COUNTED = (
    "Not counted: the CUDA context (about 0.5 GiB), the allocator's fragmentation, what kernels use inside, gradient "
    "clipping, and sampling at validation."
)


@dataclass(frozen=True)
class About:
    """What is planned.

    Attributes:
        title: What trains, in words, line by line.
        gpus: Number of GPUs that DDP and FSDP2 are counted for.
        micro_batches: Micro-batches of an optimizer step, on each GPU.
        checkpointing: Whether the experiment computes activations again.
        average: Bytes of a moving average of the trained weights.
    """

    title: tuple[str, ...]
    gpus: int
    micro_batches: int
    checkpointing: bool
    average: int


def strategies(about: About, footprint: Footprint) -> dict[str, int]:
    """Peak bytes of a GPU by strategy.

    Args:
        about: What is planned.
        footprint: What a step holds.
    """
    return {
        "one GPU": footprint.peak() + about.average,
        f"DDP, {about.gpus} GPUs": footprint.peak(buckets=True) + about.average,
        f"FSDP2, {about.gpus} GPUs": footprint.peak(shards=about.gpus) + about.average // about.gpus,
    }


_ROWS: dict[str, Callable[[Footprint], int]] = {
    "frozen weights": lambda f: f.weights.frozen,
    "trained weights": lambda f: f.weights.trained,
    "reference's copy": lambda f: f.weights.reference,
    "autoencoder": lambda f: f.weights.apart,
    "gradients": lambda f: f.gradients,
    "moments": lambda f: f.moments,
    "activations": lambda f: f.activations,
    "optimizer's temporaries": lambda f: f.updating,
}


def record(about: About, counted: Mapping[bool, Footprint]) -> dict[str, Any]:
    """All numbers as plain values, in bytes.

    Args:
        about: What is planned.
        counted: What a step holds, by whether activations are computed again.
    """
    return {
        **asdict(about),
        "steps": {
            "checkpointing" if again else "no checkpointing": {
                **asdict(footprint),
                "peak": strategies(about, footprint),
                "flops": footprint.flops * about.micro_batches,
            }
            for again, footprint in counted.items()
        },
    }


def table(about: About, counted: Mapping[bool, Footprint]) -> str:
    """The tables as text.

    Args:
        about: What is planned.
        counted: What a step holds, by whether activations are computed again.
    """
    heads = {again: ("" if again else "no ") + "checkpointing" for again in counted}
    heads[about.checkpointing] += "*"
    lines = [*about.title, "", f"{'GiB on one GPU':28}" + "".join(f"{head:>20}" for head in heads.values())]
    lines += [_row(name, [of(one) / GIB for one in counted.values()]) for name, of in _ROWS.items()]
    if about.average:
        lines.append(_row("moving average", [about.average / GIB] * len(counted)))
    lines += ["", "peak of a step"]
    peaks = [strategies(about, one) for one in counted.values()]
    lines += [_row(f"  {name}", [peak[name] / GIB for peak in peaks]) for name in peaks[0]]
    flops = [one.flops * about.micro_batches / 1e12 for one in counted.values()]
    lines += ["", _row("TFLOP of a step, each GPU", flops), "", "* the experiment's own setting.", NOT_COUNTED]
    return "\n".join(lines)


def _row(name: str, values: list[float]) -> str:
    return f"{name:28}" + "".join(f"{value:20,.2f}" for value in values)
