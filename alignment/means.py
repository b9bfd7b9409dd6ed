"""Means of what is logged, over every sample of a step or of an epoch: all ranks, all accumulated batches.

Lightning's ``sync_dist`` cuts the number of samples to a whole one before it divides it among the ranks (its issue
21859), so that means of unequal counts come out too large; here sums and counts are gathered as they are.
"""

import torch
from torch import Tensor


class Means:
    """Sums and counts by name. A name that ends in ``/max`` keeps the largest value in place of the mean."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # (2,): sum and count; or the largest value and count

    def add(self, name: str, values: Tensor, mask: Tensor | None = None) -> None:
        """Take in values.

        Args:
            name: what they are.
            values: any shape.
            mask: which of them count, broadcasting over their shape; all if not given.
        """
        values = values.detach().double()
        mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.broadcast_to(values.shape)
        if name.endswith("/max"):
            total = values.masked_fill(~mask, -torch.inf).amax() if values.numel() else values.new_tensor(-torch.inf)
        else:
            total = torch.where(mask, values, 0.0).sum()
        row = torch.stack([total, mask.sum().double()])
        if (before := self._sums.get(name)) is not None:
            row = _joined(name, before, row)
        self._sums[name] = row

    def compute(self) -> dict[str, float]:
        """Means over all ranks; names for which nothing counts are left out. Collective: every rank must call it."""
        found = {name: row.tolist() for name, row in self._sums.items()}
        gathered = [found]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            gathered = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(gathered, found)
        total: dict[str, Tensor] = {}
        for part in gathered:
            for name, row in part.items():
                row = torch.tensor(row, dtype=torch.double)
                total[name] = _joined(name, total[name], row) if name in total else row
        return {
            name: float(row[0] if name.endswith("/max") else row[0] / row[1])
            for name, row in total.items()
            if row[1] > 0
        }

    def reset(self) -> None:
        """Forget everything."""
        self._sums = {}


def _joined(name: str, one: Tensor, other: Tensor) -> Tensor:
    both = one + other
    if name.endswith("/max"):
        both[0] = torch.maximum(one[0], other[0])
    return both
