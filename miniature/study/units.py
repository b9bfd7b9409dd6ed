"""Long work as units that depend on each other, shared by any number of processes and machines through one folder.

A unit is done when its result is there. Whoever finds one that is wanted, and whose needs are there, locks it and makes it: so
a second call goes on where the first one stopped, and a call on another machine that sees the folder joins in. As with make, what
only led to results that are there is not wanted: large folders may be removed once what was made of them is there.
The operating system drops the lock of a process that dies, and the unit is anyone's again.
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
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import filelock

from ... import VideoAlignError, stopping
from ...models.files import write_json, write_text

WORK, LOGS = "work", "logs"
"""Folders of the locks and records of units, and of what they print."""
SHORT = 15
"""Seconds: of shorter units only the end is told."""
PATIENCE = 20.0
"""Seconds that a worker may take to its next step when it is to end."""


@dataclass(frozen=True)
class Unit:
    """One piece of work.

    Attributes:
        name: path of its result, a file or folder that appears when it is whole. text: what is done, for people.
        run: does it. needs: names of units whose results it reads.
        cost: about how many seconds it takes on one core; decides the order, and what is said of the time left.
    """

    name: str
    text: str
    run: Callable[[], None]
    needs: tuple[str, ...] = ()
    cost: float = 10.0


@dataclass(frozen=True)
class Event:
    """What a worker tells: ``begun``, ``done`` or ``failed``."""

    kind: str
    name: str
    seconds: float = 0.0
    error: str = ""


class Board:
    """Which units are done, and which one is next.

    Args:
        out: folder of all results. units: all of them; a need must be among them.
    """

    def __init__(self, out: Path, units: Sequence[Unit]) -> None:
        self.out, self.units = out, {unit.name: unit for unit in units}
        if len(self.units) < len(units):
            raise ValueError("two units have the same name")
        wanted: dict[str, list[str]] = {name: [] for name in self.units}
        for unit in units:
            for need in unit.needs:
                wanted[need].append(unit.name)

        self.ends = [name for name, others in wanted.items() if not others]

        @functools.cache
        def path(name: str) -> float:
            return self.units[name].cost + max((path(other) for other in wanted[name]), default=0.0)

        # those that most work waits for come first
        self.order = sorted(self.units, key=lambda name: -path(name))

    def done(self, name: str) -> bool:
        """Whether the result is there."""
        return (self.out / name).exists()

    def left(self) -> list[Unit]:
        """Units without result that are the end of something, or that one of these needs; in the order in which they are taken."""
        todo, wanted = [name for name in self.ends if not self.done(name)], set()
        while todo:
            name = todo.pop()
            if name not in wanted:
                wanted.add(name)
                todo += [need for need in self.units[name].needs if not self.done(need)]
        return [self.units[name] for name in self.order if name in wanted]

    def mark(self, name: str, error: str = "") -> None:
        """Remember that a unit failed, for everyone who works on the folder; or forget it."""
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
        """The next unit that nobody else works on, for the time of the block; None where there is none now."""
        blocked = self.blocked()
        for unit in self.left():
            if unit.name in blocked or not all(map(self.done, unit.needs)):
                continue
            path = self.out / WORK / f"{unit.name}.lock"
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(path, timeout=0)
            try:
                lock.acquire()
            except filelock.Timeout:
                continue
            try:
                if not self.done(unit.name):  # it may have been, between the look and the lock
                    yield unit
                    return
            finally:
                lock.release()
        yield None


@contextlib.contextmanager
def _into(log: Path) -> Iterator[None]:
    """Everything that this process and its children print goes to the end of a file."""
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


def _make(out: Path, unit: Unit) -> str:
    """Run a unit; what went wrong, or nothing."""
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


def _worker(out: Path, units: Callable[[], Sequence[Unit]], start: str, events: SimpleQueue) -> None:
    """Take units until all that can be done is done."""
    # A spawned process would spawn its own ones too: seconds of imports for every data loader.
    multiprocessing.set_start_method(start, force=True)
    for number in {*stopping.SIGNALS} - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)  # the process that started this one tells it when to end
    stopping.outlive_parent(grace=0, step=PATIENCE)
    try:
        with stopping.listening((signal.SIGTERM,)):
            _take(out, units, events)
    except stopping.Stopped as stop:  # no traceback
        sys.exit(stop.status)


def _take(out: Path, units: Callable[[], Sequence[Unit]], events: SimpleQueue) -> None:
    """One unit after the other."""
    board = Board(out, units())
    while {unit.name for unit in board.left()} - board.blocked():
        with board.claim() as unit:
            if unit:
                events.put(Event("begun", unit.name))
                started = time.time()
                if error := _make(out, unit):
                    board.mark(unit.name, error)
                events.put(Event("failed" if error else "done", unit.name, time.time() - started, error))
        if not unit:  # others are at work on what is needed
            time.sleep(0.5)


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


def work(out: str | Path, units: Callable[[], Sequence[Unit]], processes: int, threads: int = 1) -> None:
    """Do all units that are left, a line on each, on some processes; returns when nothing is left.

    Args:
        out: folder of all results. units: makes the units, in every process; must be picklable.
        processes: how many work at once. threads: that compute in each of them.

    Raises:
        VideoAlignError: where units failed, after everything that does not need them.
    """
    out, started = Path(out).resolve(), time.time()
    board = Board(out, units())
    if not (left := board.left()):
        print(f"all {len(board.units)} stages were done before", flush=True)
        return
    if before := len(board.units) - len(left):
        print(f"{before} of {len(board.units)} stages were done before", flush=True)
    for unit in left:
        board.mark(unit.name)
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    events = context.SimpleQueue()
    workers = [
        context.Process(target=_worker, args=(out, units, multiprocessing.get_start_method(), events))
        for _ in range(max(1, min(processes, len(left))))
    ]
    with _environment(OMP_NUM_THREADS=str(threads)):  # what a process that has not begun to compute looks at
        for worker in workers:
            worker.start()
    failed: dict[str, str] = {}
    try:
        while any(worker.is_alive() for worker in workers) or not events.empty():
            if events.empty():
                time.sleep(0.1)
                continue
            event = events.get()
            unit, rest = board.units[event.name], board.left()
            if event.kind == "begun" and unit.cost < SHORT:
                continue
            told = {
                "begun": unit.text,
                "done": f"done in {event.seconds:.0f} s: {unit.text} ({len(board.units) - len(rest)} of {len(board.units)}, "
                f"{_clock(sum(u.cost for u in rest) / len(workers) * _pace(board))} left)",
                "failed": f"failed: {unit.text}: {event.error}",
            }[event.kind]
            print(f"[{time.time() - started:5.0f} s] {_where(event.name)}{told}", flush=True)
            if event.kind == "failed":
                failed[event.name] = event.error
    except BaseException:
        _end(workers)
        raise
    for worker in workers:
        worker.join()
    if failed:
        raise VideoAlignError(
            f"{len(failed)} stages failed, first {next(iter(failed))}: {next(iter(failed.values()))}. The "
            "others are done where they could be; the same command tries again"
        )
    if dead := [worker.exitcode for worker in workers if worker.exitcode]:
        raise VideoAlignError(
            f"a working process ended with status {dead[0]} (killed, or out of memory?); the same command goes on"
        )
    if left := board.left():  # of those that another call on this folder began or gave up
        raise VideoAlignError(
            f"{len(left)} stages are not done, first {left[0].name}: another call's log says why, in {out / LOGS}; "
            "the same command tries again"
        )


def _end(workers: Sequence[multiprocessing.process.BaseProcess]) -> None:
    """Let workers end between two steps of what they are doing, and tidy up; those that do not are killed."""
    for worker in workers:
        worker.terminate()
    until = time.monotonic() + PATIENCE
    for worker in workers:
        worker.join(max(0.0, until - time.monotonic()))
        worker.kill()


def leading_to(units: Sequence[Unit], names: Iterable[str]) -> list[Unit]:
    """Of some units these, and all that they need."""
    by_name, todo, wanted = {unit.name: unit for unit in units}, list(names), set()
    while todo:
        name = todo.pop()
        if name not in wanted:
            wanted.add(name)
            todo += by_name[name].needs
    return [unit for unit in units if unit.name in wanted]


def durations(out: Path, units: Sequence[Unit]) -> list[tuple[str, float]]:
    """What each finished unit did, and the seconds that it took."""
    records = [(unit.text, out / WORK / f"{unit.name}.json") for unit in units]
    return [(text, json.loads(path.read_text())["seconds"]) for text, path in records if path.exists()]


def _where(name: str) -> str:
    """What a unit's text does not say: whose it is, where there are several of the kind."""
    folder = name.split("/")[0]
    return f"{folder}: " if folder.startswith(("seed", "tuning")) else ""


def _pace(board: Board) -> float:
    """Seconds taken over seconds expected, of what is done."""
    known = [
        (json.loads(path.read_text()), unit)
        for unit in board.units.values()
        if (path := board.out / WORK / f"{unit.name}.json").exists()
    ]
    prior = 120.0  # seconds as expected, so that the first short units say little
    return (prior + sum(record["seconds"] for record, _ in known)) / (prior + sum(unit.cost for _, unit in known))


def _clock(seconds: float) -> str:
    """A time for people."""
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )
