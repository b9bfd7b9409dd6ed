"""What a training step holds in memory, counted on shapes: the real module's own step under torch's fake tensors.

Nothing is estimated by formulas but what lies outside of the step: DDP's buckets, and what FSDP2 gathers.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from ..models.live_memory import REST, LiveMemory, size_of
from .parameter_groups import build_optimizer
from .training import Training

GRADIENTS, MOMENTS = "gradients", "moments"
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""Dtypes of autocast, by the trainer's precision."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A module's weights by their use, in bytes."""

    frozen: int
    """Frozen weights and buffers of the networks that a step runs."""
    trained: int
    """Weights that train."""
    reference: int
    """The frozen copy that losses compare with, where the reference is no set of adapters that is left out."""
    apart: int
    """Weights that a step does not run and no strategy shards, such as the autoencoder's."""
    largest: int
    """The block that FSDP2 gathers with the most weights."""
    outside: int
    """Weights outside of the blocks, which FSDP2 keeps gathered through a step."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Memory of one training step on one device, in bytes, and its floating-point operations."""

    weights: Weights
    gradients: int
    """Gradients of all that trains."""
    moments: int
    """State of the optimizer."""
    held_gradients: int
    """Gradients at the peak of forward and backward pass."""
    activations: int
    """Everything else at the peak of forward and backward pass: activations, their gradients, casts, temporaries."""
    updating: int
    """Temporaries at the optimizer's peak."""
    flops: int
    """Operations of a micro-batch's forward and backward pass, what checkpointing repeats included."""

    def peak(self, shards: int = 1, buckets: bool = False) -> int:
        """Highest sum of a step.

        Args:
            shards: Number of devices that FSDP2 shards weights, gradients and moments over.
            buckets: Whether DDP holds gradients a second time, to exchange them.
        """
        weights = self.weights
        sharded = weights.frozen + weights.trained + weights.reference + self.moments
        gathered = 0
        if shards > 1:  # two blocks: the one that computes, and the next one
            gathered = 2 * weights.largest + weights.outside
        base = weights.apart + sharded / shards + buckets * self.gradients
        passes = self.held_gradients / shards + gathered + self.activations
        return round(base + max(passes, (self.gradients + self.updating) / shards))


class _Known(TorchDispatchMode):
    """Computes on tensors that have values, such as seeds, and answers 0 where code asks for a value that is not there.

    So the step draws noise of its seeds, sees which reference errors are cached, and finds its loss finite.
    """

    def __torch_dispatch__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_value, (args, kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if given and not any(isinstance(tensor, FakeTensor) for tensor in given):
            with torch._C._DisableTorchDispatch():
                return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except DataDependentOutputException:
            if function is not torch.ops.aten._local_scalar_dense.default:
                raise
            return args[0].dtype.is_floating_point and 0.0


def _value(leaf: Any) -> Any:
    """The value of a tensor that was made of numbers, and anything else as it is."""
    return leaf.constant if isinstance(leaf, FakeTensor) and leaf.constant is not None else leaf


class _Flops(TorchDispatchMode):
    """Sums floating-point operations by torch's own formulas.

    torch's ``FlopCounterMode`` also follows the modules, by hooks that keep the activations of checkpointed blocks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if count := flop_registry.get(function._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


@contextlib.contextmanager
def without_storage(module: nn.Module) -> Iterator[None]:
    """Give a module's tensors shapes on the CPU, but no storage; what is computed in the block has none either.

    Args:
        module: Module on the meta device.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _Known():
        flags = {name: p.requires_grad for name, p in module.named_parameters()}
        module.to_empty(device="cpu")
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(flags[name])
        yield


def measure(
    module: Training,
    batch: Callable[[], dict[str, Any]],
    *,
    precision: str = "32-true",
    accumulated: bool = False,
    foreach: bool | None = None,
) -> Footprint:
    """Count one optimizer step, as Lightning takes it: with the moments and the gradients that the last one left.

    Args:
        module: Module that trains, with tensors of any kind; see :func:`without_storage`.
        batch: Makes a micro-batch, on the module's device.
        precision: The trainer's precision.
        accumulated: Whether a step has several micro-batches, so that gradients are there in their passes.
        foreach: Whether optimizers that leave it open update all tensors at once, as they do on GPUs, at the price of
            memory.
    """
    memory = LiveMemory()
    trained = list(module.trained().values())
    mark = partial(memory.mark, GRADIENTS)
    hooks = [p.register_post_accumulate_grad_hook(lambda p: mark([p.grad])) for p in trained]
    with memory:
        memory.mark("weights", [*module.parameters(), *module.buffers()])
        optimizer, _ = build_optimizer(module.optimizer, module.trained(), module.members(), module.groups)
        for group in optimizer.param_groups:
            if "foreach" in group and group["foreach"] is None and not group.get("fused"):
                group["foreach"] = foreach
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        mark(p.grad for p in trained)
        gradients = memory.live[GRADIENTS]
        optimizer.step()
        memory.mark(MOMENTS, (t for state in optimizer.state.values() for t in tree_leaves(state) if _tensor(t)))
        memory.reset()
        with _Flops() as counter:
            _passes(module, batch(), precision, None if accumulated else optimizer)
        passes = dict(memory.peak)
        memory.reset()
        optimizer.step()
        updating = memory.peak[REST]
    for hook in hooks:
        hook.remove()
    return Footprint(
        weights=weights_of(module),
        gradients=gradients,
        moments=memory.live.get(MOMENTS, 0),
        held_gradients=passes[GRADIENTS],
        activations=passes[REST],
        updating=updating,
        flops=counter.total,
    )


def _passes(module: Training, batch: dict[str, Any], precision: str, optimizer: torch.optim.Optimizer | None) -> None:
    """Forward and backward pass of a micro-batch.

    Between them Lightning drops the gradients of the last step; a step's first micro-batch gets the optimizer for it.
    """
    with torch.autocast("cpu", AUTOCAST.get(precision), enabled=precision in AUTOCAST):
        loss = module.training_step(batch, 0)
    if optimizer:
        optimizer.zero_grad()
    loss.backward()
    del loss, batch
    gc.collect()


def _tensor(thing: object) -> bool:
    return isinstance(thing, Tensor)


def weights_of(module: Training) -> Weights:
    """A module's weights by their use.

    Args:
        module: Module that trains.
    """
    copy = getattr(module, "reference", None)
    network = module.policy if hasattr(module, "policy") else module.network
    blocks = blocks_of(module)
    everything = [*module.parameters(), *module.buffers()]
    used = [*network.parameters(), *network.buffers()]
    inside = {id(p) for block in blocks for p in block.parameters()}
    trained = size_of(p for p in network.parameters() if p.requires_grad)
    reference = size_of([*copy.parameters(), *copy.buffers()]) if copy is not None else 0
    return Weights(
        frozen=size_of(used) - trained,
        trained=trained,
        reference=reference,
        apart=size_of(everything) - size_of(used) - reference,
        largest=max((size_of(block.parameters()) for block in blocks), default=0),
        outside=size_of(p for p in network.parameters() if id(p) not in inside),
    )


def blocks_of(module: Training) -> list[nn.Module]:
    """The blocks of a generator's transformer that a module trains, which FSDP2 gathers one at a time.

    Args:
        module: Module that trains a transformer, or a reward made of its first blocks.
    """
    transformer = module.policy if hasattr(module, "policy") else module.network.trunk
    return list(getattr(transformer, module.generator.blocks))
