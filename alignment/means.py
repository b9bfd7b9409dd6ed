"""Means of logged values over every sample of a step or an epoch: all ranks, all accumulated micro-batches.

Lightning's ``sync_dist`` truncates the number of samples to an integer before it divides it among the ranks (its issue
21859), so that means of unequal counts come out too large; here sums and counts are gathered as they are.
"""

import torch
from torch import Tensor


class Means:
    """Sums and counts by name. A name that ends in ``/max`` keeps the largest value in place of the mean."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # (2,): sum and count; or the largest value and count

    def add(self, name: str, values: Tensor, mask: Tensor | None = None) -> None:
        """Add values to a mean.

        Args:
            name: Name of the mean.
            values: Values of any shape.
            mask: True for the values that enter the mean, broadcasting over their shape; all of them if not given.
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
        """Means over all ranks; names without a value are left out. Collective: every rank must call it."""
        own = {name: row.tolist() for name, row in self._sums.items()}
        gathered = [own]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            gathered = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(gathered, own)
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
        """Drop all sums and counts."""
        self._sums = {}


def _joined(name: str, one: Tensor, other: Tensor) -> Tensor:
    both = one + other
    if name.endswith("/max"):
        both[0] = torch.maximum(one[0], other[0])
    return both
