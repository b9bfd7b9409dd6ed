"""Sharding of networks with FSDP2, outside the models."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard


def shard(network: nn.Module, blocks: list[nn.Module], mesh: DeviceMesh) -> None:
    """Shard a network with FSDP2 over a data-parallel mesh, in place: its blocks first, then the rest.

    Args:
        network: Network to shard.
        blocks: Submodules that are gathered one at a time, in forward order. The trained parameters of a block must
            have one dtype (they are fp32, see :mod:`.precision`); its frozen ones may have another.
        mesh: Devices that the weights are distributed over.
    """
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
