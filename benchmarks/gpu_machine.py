"""The machine that rows are measured on, and the speed of its matrix products."""

import os
import statistics
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from gpu_place import Place
from gpu_timing import GIB, device, timed

PACKAGES = ("torch", "lightning", "transformers", "diffusers", "peft")
PUBLISHED = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 operations a second by the maker's data sheet (SXM modules), by a part of the device's name."""


def machine(place: Place) -> dict[str, Any]:
    """The device's name and memory, the packages, and two peaks of bf16: published, and measured.

    Args:
        place: Where models and sets are; a toy multiplies small matrices.
    """
    where = device()
    cuda = where.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else f"CPU, {os.cpu_count()} cores"
    size = 256 if place.toy else 8192
    a, b = (torch.randn(size, size, device=where, dtype=torch.bfloat16) for _ in range(2))
    seconds = statistics.median(timed(lambda: a @ b, 20, warmup=5))
    return {
        "device": name,
        "memory_gib": torch.cuda.get_device_properties(0).total_memory / GIB if cuda else None,
        "published_peak": next((peak for part, peak in PUBLISHED.items() if part in name), None),
        "measured_peak": 2 * size**3 / seconds,
        "matmul": size,
        "packages": {package: _version(package) for package in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
