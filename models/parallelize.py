"""Sharding of networks outside the models: weights with FSDP2, and the tokens of a sample over several GPUs."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from diffusers import ContextParallelConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from .. import VideoAlignError


def shard(network: nn.Module, blocks: list[nn.Module], mesh: DeviceMesh, copies: int = 1) -> None:
    """Shard a network with FSDP2 over a mesh, in place: its blocks first, then the rest.

    Args:
        network: Network to shard.
        blocks: Submodules that are gathered one at a time, in forward order. The trained parameters of a block must
            have one dtype (they are fp32, see :mod:`.precision`); its frozen ones may have another.
        mesh: Devices that the weights are distributed over.
        copies: Number of devices of the mesh that share each sample. Each has the gradient of its own tokens, so these
            are summed, while those of different samples are averaged.
    """
    for module in [*blocks, network]:
        fully_shard(module, mesh=mesh)
        if copies > 1:
            # summed by the devices and divided afterwards, which every backend can do
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(mesh.size() / copies)


def shard_again(network: nn.Module) -> None:
    """Let FSDP2 gather the weights outside the blocks anew; call it before weights are read or written by name.

    After a forward without gradients it keeps them gathered: they are then no shards, and the next forward would go on
    with them whatever is written to the shards.

    Args:
        network: A network, or a module that holds some; those that are not sharded are left alone.
    """
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors in the main memory of rank 0, for the part of a checkpoint that rank 0 writes. Collective.

    Args:
        tensors: Tensors by name, which may be sharded.

    Returns:
        The tensors by name; nothing on the other ranks, whose copies nobody would write.
    """
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    found = {}
    for name, tensor in tensors.items():  # one after another, so that a device holds one whole tensor at most
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if first:
            found[name] = whole.detach().cpu()
    return found


def dealt_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A copy of a tensor on a parameter's device and in its dtype, sharded as the parameter is.

    Args:
        value: A whole tensor, the same one on all ranks, or one that is sharded as the parameter is.
        parameter: The parameter.
    """
    if isinstance(parameter, DTensor) and not isinstance(value, DTensor):
        # each rank cuts its own part out of what it has read
        value = distribute_tensor(
            value.to(parameter.dtype), parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    return value.to(parameter.device, parameter.dtype, copy=True)


def split_tokens(network: nn.Module, mesh: DeviceMesh, anything: bool = False) -> None:
    """Let each device of a mesh compute a share of every sample's tokens, in place (diffusers' context parallelism).

    Every device must be given the same samples, noise and times; each returns the whole output. The gradient that a
    device finds for a parameter is that of its own tokens.

    Args:
        network: Transformer of diffusers.
        mesh: Devices, along the dimensions ``ring`` and ``ulysses``.
        anything: Whether token counts that the devices do not divide are allowed.

    Raises:
        VideoAlignError: Where the transformer has no plan for it, its heads or its attention cannot be split, or the
            devices are CPUs.
    """
    ring, ulysses = mesh["ring"].size(), mesh["ulysses"].size()
    kind, heads = type(network).__name__, network.config.num_attention_heads
    plan = getattr(network, "_cp_plan", None)
    if plan is None:
        raise VideoAlignError(f"diffusers has no plan to split the tokens of a {kind} over devices; use FSDP2 alone")
    if any("mask" in str(name) for name in plan.get("", {})):  # in 0.42 each device has its heads, but a mask for all
        raise VideoAlignError(
            f"diffusers cannot split the tokens of a {kind} over devices: its masks of prompts do not follow; use "
            "FSDP2 alone"
        )
    if heads % ulysses and not anything:
        raise VideoAlignError(
            f"trainer.strategy: ulysses_degree {ulysses} does not divide the {heads} attention heads of the transformer"
        )
    if not torch.accelerator.device_count():
        raise VideoAlignError("context parallelism needs accelerators: diffusers counts them, and there is none")
    uneven = {f"{name}_anything": anything for name, n in (("ring", ring), ("ulysses", ulysses)) if n > 1}
    config = ContextParallelConfig(ring_degree=ring, ulysses_degree=ulysses, mesh=mesh["ring", "ulysses"], **uneven)
    try:
        network.enable_parallelism(config=config)
    except ValueError as error:
        raise VideoAlignError(f"context parallelism: {error}") from error
    if not anything:
        network.register_forward_pre_hook(partial(_check_tokens, ring * ulysses), with_kwargs=True)


def _check_tokens(devices: int, network: nn.Module, arguments: tuple, named: dict[str, Any]) -> None:
    """Refuse latents (B, C, F, H, W) or tokens (B, N, C) that cannot be dealt out evenly; diffusers only asserts."""
    x = arguments[0] if arguments else named["hidden_states"]
    patch = network.config.patch_size
    sides = patch if isinstance(patch, list | tuple) else (getattr(network.config, "patch_size_t", 1), patch, patch)
    tokens = x.shape[1] if x.ndim == 3 else math.prod(n // p for n, p in zip(x.shape[2:], sides))
    if tokens % devices:
        raise VideoAlignError(
            f"each sample has {tokens} tokens, which {devices} devices do not share evenly: choose another size of the "
            "videos or number of devices, or set anything: true under trainer.strategy (ContextParallel)"
        )
