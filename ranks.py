"""One message for a distributed run that ends early: the rank on which it happened prints it, as the last line.

Without this every rank prints a traceback, and the last one is that of a rank that only lost its connection.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

ENDED, STATUS, HEARD = "videoalign/ended", "videoalign/status", "videoalign/heard"
"""Keys in the store that all ranks of a run share."""
WAIT = 5.0
"""Seconds for which ranks wait for each other at the end."""
children: list[subprocess.Popen] = []
"""Ranks that this process has started."""


def is_rank() -> bool:
    """Whether this process was started as one of several ranks of a run."""
    return "LOCAL_RANK" in os.environ


def speaks(status: int, only_lost: bool) -> tuple[int, str | None]:
    """Agree among all ranks which one prints the message, and close the connections, so that the others end too.

    Args:
        status: Exit status of this rank.
        only_lost: Whether this rank only lost its connection to another one.

    Returns:
        The run's exit status, and the name of this rank if it prints the message: empty where there is only one
        process, None for a rank that ends without a message.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2:
        return status, ""
    rank, others, store = dist.get_rank(), dist.get_world_size() - 1, dist.distributed_c10d._get_default_store()
    first, told = _claim(store, status)
    if not first and told is None:  # the rank that owns the store has ended, after its message if it had one
        status, name = (status, None) if only_lost else (status, f"rank {rank}")
    else:
        status, name = (status, f"rank {rank}") if first else (told or status, None)
    with contextlib.suppress(Exception):
        _let_go(dist)
    with contextlib.suppress(Exception):
        if first:
            _wait(lambda: store.add(HEARD, 0) >= others)
        else:
            store.add(HEARD, 1)
    if name is None:
        _wait_for_children()
    return status, name


def _claim(store: Any, status: int) -> tuple[bool, int | None]:
    """Whether this rank is the first to end, and the first one's status; None where the store no longer answers."""
    try:
        store.set_timeout(timedelta(seconds=WAIT))
        if store.add(ENDED, 1) == 1:
            store.set(STATUS, str(status))
            return True, status
        return False, int(store.get(STATUS))
    except Exception:
        return False, None


def _let_go(dist: Any) -> None:
    """Close the connections, so that ranks that wait for this one get an error and end too."""
    if dist.get_backend() == "nccl":
        dist.distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()


def _wait(done: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT
    while not done() and time.monotonic() < end:
        time.sleep(0.02)


def _wait_for_children() -> None:
    """Let the first rank of a machine, which started the others, end after them: a shell waits for this one only."""
    _wait(lambda: all(process.poll() is not None for process in children))
