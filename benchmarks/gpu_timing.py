"""Times, memory and traces of steps on a device, on a GPU or a CPU."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.profiler import ProfilerActivity, profile

GIB = 2**30
LARGEST_TRACE = 15 * 10**6
"""Bytes of a trace that is kept."""


def device() -> torch.device:
    """The GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def finish() -> float:
    """Wait for all that the device was asked for; the time then, in seconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(function: Callable[[], object], calls: int, warmup: int = 1) -> list[float]:
    """Seconds of each of several calls, with all that they start on the device.

    Args:
        function: Function to call.
        calls: Number of calls that are counted.
        warmup: Number of calls before them.
    """
    seconds = []
    for number in range(warmup + calls):
        begun = finish()
        function()
        if number >= warmup:
            seconds.append(finish() - begun)
    return seconds


def spread(seconds: list[float]) -> dict[str, Any]:
    """Median, smallest and largest of the steps' times.

    Args:
        seconds: Seconds of the steps, at least one.
    """
    return {
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "steps": len(seconds),
    }


def peak_gib() -> float | None:
    """Largest memory that was allocated at once since the row began, in GiB; None on a CPU."""
    return torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None


class StepTimes(L.Callback):
    """Times the batches of `fit` or `predict`, from the end of one to the end of the next.

    What lies between the end of a batch and the beginning of the next one is time in which the device waits: for the
    batch, and for its way to the device.

    Args:
        warmup: Number of batches that are not counted.
        trace: File that gets a profiler's trace of the first batch after those, which is not counted either.

    Attributes:
        seconds: Seconds of each counted batch.
        waited: Seconds of them before the batch was there.
        batch: The last batch.
        traced: Size of the trace in bytes, or why there is none; None where none was asked for.
    """

    def __init__(self, warmup: int = 1, trace: Path | None = None) -> None:
        self.warmup, self.trace = warmup, trace
        self.seconds: list[float] = []
        self.waited: list[float] = []
        self.batch: Any = None
        self.traced: int | str | None = None
        self._number = 0
        self._ended = self._waited = 0.0
        self._profiler: profile | None = None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *rest: Any) -> None:
        """Note how long the batch was waited for."""
        self.batch, self._waited = batch, finish() - self._ended
        if self.trace and self._number == self.warmup:
            self._begin_trace()

    def on_train_batch_end(self, *given: Any) -> None:
        """Note how long the batch took."""
        now, traced = finish(), self._profiler is not None
        if traced:
            self._end_trace()
            now = finish()
        if self._number >= self.warmup and not traced:
            self.seconds.append(now - self._ended)
            self.waited.append(self._waited)
        self._number, self._ended = self._number + 1, now

    on_predict_batch_start, on_predict_batch_end = on_train_batch_start, on_train_batch_end

    def _begin_trace(self) -> None:
        """Start the profiler. A profiler that does not work on this machine must not cost the row."""
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        try:
            self._profiler = profile(activities=kinds)
            self._profiler.start()
        except Exception as error:  # CUPTI raises errors of many kinds
            self._profiler, self.traced = None, f"{type(error).__name__}: {error}"

    def _end_trace(self) -> None:
        """Stop the profiler and write what it saw, if it is small enough."""
        profiler, self._profiler = self._profiler, None
        try:
            profiler.stop()
            profiler.export_chrome_trace(str(self.trace))
            self.traced = self.trace.stat().st_size
            if self.traced > LARGEST_TRACE:
                self.trace.unlink()
                self.traced = f"the trace had {self.traced} bytes and was not kept"
        except Exception as error:
            self.traced = f"{type(error).__name__}: {error}"

    def result(self) -> dict[str, Any]:
        """Times and waiting as plain values."""
        found = {**spread(self.seconds), "wait_share": sum(self.waited) / sum(self.seconds)}
        return found | ({"trace": self.traced} if self.trace else {})
