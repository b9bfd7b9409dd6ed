"""A strategy that splits the tokens of each sample over several GPUs, for clips whose activations do not fit on one."""

from collections.abc import Mapping, Sequence
from datetime import timedelta

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .. import VideoAlignError
from ..models.parallelize import shard, split_tokens


class ContextParallel(ModelParallelStrategy):
    """FSDP2 in which a group of GPUs shares each sample: every GPU computes a share of its tokens.

    diffusers splits the tokens (``enable_parallelism``) and exchanges them in attention. The weights are sharded over
    all GPUs. Batch size, steps and held-out metrics count samples, so they depend on ``data_parallel_size`` alone.

    Args:
        data_parallel_size: Number of groups that get different samples, at least 1.
        ulysses_degree: Number of GPUs of a group between which attention heads and tokens are exchanged (Ulysses); it
            must divide the number of heads. 1 turns it off.
        ring_degree: Number of GPUs of a group around which keys and values are passed (ring attention); it needs an
            attention backend that returns the normaliser, such as ``_native_cudnn`` or ``flash``
            (``model.memory.attention``). 1 turns it off.
        anything: Whether token counts that the group does not divide are allowed; slower.
        save_distributed_checkpoint: Whether each process writes its own part of a checkpoint, which becomes a folder.
        minutes: Minutes after which a process that waits for the others gives up, above 0.
    """

    def __init__(
        self,
        data_parallel_size: int = 1,
        ulysses_degree: int = 1,
        ring_degree: int = 1,
        anything: bool = False,
        save_distributed_checkpoint: bool = True,
        minutes: float = 30.0,
    ) -> None:
        sizes = {
            "data_parallel_size": data_parallel_size,
            "ulysses_degree": ulysses_degree,
            "ring_degree": ring_degree,
        }
        if small := [name for name, size in sizes.items() if size < 1]:
            raise VideoAlignError(f"ContextParallel.{small[0]} must be at least 1, got {sizes[small[0]]}")
        if ulysses_degree * ring_degree == 1:
            raise VideoAlignError(
                "ContextParallel shares each sample among ulysses_degree x ring_degree GPUs, and both are 1; set one "
                "of them, or use ModelParallelStrategy (experiments/flow/fsdp2.yaml)"
            )
        if anything and ulysses_degree > 1 and ring_degree > 1:
            raise VideoAlignError("ContextParallel.anything works with ulysses_degree or ring_degree, not with both")
        if not minutes > 0:
            raise VideoAlignError(f"ContextParallel.minutes must be above 0, got {minutes}")
        # Lightning calls the second dimension of its mesh tensor-parallel; what it means is that the ranks along it get
        # the same samples
        super().__init__(
            data_parallel_size,
            ulysses_degree * ring_degree,
            save_distributed_checkpoint,
            timeout=timedelta(minutes=minutes),
        )
        self.degrees, self.anything = (data_parallel_size, ring_degree, ulysses_degree), anything

    def setup_environment(self) -> None:
        """Start the processes' connections, and order the devices by data, ring and ulysses."""
        super().setup_environment()
        kind, names = self.root_device.type, ("data_parallel", "ring", "ulysses")
        self.context_mesh: DeviceMesh = init_device_mesh(kind, self.degrees, mesh_dim_names=names)
        self.whole_mesh: DeviceMesh = init_device_mesh(kind, (self.world_size,), mesh_dim_names=("all",))

    @property
    def copies(self) -> int:
        """Number of processes that share each sample."""
        return self.degrees[1] * self.degrees[2]


def parallelize(nets: Mapping[nn.Module, Sequence[nn.Module]], strategy: ModelParallelStrategy) -> None:
    """Shard transformers under a strategy, and split their tokens where it is :class:`ContextParallel`.

    Args:
        nets: Blocks of each transformer, in forward order.
        strategy: The Trainer's strategy, with its processes started.

    Raises:
        VideoAlignError: Where the tokens of a transformer cannot be split.
    """
    if isinstance(strategy, ContextParallel):
        for net, blocks in nets.items():
            split_tokens(net, strategy.context_mesh, strategy.anything)
            shard(net, list(blocks), strategy.whole_mesh, strategy.copies)
    else:
        for net, blocks in nets.items():
            shard(net, list(blocks), strategy.device_mesh["data_parallel"])
