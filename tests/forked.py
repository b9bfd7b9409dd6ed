"""Several processes as the ranks of one run.

They are forked from one that has imported everything, because imports take most of a test's time.
"""

import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

THREE_STEPS = {
    "accelerator": "cpu", "max_steps": 3, "val_check_interval": 3, "check_val_every_n_epoch": None,
    "limit_val_batches": 1.0, "num_sanity_val_steps": 0, "gradient_clip_val": 1.0,
    "use_distributed_sampler": False, "logger": False,
    "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
}  # fmt: skip
"""Options of a trainer that clips, takes three steps and validates once; datamodules share the data out themselves."""


def strategy(kind: str):
    """The trainer's strategy for one process ("single") or for two ("ddp", "fsdp2")."""
    from lightning.pytorch.strategies import ModelParallelStrategy

    sharded = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    return {"single": "auto", "ddp": "ddp", "fsdp2": sharded}[kind]


def on_ranks(world: int, work: Callable[[], None]) -> None:
    """Call ``work`` in several processes and wait for them; where one of them fails, this one ends too.

    A process that has computed gradients must not call it: torch's threads do not outlive a fork.

    Args:
        world: Number of processes; each finds its rank in the environment, as torchrun sets it.
        work: What each process does.
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
    return started(sys.executable, "-c", script, *arguments, timeout=400, PYTHONPATH=paths)


def started(*command: object, timeout: int = 300, **environment: str) -> subprocess.CompletedProcess:
    """Run a program whose processes compute in one thread each; its output is text."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, timeout=timeout, env=environment)
