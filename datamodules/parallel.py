"""Parallel work in other processes: results come in order, and inputs are read only a little ahead."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import TypeVar

from .. import stopping

X, Y = TypeVar("X"), TypeVar("Y")


@contextlib.contextmanager
def pool(workers: int) -> Iterator[Executor]:
    """Processes for :func:`in_order`. They finish their current items, and end with this process however it ends.

    Args:
        workers: Number of processes.
    """
    executor = ProcessPoolExecutor(workers, initializer=stopping.follow_parent)
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


def in_order(pool: Executor | None, function: Callable[[X], Y], items: Iterable[X], ahead: int = 32) -> Iterator[Y]:
    """Results of ``function`` in the order of ``items``.

    ``Executor.map`` would read all items at once, which for shards means the whole set.

    Args:
        pool: Processes; None calls the function in this one.
        function: Function of one item.
        items: Items, which are read as their turn comes near.
        ahead: Largest number of items that are read before their turn.
    """
    if pool is None:
        yield from map(function, items)
        return
    waiting: deque = deque()
    try:
        for item in items:
            stopping.check()
            waiting.append(pool.submit(function, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
