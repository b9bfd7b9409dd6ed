"""Work in other processes, in order, without reading far ahead."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from typing import TypeVar

X, Y = TypeVar("X"), TypeVar("Y")


def in_order(pool: Executor | None, function: Callable[[X], Y], items: Iterable[X], ahead: int = 32) -> Iterator[Y]:
    """Results of ``function`` in the order of ``items``.

    ``Executor.map`` would read all items at once, which for shards means the whole set.

    Args:
        pool: None works in this process. ahead: most items that are read before their turn.
    """
    if pool is None:
        yield from map(function, items)
        return
    waiting: deque = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
