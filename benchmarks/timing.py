"""Two ways side by side: how they are timed, and how a comparison is printed."""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def timed(*ways: Callable[[], object], repeats: int = 7) -> list[list[float]]:
    """Seconds of each way, taken in turn so that a busy machine slows all of them; the first round is not counted.

    Args:
        ways: Functions that do the same.
        repeats: Rounds that are counted.
    """
    seconds: list[list[float]] = [[] for _ in ways]
    for number in range(repeats + 1):
        for times, way in zip(seconds, ways):
            started = time.perf_counter()
            way()
            if number:
                times.append(time.perf_counter() - started)
    return seconds


def row(name: str, slow: list[float], fast: list[float], per: int = 1, unit: str = "") -> None:
    """Print one comparison.

    Args:
        name: What is compared with what.
        slow: Seconds of the way that is expected to be slower.
        fast: Seconds of the other way.
        per: Number of things that each run does.
        unit: Unit of the rates; without one, milliseconds are printed.
    """
    s, f = statistics.median(slow), statistics.median(fast)
    low, high = min(slow) / max(fast), max(slow) / min(fast)
    rates = f"{per / s:10.1f} -> {per / f:10.1f} {unit}" if unit else f"{s * 1e3:8.2f} -> {f * 1e3:8.2f} ms"
    print(f"{name:68} {s / f:6.1f}x  (range {low:.1f}-{high:.1f})  {rates}", flush=True)


def peak_memory(script: str, *args: object) -> float:
    """Peak memory of a script in a process of its own, in MiB.

    Args:
        script: File beside this one, which prints its peak in KiB (:func:`own_peak`).
        args: Arguments of the script.
    """
    command = [sys.executable, Path(__file__).parent / script, *map(str, args)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1024


def own_peak() -> int:
    """Peak memory of this process in KiB; not ru_maxrss, which a child inherits."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
