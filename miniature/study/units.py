"""Long work as units that depend on each other, shared by any number of processes and machines through one folder.

A unit is done when its result exists. Any process that sees the folder locks a unit whose needs are done, and does it:
so a second call goes on where the first one stopped, and a call on another machine joins in. As with make, a unit that
only led to results that exist is not wanted: large folders may be removed once everything that reads them is done.
The operating system drops the lock of a process that dies, and its unit is free again.
"""

import contextlib
import functools
import json
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from ...models.files import write_json, write_text

WORK, LOGS = "work", "logs"
"""Folder of the units' locks and records, and folder of what they print."""


@dataclass(frozen=True)
class Unit:
    """One piece of work.

    Attributes:
        name: Path of its result, a file or folder that appears when it is whole.
        text: Description for people.
        run: Function that does the work; it is sent to other processes, so it must be picklable.
        needs: Names of units whose results it reads.
        cost: Seconds that it takes on one core, roughly; decides the order, and the time that is said to be left.
        kind: Kind of work: units of one kind are alike fast or slow on a machine.
    """

    name: str
    text: str
    run: Callable[[], None]
    needs: tuple[str, ...] = ()
    cost: float = 10.0
    kind: str = ""


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

    def record(self, name: str, seconds: float, whole: bool) -> None:
        """Remember how long a unit took.

        Args:
            name: Name of the unit.
            seconds: Seconds that it took.
            whole: Whether they are the seconds of all its work, and not of the rest that a stopped call had left.
        """
        record = {"seconds": seconds, "host": socket.gethostname(), "whole": whole}
        write_json(self.out / WORK / f"{name}.json", record)

    def measured(self) -> list[tuple[str, float, float]]:
        """Kind, expected seconds and taken seconds of the units that this machine did; of all if it did none."""
        records = [(unit, record) for unit in self.units.values() if (record := _record(self.out, unit))]
        whole = [(unit, record) for unit, record in records if record.get("whole", True)]
        here = [(unit, record) for unit, record in whole if record["host"] == socket.gethostname()]
        return [(unit.kind, unit.cost, record["seconds"]) for unit, record in here or whole]


def _record(out: Path, unit: Unit) -> dict[str, Any] | None:
    path = out / WORK / f"{unit.name}.json"
    return json.loads(path.read_text()) if path.exists() else None


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
    return [(unit.text, record["seconds"]) for unit in units if (record := _record(out, unit))]
