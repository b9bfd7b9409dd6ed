"""Rows that are collected batch by batch, in memory, or in a file that is mapped into it where they are large."""

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

GIB = 2**30


class Rows:
    """Tensors (count, ...) that are filled from their first row on.

    A tensor that is larger than the bound lives in a file without a name: the system reads and writes its pages as they
    are needed, and the space is free again when the tensor is no longer used, or the process ends.

    Args:
        count: Number of rows.
        disk_above: Size in GiB above which a tensor lives on disk; None for never.
        folder: Folder of the files; it is made.
    """

    def __init__(self, count: int, disk_above: float | None, folder: str | Path) -> None:
        self.count, self.disk_above, self.folder = count, disk_above, Path(folder)
        self.tensors: dict[str, Tensor] = {}
        self._filled: dict[str, int] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Put rows behind those that there are.

        Args:
            name: Name of the tensor.
            values: Rows (B, ...) on any device.
        """
        if name not in self.tensors:
            self.tensors[name] = self._made((self.count, *values.shape[1:]), values.dtype)
        first = self._filled.get(name, 0)
        self.tensors[name][first : first + len(values)] = values.to("cpu")
        self._filled[name] = first + len(values)

    def _made(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel()
        if self.disk_above is None or size * dtype.itemsize <= self.disk_above * GIB:
            return torch.empty(shape, dtype=dtype)
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix="rollout-") as file:  # the mapping outlives the name
            # all blocks now: a full disk is an error here, and ends the process where a mapped page has no block
            os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
            return torch.from_file(file.name, shared=True, size=size, dtype=dtype).view(shape)
