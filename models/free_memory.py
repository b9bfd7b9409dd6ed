"""Memory that is free on a device, and what a computation takes of it."""

from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from .live_memory import LiveMemory

_CGROUP = Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; in a container of Linux at most what its limit leaves.

    Args:
        device: A GPU, or anything else for the main memory.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = psutil.virtual_memory().available
    try:
        limit, used = ((_CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - int(used)))


def peak_of(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call holds at its peak, beside what is held before it.

    Args:
        call: What is called, once.
        device: Where it computes.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with LiveMemory() as memory:
        call()
    return memory.highest
