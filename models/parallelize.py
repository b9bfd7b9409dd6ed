"""Sharding, outside the models: activation checkpointing belongs to the network, FSDP2 to this one function."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard


def shard(network: nn.Module, blocks: list[nn.Module], mesh: DeviceMesh) -> None:
    """Shard ``network`` with FSDP2 over the data-parallel mesh, in place: its blocks first, then the rest.

    Args:
        network: What is sharded.
        blocks: Submodules that are gathered one at a time, in forward order. Parameters that train must share one dtype
            within each (they are fp32, see :mod:`.precision`); frozen ones beside them may have another.
        mesh: The devices that the weights are spread over.
    """
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
