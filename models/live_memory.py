"""The memory of a computation, counted by what it is for, with real tensors or with shapes alone.

:class:`LiveMemory` counts the storages that operations return, until they are freed. Under torch's ``FakeTensorMode``
tensors have shapes but no storage behind them, so that counting the step of a large generator takes minutes, but no
memory. torch's own ``MemTracker`` copies a table for each of the modules at every operation, and asks for one root
module, which a policy and its reference do not have; so it is not used.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

REST = "activations"
"""Kind of what an operation returns, until :meth:`LiveMemory.mark` says otherwise."""


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of live tensors by their kind, and remembers their highest sum.

    What an operation uses inside of itself, an allocator's rounding and fragmentation are not seen.

    Attributes:
        live: Bytes that are held now, by kind.
        peak: Bytes by kind at the time when their sum was highest.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[str, int] = {REST: 0}
        self.peak = dict(self.live)
        self._kinds: WeakIdKeyDictionary = WeakIdKeyDictionary()

    @property
    def highest(self) -> int:
        """Bytes at the peak, all kinds together."""
        return sum(self.peak.values())

    def reset(self) -> None:
        """Forget the peak."""
        self.peak = dict(self.live)

    def mark(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Say what tensors are for.

        Args:
            kind: Their kind.
            tensors: Tensors, seen before or not. Tensors that share a storage count once.
        """
        for tensor in tensors:
            storage = tensor.untyped_storage()
            before = self._kinds.get(storage)
            if before is None:
                weakref.finalize(storage, self._freed, weakref.ref(self), box := [kind], storage.nbytes())
                self._kinds[storage] = box
            else:
                self.live[before[0]] -= storage.nbytes()
                before[0] = kind
            self.live[kind] = self.live.get(kind, 0) + storage.nbytes()
        if sum(self.live.values()) > self.highest:
            self.peak = dict(self.live)

    @staticmethod
    def _freed(counter: "weakref.ref[LiveMemory]", kind: list[str], size: int) -> None:
        if (memory := counter()) is not None:
            memory.live[kind[0]] -= size

    def __torch_dispatch__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count what it returns."""
        out = function(*args, **(kwargs or {}))
        new = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.untyped_storage() not in self._kinds]
        if new:
            self.mark(REST, new)
        return out


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors; those that share a storage count once.

    Args:
        tensors: Tensors with or without storage, also on the meta device.
    """
    storages = {id(s): s for t in tensors for s in [t.untyped_storage()]}
    return sum(storage.nbytes() for storage in storages.values())
