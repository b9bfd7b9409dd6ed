"""Which ranks of a run get samples of their own, and what all of them have found."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch

K, V = TypeVar("K"), TypeVar("V")


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


def merged(found: Mapping[K, V]) -> dict[K, V]:
    """The entries of all ranks; of those under the same key, the last rank's. Collective: every rank must call it.

    Args:
        found: This rank's entries; what they hold is pickled.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return dict(found)
    parts: list[Mapping[K, V]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, dict(found))
    return {key: value for part in parts for key, value in part.items()}
