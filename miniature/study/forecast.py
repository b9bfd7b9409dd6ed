"""When units will be done: how fast this machine is at each kind of work, and a rehearsal of the schedule."""

import heapq
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...bars import SAID

PRIOR = 30.0
"""Expected seconds of work that count as if they had taken just as long: short units say little about the speed."""
TAIL = 4096
"""Bytes at the end of a log in which its last bar is looked for."""


class Paces:
    """Seconds that work takes over the seconds that were expected of it, by kind of work.

    Machines differ by kind: one is slow in bfloat16, another in encoding videos. A kind of which little is measured
    has the pace of all work.

    Args:
        measured: Kind, expected seconds and taken seconds of each unit.
    """

    def __init__(self, measured: Iterable[tuple[str, float, float]] = ()) -> None:
        self.sums: dict[str, tuple[float, float]] = {}
        for kind, expected, taken in measured:
            before = self.sums.get(kind, (0.0, 0.0))
            self.sums[kind] = before[0] + expected, before[1] + taken
        totals = [sum(column) for column in zip(*self.sums.values())] or [0.0, 0.0]
        self.overall = _shrunk(1.0, *totals)

    def __call__(self, kind: str) -> float:
        """Pace of a kind of work."""
        return _shrunk(self.overall, *self.sums.get(kind, (0.0, 0.0)))


def _shrunk(prior: float, expected: float, taken: float) -> float:
    return (PRIOR * prior + taken) / (PRIOR + expected)


def seconds_left(
    seconds: Mapping[str, float], needs: Mapping[str, Iterable[str]], running: Mapping[str, float], workers: int
) -> float:
    """Rehearse the schedule: each worker that is free begins the first unit whose needs are done.

    Args:
        seconds: Seconds that each unit takes which has not begun, by name, in the order of their turn.
        needs: Names that these units need. A name that is no unit of ``seconds`` or ``running`` is done.
        running: Seconds for which begun units will go on.
        workers: Number of workers, at least 1.

    Returns:
        Seconds until all of them are done; units that can never begin are left out.
    """
    todo, now = dict(seconds), 0.0
    ends = [(left, name) for name, left in running.items()]
    heapq.heapify(ends)
    open_ = {*todo, *running}
    while True:
        while len(ends) < workers and (name := next((n for n in todo if open_.isdisjoint(needs[n])), None)):
            heapq.heappush(ends, (now + todo.pop(name), name))
        if not ends:
            return now
        now = ends[0][0]
        while ends and ends[0][0] <= now:
            open_.discard(heapq.heappop(ends)[1])


@dataclass(frozen=True)
class Advance:
    """What the last bar in a log says.

    Attributes:
        text: What is counted, and how far it is, such as ``step 210/800``.
        left: Seconds until this bar ends.
        whole: Whether the bar counts all of a unit's work, as the steps of a training do.
    """

    text: str
    left: float
    whole: bool


def advance(log: Path, start: int = 0) -> Advance | None:
    """Read how far a unit is off its log; None where no bar is in it yet.

    Args:
        log: File that the unit's prints are appended to.
        start: Size of the file when the unit began; what stands before is of an earlier attempt.
    """
    try:
        with open(log, "rb") as file:
            file.seek(max(start, log.stat().st_size - TAIL))
            lines = SAID.findall(file.read().decode(errors="replace"))
        age = time.time() - log.stat().st_mtime
    except OSError:
        return None
    if not lines:
        return None
    # a validation's bar may come last, but the steps tell of the whole training
    what, done, total, clock = next((line for line in reversed(lines) if line[0] == "step"), lines[-1])
    left = sum(int(part) * 60**power for power, part in enumerate(reversed(clock.split(":"))))
    return Advance(f"{what} {done}/{total}", max(0.0, left - age), what == "step")


@dataclass(frozen=True)
class Begun:
    """A unit that is at work.

    Attributes:
        kind: Kind of work.
        cost: Seconds that were expected of it, at pace 1.
        spent: Seconds for which it has run.
        seen: What its log says.
        whole: Whether it began at the beginning, and not where a stopped call had left it.
    """

    kind: str
    cost: float
    spent: float
    seen: Advance | None = None
    whole: bool = True

    def left(self, paces: Paces) -> float:
        """Seconds for which it will go on.

        Args:
            paces: Paces by kind of work.
        """
        if self.seen and self.seen.whole:
            return self.seen.left
        # Other bars may follow the one that is seen. A unit that is late goes on for a tenth of the time that it has
        # run: nobody knows how long it will, and zero would be too bold.
        least = self.seen.left if self.seen else 0.0
        return max(self.cost * paces(self.kind) - self.spent, least, self.spent / 10)


def paces_with(measured: Sequence[tuple[str, float, float]], begun: Iterable[Begun]) -> Paces:
    """Paces by kind of work, also from units at work whose bars tell their end, or which are late already.

    Args:
        measured: Kind, expected seconds and taken seconds of each unit that is done.
        begun: Units that are at work.
    """
    paces = Paces(measured)
    telling = (
        (unit.kind, unit.cost, unit.spent + unit.left(paces))
        for unit in begun
        if unit.whole and ((unit.seen and unit.seen.whole) or unit.spent > unit.cost * paces(unit.kind))
    )
    return Paces([*measured, *telling])


def clock(seconds: float) -> str:
    """A duration for people, in seconds, minutes or hours.

    Args:
        seconds: The duration.
    """
    if seconds < 100:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
