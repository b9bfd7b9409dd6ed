"""A process of its own that measures rows, so that a row that fails, or is killed, costs no other."""

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import time
import traceback
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gpu_place import Place

LEFT = 0.25
"""GiB that a row may leave behind on the GPU; a process that holds more is replaced."""


def perform(place: Place, function: str, given: dict[str, Any]) -> dict[str, Any]:
    """Measure a row in this process.

    Args:
        place: Where models and sets are.
        function: Module and function of the row.
        given: Arguments of the function beside the place.

    Returns:
        What the function found, or its ``error``; with the seconds that all of it took, and the memory it left.
    """
    begun = time.perf_counter()
    module, name = function.split(":")
    _reset_peak()
    try:
        result = dict(getattr(import_module(module), name)(place, **given))
    except Exception as error:
        traceback.print_exc()
        result = _failure(error)
    result["took"] = time.perf_counter() - begun
    return result | _freed()


def _failure(error: Exception) -> dict[str, Any]:
    """What is recorded of an error: its kind and the beginning of its text."""
    text = " ".join(str(error).split())
    memory = "OutOfMemory" in type(error).__name__
    found: dict[str, Any] = {"error": f"{type(error).__name__}: {text}"[:400], "out_of_memory": memory}
    if (torch := _cuda()) is not None:
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def _cuda() -> Any:
    """torch, if a row has imported it already and there is a GPU."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and torch.cuda.is_available() else None


def _reset_peak() -> None:
    if (torch := _cuda()) is not None:
        torch.cuda.reset_peak_memory_stats()


def _freed() -> dict[str, float]:
    """Free what a row has left, and say how much it could not free, in GiB."""
    gc.collect()
    if (torch := _cuda()) is None:
        return {"left_gib": 0.0}
    torch.cuda.empty_cache()
    return {"left_gib": torch.cuda.memory_allocated() / 2**30}


def serve(connection: Connection, log: Path, place: Place) -> None:
    """Measure the rows that come through a pipe until None comes.

    Args:
        connection: End of the pipe.
        log: File that gets what libraries print.
        place: Where models and sets are.
    """
    os.setpgrp()  # so that the loaders' processes end with this one
    multiprocessing.set_start_method(None, force=True)  # a spawned process would spawn the loaders' processes, too
    with open(log, "ab", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    while (job := connection.recv()) is not None:
        connection.send(perform(place, *job))


class Worker:
    """A process that measures one row after another; it starts with the first one.

    Args:
        log: File that gets what libraries print.
        place: Where models and sets are.
    """

    def __init__(self, log: Path, place: Place) -> None:
        self.log, self.place = log, place
        self._process: Any = None

    def measure(self, function: str, given: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Measure a row; the process is replaced behind one that failed, or left memory behind.

        Args:
            function: Module and function of the row.
            given: Arguments of the function.
            seconds: Time after which the row is stopped.
        """
        if self._process is None:
            self._start()
        try:
            self._connection.send((function, given))
            if not self._connection.poll(max(seconds, 0)):
                self._kill()
                return {"error": "stopped at the end of the time", "out_of_memory": False}
            result = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(10)
            status = self._process.exitcode
            self._kill()
            return {"error": f"the process ended with status {status}", "out_of_memory": False}
        if "error" in result or result["left_gib"] > LEFT:
            self._kill()
        return result

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._connection, other = spawn.Pipe()
        self._process = spawn.Process(target=serve, args=(other, self.log, self.place))
        self._process.start()
        other.close()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has just begun, and has no group of its own yet
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        self._connection.close()
        self._process = None

    def end(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._kill()
