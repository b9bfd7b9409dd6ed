"""What a command costs before it does anything: processor seconds of its start in a process of its own."""

import statistics
import subprocess
import sys
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

from decoding import clips

PACKAGE = Path(__file__).parents[1]
RECIPE = str(PACKAGE / "experiments/debug/tiny.yaml")


def starts(folder: Path) -> None:
    """Measure the processor seconds of commands that do nothing else than start; each runs five times.

    Args:
        folder: Folder of all benchmarks.
    """
    clips(folder)
    info, fit = ["shards", "info", str(folder / "mp4")], ["fit", "--config", RECIPE, "--print_config"]
    for name, words in (("shards info", info), ("score --help", ["score", "--help"]), ("fit --print_config", fit)):
        _report(name, ["-m", "videoalign", *words])
    for module in ("torch", "lightning", "videoalign.alignment"):
        _report(f"import {module}", ["-c", f"import {module}"])


def _report(name: str, arguments: list[str]) -> None:
    """Print the median and range of a start's processor seconds; a start that fails ends the benchmark."""
    seconds = []
    for _ in range(5):
        before = getrusage(RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
        after = getrusage(RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    spread = f"(range {min(seconds):.1f}-{max(seconds):.1f})"
    print(f"{'start of ' + name:68} {statistics.median(seconds):6.1f} s of a core  {spread}", flush=True)
