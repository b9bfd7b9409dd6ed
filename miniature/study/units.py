"""Long work as units that depend on each other, shared by any number of processes and machines through one folder.

A unit is done when its result exists. Any process that sees the folder locks a unit whose needs are done, and does it:
so a second call goes on where the first one stopped, and a call on another machine joins in. As with make, a unit that
only led to results that exist is not wanted: large folders may be removed once everything that reads them is done.
The operating system drops the lock of a process that dies, and its unit is free again.
"""

import contextlib
import functools
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import filelock

from ... import VideoAlignError, stopping
from ...models.files import write_json, write_text

WORK, LOGS = "work", "logs"
"""Folder of the units' locks and records, and folder of what they print."""
SHORT = 15
"""Seconds below which only the end of a unit is printed."""
PATIENCE = 20.0
"""Seconds that a worker may take to its next step when it is to end."""


@dataclass(frozen=True)
class Unit:
    """One piece of work.

    Attributes:
        name: Path of its result, a file or folder that appears when it is whole.
        text: Description for people.
        run: Function that does the work; it is sent to other processes, so it must be picklable.
        needs: Names of units whose results it reads.
        cost: Seconds that it takes on one core, roughly; decides the order, and the time that is said to be left.
    """

    name: str
    text: str
    run: Callable[[], None]
    needs: tuple[str, ...] = ()
    cost: float = 10.0


# --- what is done, and what is next -------------------------------------------------------------------------------


class Board:
    """Which units are done, and which one is next.

    Args:
        out: Folder of all results.
        units: All units; every need must be among them.
    """

    def __init__(self, out: Path, units: Sequence[Unit]) -> None:
        self.out, self.units = out, {unit.name: unit for unit in units}
        if len(self.units) < len(units):
            raise ValueError("two units have the same name")
        readers: dict[str, list[str]] = {name: [] for name in self.units}
        for unit in units:
            for need in unit.needs:
                readers[need].append(unit.name)
        self.ends = [name for name, others in readers.items() if not others]

        @functools.cache
        def path(name: str) -> float:
            return self.units[name].cost + max((path(other) for other in readers[name]), default=0.0)

        # the unit that most work waits for comes first
        self.order = sorted(self.units, key=lambda name: -path(name))

    def done(self, name: str) -> bool:
        """Whether a unit's result exists.

        Args:
            name: Name of the unit.
        """
        return (self.out / name).exists()

    def left(self) -> list[Unit]:
        """Units to do: those without result that nobody needs, and what they need; in the order of their turn."""
        missing = [name for name in self.ends if not self.done(name)]
        wanted = _closure(missing, lambda name: [need for need in self.units[name].needs if not self.done(need)])
        return [self.units[name] for name in self.order if name in wanted]

    def mark(self, name: str, error: str = "") -> None:
        """Remember that a unit failed, for everyone who works on the folder; or forget it.

        Args:
            name: Name of the unit.
            error: Why it failed; empty forgets an earlier failure.
        """
        path = self.out / WORK / f"{name}.failed"
        if error:
            write_text(path, error)
        else:
            path.unlink(missing_ok=True)

    def blocked(self) -> set[str]:
        """The failed units and all that need their results."""
        found = {name for name in self.units if (self.out / WORK / f"{name}.failed").exists() and not self.done(name)}
        while more := {u.name for u in self.units.values() if u.name not in found and found & {*u.needs}}:
            found |= more
        return found

    @contextlib.contextmanager
    def claim(self) -> Iterator[Unit | None]:
        """The next unit that nobody else works on, locked within the block; None if there is none now."""
        blocked = self.blocked()
        for unit in self.left():
            if unit.name in blocked or not all(map(self.done, unit.needs)):
                continue
            path = self.out / WORK / f"{unit.name}.lock"
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock = filelock.FileLock(path, timeout=0).acquire()
            except filelock.Timeout:
                continue
            with lock:
                if not self.done(unit.name):  # another process may have done it between the look and the lock
                    yield unit
                    return
        yield None

    def pace(self) -> float:
        """Seconds that finished units took, over the seconds that were expected."""
        paths = ((unit, self.out / WORK / f"{unit.name}.json") for unit in self.units.values())
        known = [(json.loads(path.read_text())["seconds"], unit.cost) for unit, path in paths if path.exists()]
        prior = 120.0  # seconds as expected, so that the first short units say little
        return (prior + sum(seconds for seconds, _ in known)) / (prior + sum(cost for _, cost in known))


def _closure(names: Iterable[str], needs: Callable[[str], Iterable[str]]) -> set[str]:
    """Some units and everything that they need, directly or not."""
    todo, found = list(names), set()
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += needs(name)
    return found


def leading_to(units: Sequence[Unit], names: Iterable[str]) -> list[Unit]:
    """Some units and everything that they need.

    Args:
        units: All units.
        names: Names of the wanted ones.
    """
    by_name = {unit.name: unit for unit in units}
    wanted = _closure(names, lambda name: by_name[name].needs)
    return [unit for unit in units if unit.name in wanted]


def durations(out: Path, units: Sequence[Unit]) -> list[tuple[str, float]]:
    """Text of each finished unit, and the seconds that it took.

    Args:
        out: Folder of all results.
        units: All units.
    """
    records = [(unit.text, out / WORK / f"{unit.name}.json") for unit in units]
    return [(text, json.loads(path.read_text())["seconds"]) for text, path in records if path.exists()]


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
                if error := _do(board.out, unit):
                    board.mark(unit.name, error)
                events.put(Event("failed" if error else "done", unit.name, time.time() - started, error))
        if not unit:  # others are at work on what the rest needs
            time.sleep(0.5)


def _do(out: Path, unit: Unit) -> str:
    """Run a unit; the message of its failure, or nothing."""
    log = out / LOGS / f"{unit.name}.log"
    started = time.time()
    with _into(log):
        try:
            unit.run()
        except VideoAlignError as error:
            return f"{error} (see {log})"
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            return f"{type(error).__name__}: {str(error)[:200]} (see {log})"
    if not (out / unit.name).exists():
        return f"it left no {out / unit.name} (see {log})"
    record = out / WORK / f"{unit.name}.json"
    write_json(record, {"seconds": time.time() - started, "host": socket.gethostname()})
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
    started, failed = time.time(), {}
    while any(worker.is_alive() for worker in workers) or not events.empty():
        if events.empty():
            time.sleep(0.1)
            continue
        event = events.get()
        if event.kind == "failed":
            failed[event.name] = event.error
        if event.kind != "begun" or board.units[event.name].cost >= SHORT:
            print(f"[{time.time() - started:5.0f} s] {_line(board, event, len(workers))}", flush=True)
    return failed


def _line(board: Board, event: Event, workers: int) -> str:
    """An event in words."""
    folder, text = event.name.split("/")[0], board.units[event.name].text
    where = f"{folder}: " if folder.startswith(("seed", "tuning")) else ""  # texts of several seeds are the same
    if event.kind == "begun":
        return f"{where}{text}"
    if event.kind == "failed":
        return f"{where}failed: {text}: {event.error}"
    left, every = board.left(), len(board.units)
    seconds = sum(unit.cost for unit in left) / workers * board.pace()
    return f"{where}done in {event.seconds:.0f} s: {text} ({every - len(left)} of {every}, {_clock(seconds)} left)"


def _clock(seconds: float) -> str:
    """A duration for people."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


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
