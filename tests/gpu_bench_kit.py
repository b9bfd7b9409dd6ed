"""Rows of the GPU benchmark that need no torch, for the processes that its tests start."""

import os


class OutOfMemoryError(RuntimeError):
    """An error of torch's name."""


def works(place, note):
    """A row that leaves a line behind, so that a second run shows."""
    with open(place.folder / "ran", "a") as file:
        file.write(f"{note}\n")
    times = {"seconds": 1.0, "fastest": 0.5, "slowest": 2.0, "steps": 5}
    counts = {"tokens": 10, "token": "tokens", "flops": {"needed": 2e12, "executed": 4e12, "parts": []}}
    return {**times, **counts, "what": "step", "peak_gib": None}


def raises(place):
    """A row with an error."""
    raise ValueError("no such kernel\nin detail")


def out_of_memory(place):
    """A row that is too large."""
    raise OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")


def dies(place):
    """A row whose process is killed."""
    os._exit(9)
