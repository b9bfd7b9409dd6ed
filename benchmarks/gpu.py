"""Steps of the shipped recipes on one GPU, with random weights in the released models' configurations.

    python benchmarks/gpu.py --out runs/gpu [--only dpo --only reward] [--minutes 9] [--scratch /tmp/gpu]

Writes after every row `OUT/gpu.json` (all numbers), `OUT/gpu.md` (a table) and `OUT/gpu.log` (what libraries print),
and once `OUT/dpo_trace.json.gz` (one Flow-DPO micro-batch, for chrome://tracing or ui.perfetto.dev). The same command
goes on: rows that are done, or ran out of memory, are skipped; others that failed run again. No row begins after
`--minutes`, and one that runs then is stopped soon. Models and sets take about 25 GB of `--scratch`, written once.

A training row is `videoalign fit` with the shipped recipe on one device, for as many micro-batches as are timed. Beside
it stands what `videoalign plan` expects, counted meanwhile on the CPU. Where GPU time is dear, measure with `--no-plan`
and let the same command with `--plan-only` count on any machine afterwards. `--toy` runs everything with miniatures on
a CPU: its numbers mean nothing.
"""

import argparse
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_place import Place
from gpu_record import Record
from gpu_rows import ROWS, Row
from gpu_worker import Worker

GRACE = 30.0
"""Seconds that a row which runs at the end of the time is given."""


class Plans:
    """Runs `videoalign plan` for rows, one at a time, beside the measurements.

    Args:
        record: Gets the estimates.
        place: Where models are.
        log: File that gets what the command prints.
    """

    def __init__(self, record: Record, place: Place, log: Path) -> None:
        self.record, self.place, self.log = record, place, log
        self._waiting: list[list[str]] = []
        self._running: tuple[subprocess.Popen, list[str], Path] | None = None

    def ask(self, row: Row) -> None:
        """Count a row's step, unless the same step was counted already.

        Args:
            row: Row that was measured.
        """
        words = row.plan(self.place.folder, self.place.toy)
        asked = [*self._waiting, *([self._running[1]] if self._running else [])]
        if words is not None and words not in asked and self.record.plan(words) is None:
            self._waiting.append(words)
        self.look()

    def look(self) -> None:
        """Take the result of a count that has ended, and begin the next one."""
        if self._running and self._running[0].poll() is not None:
            process, words, file = self._running
            self.record.add_plan(words, file if process.returncode == 0 else None)
            self._running = None
        if self._waiting and not self._running:
            words = self._waiting.pop(0)
            file = self.place.folder / f"plan_{os.getpid()}_{len(self.record.plans)}.json"
            command = [sys.executable, "-m", "videoalign", "plan", *words, "--json", str(file)]
            with open(self.log, "ab") as log:
                there = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}
                self._running = subprocess.Popen(command, stdout=log, stderr=log, env=there), words, file

    def wait(self, until: float) -> None:
        """Wait for all counts.

        Args:
            until: Time of the monotonic clock at which those that are left are given up.
        """
        while self._running and time.monotonic() < until:
            self.look()
            time.sleep(0.2)
        self.end()

    def end(self) -> None:
        """Stop what still runs."""
        if self._running:
            self._running[0].kill()
            self._running[0].wait()


def measure(rows: Sequence[Row], record: Record, place: Place, minutes: float, planned: bool = True) -> None:
    """Measure the rows that are not done, one after another.

    Args:
        rows: Rows in their order.
        record: Gets every result as soon as it is there.
        place: Where models and sets are.
        minutes: Time after which no row begins.
        planned: Whether `videoalign plan` counts the steps.
    """
    place.folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    worker, plans = Worker(record.log, place), Plans(record, place, record.log)
    try:
        if record.machine is None and (time.monotonic() < end):
            record.add_machine(worker.measure("gpu_machine:machine", {}, end - time.monotonic()))
        for row in rows:
            if record.done(row):
                continue
            if time.monotonic() >= end:
                print(f"{row.name} and what follows is left for the next call: the time is used up", flush=True)
                break
            print(f"{row.name}: {row.title}", flush=True)
            if row.needs and not record.measured(row.needs):
                result: dict[str, Any] = {"error": f"needs the row {row.needs}, which was not measured"}
            else:
                result = worker.measure(row.function, row.given, end + GRACE - time.monotonic())
            if row.alone:
                worker.end()
            record.add(row, result)
            print(f"  {record.line(row.name)}", flush=True)
            if planned:
                plans.ask(row)
        worker.end()
        plans.wait(end + GRACE)
    finally:
        worker.end()
        plans.end()
        record.save()


def count(rows: Sequence[Row], record: Record, place: Place) -> None:
    """Let `videoalign plan` count the steps of rows that were measured, or failed; no GPU is needed.

    Args:
        rows: Rows in their order.
        record: Has the rows' results, and gets the estimates.
        place: Where models and sets are.
    """
    place.folder.mkdir(parents=True, exist_ok=True)
    plans = Plans(record, place, record.log)
    try:
        for row in rows:
            if row.name in record.results:
                plans.ask(row)
        plans.wait(math.inf)
    finally:
        plans.end()
        record.save()


def main() -> None:
    """Measure the rows that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--only", action="append", metavar="ROW", choices=[row.name for row in ROWS], help="these rows")
    parser.add_argument("--minutes", type=float, default=9.0, help="time after which no row begins (default: 9)")
    folder = Path(tempfile.gettempdir(), "videoalign_gpu")
    parser.add_argument("--scratch", type=Path, default=folder, help=f"folder of models and sets (default: {folder})")
    plans = parser.add_mutually_exclusive_group()
    plans.add_argument("--no-plan", action="store_true", help="leave out what `videoalign plan` expects")
    plans.add_argument("--plan-only", action="store_true", help="count that alone, of rows that were measured")
    parser.add_argument("--toy", action="store_true", help="use miniatures, on a CPU")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no process is left behind
    options.out.mkdir(parents=True, exist_ok=True)
    rows = [row for row in ROWS if row.name in (options.only or [row.name])]
    scratch = options.scratch.resolve() / ("toy" if options.toy else "real")
    record = Record(options.out.resolve(), ROWS, Place(scratch, options.toy))
    if options.plan_only:
        count(rows, record, record.place)
    else:
        measure(rows, record, record.place, options.minutes, not options.no_plan)
    print(f"{record.table()}\n{options.out}/gpu.md and gpu.json hold all numbers")


if __name__ == "__main__":
    main()
