"""Processes that do units, and the lines that say how far they are."""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from multiprocessing.queues import SimpleQueue
from pathlib import Path

from ... import VideoAlignError, stopping
from .forecast import Begun, advance, clock, paces_with, seconds_left
from .units import LOGS, Board, Unit

SHORT = 15.0
"""Seconds below which only the end of a unit is printed."""
QUIET = 30.0
"""Seconds without a line after which one says what is at work."""
PATIENCE = 20.0
"""Seconds that a worker may take to its next step when it is to end."""

# --- the processes that work --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """A worker's message: a unit has ``begun``, is ``done``, or ``failed``."""

    kind: str
    name: str
    seconds: float = 0.0
    error: str = ""


def _worker(out: Path, units: Sequence[Unit], start: str, events: SimpleQueue) -> None:
    """Do units until no more can be done."""
    # A spawned process would spawn its own ones too: seconds of imports for every data loader.
    multiprocessing.set_start_method(start, force=True)
    for number in {*stopping.SIGNALS} - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)  # the process that started this one tells it when to end
    stopping.outlive_parent(grace=0, step=PATIENCE)
    try:
        with stopping.listening((signal.SIGTERM,)):
            _take(Board(out, units), events)
    except stopping.Stopped as stop:  # no traceback
        sys.exit(stop.status)


def _take(board: Board, events: SimpleQueue) -> None:
    """Do one unit after the other."""
    while {unit.name for unit in board.left()} - board.blocked():
        with board.claim() as unit:
            if unit:
                events.put(Event("begun", unit.name))
                started = time.time()
                if error := _do(board, unit):
                    board.mark(unit.name, error)
                events.put(Event("failed" if error else "done", unit.name, time.time() - started, error))
        if not unit:  # others are at work on what the rest needs
            time.sleep(0.5)


def _do(board: Board, unit: Unit) -> str:
    """Run a unit; the message of its failure, or nothing."""
    log = board.out / LOGS / f"{unit.name}.log"
    started, first = time.time(), not log.exists()
    with _into(log):
        try:
            unit.run()
        except VideoAlignError as error:
            return f"{error} (see {log})"
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            return f"{type(error).__name__}: {str(error)[:200]} (see {log})"
    if not board.done(unit.name):
        return f"it left no {board.out / unit.name} (see {log})"
    board.record(unit.name, time.time() - started, first)
    return ""


@contextlib.contextmanager
def _into(log: Path) -> Iterator[None]:
    """Append everything that this process and its children print to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    kept = [os.dup(1), os.dup(2)]
    with open(log, "ab", buffering=0) as file:
        try:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, old in zip((1, 2), kept):
                os.dup2(old, number)
                os.close(old)


# --- the process that was called ----------------------------------------------------------------------------------


def work(out: str | Path, units: Sequence[Unit], processes: int, threads: int = 1) -> None:
    """Do all units that are left, on some processes, and print a line on each.

    Args:
        out: Folder of all results.
        units: All units.
        processes: Number of processes that work at once.
        threads: Number of threads that compute in each process.

    Raises:
        VideoAlignError: Where units failed, after everything that does not need them.
    """
    board = Board(Path(out).resolve(), units)
    if not (left := board.left()):
        print(f"all {len(board.units)} stages were done before", flush=True)
        return
    if before := len(board.units) - len(left):
        print(f"{before} of {len(board.units)} stages were done before", flush=True)
    for unit in left:
        board.mark(unit.name)
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    events = context.SimpleQueue()
    args = (board.out, units, multiprocessing.get_start_method(), events)
    workers = [context.Process(target=_worker, args=args) for _ in range(max(1, min(processes, len(left))))]
    with _environment(OMP_NUM_THREADS=str(threads)):  # read by a process before it begins to compute
        for worker in workers:
            worker.start()
    try:
        failed = _follow(board, workers, events)
    except BaseException:
        _end(workers)
        raise
    for worker in workers:
        worker.join()
    _require_whole(board, failed, [worker.exitcode for worker in workers if worker.exitcode])


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Environment variables for processes that are started in the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _follow(board: Board, workers: Sequence[BaseProcess], events: SimpleQueue) -> dict[str, str]:
    """Print what the workers do until they end; messages of failures by unit."""
    reporter = Reporter(board, len(workers))
    while any(worker.is_alive() for worker in workers) or not events.empty():
        if events.empty():
            reporter.remind()
            time.sleep(0.1)
        else:
            reporter.take(events.get())
    return reporter.failed


class Reporter:
    """Prints a line when a long unit begins, when any unit ends, and now and then while they run.

    The time left counts this call's workers; others on the same folder make it shorter.

    Args:
        board: The units.
        workers: Number of this call's workers.
    """

    def __init__(self, board: Board, workers: int) -> None:
        self.board, self.workers = board, workers
        self.started = self.said = time.time()
        self.running: dict[str, tuple[float, int]] = {}  # when each began, and how long its log was then
        self.failed: dict[str, str] = {}

    def take(self, event: Event) -> None:
        """Print what happened, if it is worth a line.

        Args:
            event: A worker's message.
        """
        text = self._text(event.name)
        if event.kind == "begun":
            log = self._log(event.name)
            self.running[event.name] = time.time(), log.stat().st_size if log.exists() else 0
            left, expected = self._forecast(event.name)
            if expected >= SHORT:
                self._say(f"{text} (about {clock(expected)}; {clock(left)} left in all)")
            return
        self.running.pop(event.name, None)
        if event.kind == "failed":
            self.failed[event.name] = event.error
            self._say(f"{text}: failed: {event.error}")
        else:
            every, left = len(self.board.units), len(self.board.left())
            self._say(
                f"done in {event.seconds:.0f} s: {text} ({every - left} of {every}, {clock(self._forecast()[0])} left)"
            )

    def remind(self) -> None:
        """After a while without any line, print what is at work and how far it is."""
        if not self.running or time.time() - self.said < QUIET:
            return
        seen = {name: unit.seen for name, unit in self._begun().items()}
        texts = (f"{self._text(name)}{f' ({how.text})' if how else ''}" for name, how in seen.items())
        self._say(f"at work: {'; '.join(texts)}; {clock(self._forecast()[0])} left in all")

    def _say(self, line: str) -> None:
        self.said = time.time()
        print(f"[{self.said - self.started:5.0f} s] {line}", flush=True)

    def _text(self, name: str) -> str:
        """A unit in words; texts of several seeds are the same."""
        seed = next((part for part in name.split("/")[:2] if part.startswith("seed")), "")
        return f"{seed}: {self.board.units[name].text}" if seed else self.board.units[name].text

    def _log(self, name: str) -> Path:
        return self.board.out / LOGS / f"{name}.log"

    def _begun(self) -> dict[str, Begun]:
        """Units at work, with what their logs say."""
        found, now = {}, time.time()
        for name, (moment, start) in self.running.items():
            unit, seen = self.board.units[name], advance(self._log(name), start)
            found[name] = Begun(unit.kind, unit.cost, now - moment, seen, start == 0)
        return found

    def _forecast(self, name: str = "") -> tuple[float, float]:
        """Seconds until everything is done, and seconds that a unit takes as a whole."""
        begun, blocked = self._begun(), self.board.blocked()
        paces = paces_with(self.board.measured(), begun.values())
        expected = {key: unit.cost * paces(unit.kind) for key, unit in self.board.units.items()}
        todo = [unit for unit in self.board.left() if unit.name not in begun and unit.name not in blocked]
        seconds, needs = {u.name: expected[u.name] for u in todo}, {u.name: u.needs for u in todo}
        running = {key: unit.left(paces) for key, unit in begun.items()}
        return seconds_left(seconds, needs, running, self.workers), expected.get(name, 0.0)


def _end(workers: Sequence[BaseProcess]) -> None:
    """Let workers end between two of their steps, and tidy up; those that do not end in time are killed."""
    for worker in workers:
        worker.terminate()
    until = time.monotonic() + PATIENCE
    for worker in workers:
        worker.join(max(0.0, until - time.monotonic()))
        worker.kill()


def _require_whole(board: Board, failed: dict[str, str], statuses: Sequence[int]) -> None:
    """Refuse to go on where something is not done.

    Raises:
        VideoAlignError: What is not done, and why.
    """
    if failed:
        raise VideoAlignError(
            f"{len(failed)} stages failed, first {next(iter(failed))}: {next(iter(failed.values()))}. The "
            "others are done where they could be; the same command tries again"
        )
    if statuses:
        raise VideoAlignError(
            f"a working process ended with status {statuses[0]} (killed, or out of memory?); the same command goes on"
        )
    if left := board.left():  # another call on this folder began them or gave them up
        raise VideoAlignError(
            f"{len(left)} stages are not done, first {left[0].name}: another call's log says why, in "
            f"{board.out / LOGS}; the same command tries again"
        )
