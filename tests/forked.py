"""Several processes as the ranks of one run, forked from one that has imported everything: imports take most of a test's time."""

import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def on_ranks(world: int, work: Callable[[], None]) -> None:
    """Call ``work`` on that many processes and wait for them; ends this one where one of them fails.

    Not from a process that has computed gradients: torch's threads do not outlive a fork.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children = []
    for rank in range(world):
        if not (child := os.fork()):
            if world > 1:
                os.environ.update(
                    LOCAL_RANK=str(rank),
                    NODE_RANK="0",
                    WORLD_SIZE=str(world),
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=port,
                )
            try:
                work()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            sys.stdout.flush()
            os._exit(0)
        children.append(child)
    if any(os.waitpid(child, 0)[1] for child in children):
        sys.exit(1)


def forked(script: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run a script that calls :func:`on_ranks`; it may import this module."""
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
