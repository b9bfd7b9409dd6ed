"""The time that is said to be left: paces by kind of work, a rehearsed schedule, bars in logs, and lines on them."""

import os
import random
import time
from pathlib import Path

import pytest

from videoalign import bars
from videoalign.miniature.study.forecast import PRIOR, Advance, Begun, Paces, advance, clock, paces_with, seconds_left
from videoalign.miniature.study.units import LOGS, WORK, Board, Unit
from videoalign.miniature.study.workers import QUIET, Event, Reporter

# --- the schedule -------------------------------------------------------------------------------------------------


def ticked(seconds, needs, running, workers):
    """The schedule second by second, as workers with a clock would do it."""
    todo, at_work, now = dict(seconds), dict(running), 0
    while True:
        for name in [name for name, left in at_work.items() if left <= 0]:
            del at_work[name]
        for name in list(todo):
            if len(at_work) < workers and not {*needs[name]} & ({*todo} | {*at_work}):
                at_work[name] = todo.pop(name)
        if not at_work:
            return now
        at_work = {name: left - 1 for name, left in at_work.items()}
        now += 1


@pytest.mark.parametrize("seed", range(40))
def test_the_schedule_is_that_of_workers_with_a_clock(seed):
    draw = random.Random(seed)
    names = [f"u{i}" for i in range(draw.randint(1, 25))]
    needs = {name: draw.sample(names[:i], min(i, draw.randint(0, 3))) for i, name in enumerate(names)}
    workers = draw.randint(1, 4)
    begun = [name for name in names if not needs[name]][: draw.randint(0, workers)]
    running = {name: draw.randint(1, 9) for name in begun}
    seconds = {name: draw.randint(1, 9) for name in draw.sample(names, len(names)) if name not in running}
    assert seconds_left(seconds, needs, running, workers) == ticked(seconds, needs, running, workers)


def test_a_chain_takes_its_length_however_many_work():
    chain = {f"u{i}": 10.0 for i in range(5)}
    needs = {f"u{i}": [f"u{i - 1}"] if i else [] for i in range(5)}
    assert seconds_left(chain, needs, {}, 8) == 50
    assert seconds_left(chain, dict.fromkeys(chain, ()), {}, 2) == 30  # on their own: three rounds of two workers
    assert seconds_left({}, {}, {}, 2) == 0


def test_what_can_never_begin_is_left_out():
    assert seconds_left({"a": 3.0, "b": 5.0}, {"a": ["b"], "b": ["a"]}, {"c": 2.0}, 1) == 2


# --- the pace -----------------------------------------------------------------------------------------------------


def test_little_work_says_little_and_much_work_its_own_pace():
    assert Paces()("anything") == 1
    assert 1 < Paces([("a", 1.0, 4.0)])("a") < 1.5
    paces = Paces([("a", 900.0, 2700.0), ("b", 900.0, 450.0)])
    assert paces("a") == pytest.approx(3, rel=0.05)
    assert paces("b") == pytest.approx(0.5, rel=0.1)
    assert paces("new") == paces.overall == pytest.approx((PRIOR + 3150) / (PRIOR + 1800))


SPEEDS = {"judge": 2.5, "generator": 0.6, "sample": 1.5}
"""How many times longer than expected the simulated machine takes."""


def study():
    """Two long branches, one of a judge and one of a generator, and many short units that need both."""
    units = [Unit("world", "", print, (), 40, "sample")]
    for branch in ("judge", "generator"):
        for i in range(4):
            units.append(Unit(f"{branch}{i}", "", print, (f"{branch}{i - 1}" if i else "world",), 100, branch))
    return [*units, *(Unit(f"s{i}", "", print, ("judge3", "generator3"), 8, "sample") for i in range(20))]


def simulated(units, workers, told):
    """Let a machine of known speeds do the units in a simulated clock.

    Args:
        units: The units.
        workers: Number of workers.
        told: Function that gives the time left from (measured, units to do, units at work by name, workers).

    Returns:
        Each moment at which a unit ended, with the time that was told to be left.
    """
    order, todo = Board(Path("nowhere"), units).order, {unit.name: unit for unit in units}
    now, at_work, measured, says = 0.0, {}, [], []
    while todo or at_work:
        for name in order:
            if name in todo and len(at_work) < workers and not {*todo[name].needs} & ({*todo} | {*at_work}):
                at_work[name] = now, todo.pop(name)
        ends = {name: begun + unit.cost * SPEEDS[unit.kind] for name, (begun, unit) in at_work.items()}
        name = min(ends, key=ends.get)
        now, (begun, unit) = ends[name], at_work.pop(name)
        measured.append((unit.kind, unit.cost, now - begun))
        left = [todo[name] for name in order if name in todo]
        begun = {n: Begun(u.kind, u.cost, now - b) for n, (b, u) in at_work.items()}
        says.append((now, told(measured, left, begun, workers)))
    return says


def rehearsed(measured, left, begun, workers):
    paces = paces_with(measured, begun.values())
    seconds, needs = {u.name: u.cost * paces(u.kind) for u in left}, {u.name: u.needs for u in left}
    return seconds_left(seconds, needs, {name: unit.left(paces) for name, unit in begun.items()}, workers)


def divided(measured, left, begun, workers):
    """All work that is left over the number of workers, at one pace for every kind."""
    pace = (PRIOR + sum(m[2] for m in measured)) / (PRIOR + sum(m[1] for m in measured))
    return pace * sum(unit.cost for unit in [*left, *begun.values()]) / workers


@pytest.mark.parametrize("workers", [2, 4])
def test_the_time_left_is_near_on_a_machine_of_known_speeds(workers):
    def errors(told):
        says = simulated(study(), workers, told)
        end = says[-1][0]
        return [abs(said - (end - now)) / end for now, said in says[:-1]]

    near, far = errors(rehearsed), errors(divided)
    assert max(near[5:]) < 0.12  # each kind was measured by then
    assert sum(near) < 0.5 * sum(far)


# --- running units ------------------------------------------------------------------------------------------------


def test_a_unit_goes_on_for_what_its_bar_says_or_was_expected():
    def left(spent, seen=None, measured=()):
        return Begun("judge", 100, spent, seen).left(Paces(measured))

    assert left(30) == 70
    assert left(200) == 20  # late: nobody knows
    assert left(30, Advance("step 1/2", 12, whole=True)) == 12
    assert left(30, Advance("video 1/2", 12, whole=False)) == 70  # another bar may follow
    assert left(30, Advance("video 1/2", 90, whole=False)) == 90
    assert left(30, measured=[("judge", 1e6, 2e6)]) == pytest.approx(170, abs=0.1)


def test_units_at_work_tell_the_pace_of_their_kind_where_they_know_it():
    step = Advance("step 1/2", 400, whole=True)
    assert paces_with([], [Begun("judge", 1000, 2600, step)])("judge") == pytest.approx(3, rel=0.05)
    assert paces_with([], [Begun("judge", 1000, 2600, step, whole=False)])("judge") == 1  # the rest of a stopped one
    assert paces_with([], [Begun("judge", 1000, 900)])("judge") == 1  # within its time
    assert paces_with([], [Begun("judge", 1000, 4000)])("judge") > 4  # late already
    assert paces_with([], [Begun("judge", 1000, 100, Advance("video 1/2", 5, whole=False))])("judge") == 1


def test_the_last_bar_of_a_log_is_found(tmp_path, capfd, monkeypatch):
    log = tmp_path / "unit.log"
    assert advance(log) is None
    log.write_text("a warning: 3/4 of it\n")
    assert advance(log) is None
    with bars.Bar("video", 40, seconds=0) as bar:
        bar.start_t = bar.last_print_t = time.time() - 20
        bar.update(10)
    log.write_text("rendered\n" + capfd.readouterr().err)
    found = advance(log)
    assert found.text == "video 10/40" and not found.whole
    assert found.left == pytest.approx(60, abs=3)
    start = log.stat().st_size
    with open(log, "a") as file:
        file.write("step:  20/800,  1.40it/s, 1:02:03 left, train/loss=1.2\nbatch: 1/2,  9.0it/s, 00:01 left\n")
    assert advance(log) == Advance("step 20/800", pytest.approx(3723, abs=2), whole=True)
    os.utime(log, (time.time() - 100,) * 2)  # written 100 s ago
    assert advance(log, start).left == pytest.approx(3623, abs=2)
    assert advance(log, log.stat().st_size) is None  # all of it is of an earlier attempt


def test_durations_for_people():
    assert [clock(s) for s in (0, 0.2, 59, 99, 100, 600, 7200)] == [
        "0 s",
        "1 s",
        "59 s",
        "99 s",
        "2 min",
        "10 min",
        "2.0 h",
    ]


# --- lines --------------------------------------------------------------------------------------------------------


@pytest.fixture
def reporter(tmp_path, monkeypatch):
    """A reporter on four units, and a clock that the test sets."""
    now = [time.time()]
    monkeypatch.setattr(time, "time", lambda: now[0])
    units = [
        Unit("seed0/long", "training a judge", print, (), 100, "judge"),
        Unit("seed0/short", "choosing", print, (), 5),
        Unit("seed0/after", "training on", print, ("seed0/long",), 100, "judge"),
        Unit("seed0/end", "judging", print, ("seed0/after", "seed0/short"), 20),
    ]
    board = Board(tmp_path, units)
    (tmp_path / LOGS / "seed0").mkdir(parents=True)
    return Reporter(board, 2), board, now


def test_a_long_unit_says_how_long_it_takes_and_what_is_left(reporter, capsys):
    report, _, _ = reporter
    report.take(Event("begun", "seed0/long"))
    assert capsys.readouterr().out == "[    0 s] seed0: training a judge (about 2 min; 4 min left in all)\n"
    report.take(Event("begun", "seed0/short"))
    assert capsys.readouterr().out == ""


def test_a_silent_half_minute_ends_with_a_line_on_all_that_runs(reporter, capsys):
    report, board, now = reporter
    report.remind()
    assert capsys.readouterr().out == ""
    report.take(Event("begun", "seed0/long"))
    now[0] += QUIET - 1
    report.remind()
    assert "at work" not in capsys.readouterr().out
    now[0] += 1
    log = board.out / LOGS / "seed0/long.log"
    log.write_text("step: 10/100,  0.33it/s, 04:30 left\n")
    os.utime(log, (now[0],) * 2)
    report.remind()
    line = capsys.readouterr().out
    assert line.startswith("[   30 s] at work: seed0: training a judge (step 10/100); ")
    # three times as slow as expected: 270 s, then nearly as much again for the other of its kind, then the end
    assert "10 min left in all" in line
    report.remind()
    assert capsys.readouterr().out == ""
    now[0] += QUIET
    report.take(Event("done", "seed0/short", 4.0))
    assert "done in 4 s: seed0: choosing" in capsys.readouterr().out
    report.remind()
    assert capsys.readouterr().out == ""


def test_each_unit_that_ends_counts(reporter, capsys):
    report, board, now = reporter
    report.take(Event("begun", "seed0/long"))
    now[0] += 300
    (board.out / "seed0").mkdir()
    (board.out / "seed0/long").touch()
    board.record("seed0/long", 300.0, True)
    report.take(Event("done", "seed0/long", 300.0))
    assert "done in 300 s: seed0: training a judge (1 of 4, 6 min left)" in capsys.readouterr().out
    report.take(Event("failed", "seed0/short", error="no space"))
    board.mark("seed0/short", "no space")
    assert report.failed == {"seed0/short": "no space"}
    assert "seed0: choosing: failed: no space" in capsys.readouterr().out


def test_the_pace_is_this_machines_and_of_whole_units(tmp_path, monkeypatch):
    units = [Unit(name, "", print, (), 10, name) for name in "abc"]
    board = Board(tmp_path, units)
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    board.record("a", 99.0, True)
    assert board.measured() == [("a", 10, 99.0)]
    monkeypatch.setattr("socket.gethostname", lambda: "here")
    assert board.measured() == [("a", 10, 99.0)]  # better than nothing
    board.record("b", 20.0, True)
    board.record("c", 1.0, False)  # the rest of a stopped unit
    assert board.measured() == [("b", 10, 20.0)]
    assert (tmp_path / WORK / "c.json").exists()
