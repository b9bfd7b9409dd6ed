"""Sharding, outside the models: activation checkpointing belongs to the network, FSDP2 to this one function."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard


def shard(network: nn.Module, blocks: list[nn.Module], mesh: DeviceMesh) -> None:
    """Shard ``network`` with FSDP2 over the data-parallel mesh, in place: its blocks first, then the rest.

    Args:
        blocks: submodules that are gathered one at a time, in forward order; parameters in a block or in the rest must
            share one dtype, so modules kept in fp32 beside a bf16 backbone are blocks of their own.
    """
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
