"""Which ranks of a run get samples of their own."""

from typing import Any


def data_ranks(trainer: Any) -> tuple[int, int]:
    """The place of this process among those that get samples of their own, and their number.

    Under ModelParallelStrategy several ranks may work on the same samples: those along the other dimensions of its
    mesh, such as the ranks that share a sample's tokens (:class:`~videoalign.alignment.ContextParallel`).

    Args:
        trainer: The Trainer, with its processes started.
    """
    mesh = getattr(trainer.lightning_module, "device_mesh", None)
    if mesh is None:
        return trainer.global_rank, trainer.world_size
    return mesh["data_parallel"].get_local_rank(), mesh["data_parallel"].size()
