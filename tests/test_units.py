"""Work in units: order, sharing between processes, failure, interruption."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest

from unit_makers import broken, chain, empty, loud, many
from videoalign import VideoAlignError
from videoalign.miniature.study.units import WORK, Board, Unit, leading_to
from videoalign.miniature.study.workers import work


def runs(path):
    return len(Path(f"{path}.runs").read_text().splitlines())


def test_needs_come_first_and_a_second_call_does_nothing(tmp_path, capfd):
    work(tmp_path, chain(tmp_path), 2)
    printed = capfd.readouterr().out
    assert printed.index("making a") < printed.index("making b") < printed.index("making c")
    assert "3 of 3" in printed
    work(tmp_path, chain(tmp_path), 2)
    assert [runs(tmp_path / name) for name in "abc"] == [1, 1, 1]
    assert "done before" in capfd.readouterr().out


@pytest.mark.slow
def test_two_calls_at_once_share_the_work_and_do_nothing_twice(tmp_path):
    calls = [
        multiprocessing.get_context("spawn").Process(target=work, args=(tmp_path, many(tmp_path, 30, 0.1), 2))
        for _ in range(2)
    ]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    assert [call.exitcode for call in calls] == [0, 0]
    assert all(runs(tmp_path / f"u/{i}") == 1 for i in range(30))


def test_a_failure_leaves_the_rest_done_and_is_tried_again(tmp_path, capfd):
    with pytest.raises(VideoAlignError, match=r"bad: the disk is on fire .*bad\.log"):
        work(tmp_path, broken(tmp_path), 2)
    assert (tmp_path / "other").exists()
    assert not (tmp_path / "after").exists()
    (tmp_path / "switch").touch()
    work(tmp_path, broken(tmp_path), 1)
    assert (tmp_path / "after").exists()
    assert runs(tmp_path / "other") == 1


def test_a_unit_without_result_is_a_failure(tmp_path):
    with pytest.raises(VideoAlignError, match="left no"):
        work(tmp_path, empty(tmp_path), 1)


def test_what_a_unit_prints_is_in_its_log(tmp_path, capfd):
    work(tmp_path, loud(tmp_path), 1)
    assert {*(tmp_path / "logs/said.log").read_text().splitlines()} == {"to the log", "from below python"}
    printed = capfd.readouterr()
    assert "to the log" not in printed.out
    assert "below" not in printed.err


def test_what_most_work_waits_for_comes_first():
    units = [
        Unit("small", "", print, (), 5),
        Unit("root", "", print, (), 1),
        Unit("leaf", "", print, ("root",), 100),
        Unit("end", "", print, ("leaf", "small"), 1),
    ]
    assert Board(Path("nowhere"), units).order == ["root", "leaf", "small", "end"]


def test_what_only_led_to_results_that_are_there_is_not_made_again(tmp_path):
    board = Board(tmp_path, chain(tmp_path, "abcd"))
    assert [unit.name for unit in board.left()] == [*"abcd"]
    (tmp_path / "c").touch()
    assert {unit.name for unit in board.left()} == {*"abd"}  # d reads a and b too
    (tmp_path / "d").touch()
    assert board.left() == []


def test_a_locked_unit_is_left_to_whoever_holds_it(tmp_path):
    board = Board(tmp_path, many(tmp_path, 2, 0))
    lock = filelock.FileLock(tmp_path / WORK / f"{board.order[0]}.lock")
    Path(lock.lock_file).parent.mkdir(parents=True)
    with lock, board.claim() as unit:
        assert unit.name == board.order[1]
    with board.claim() as first, board.claim() as second:
        assert {first.name, second.name} == {*board.order}
        with board.claim() as third:
            assert third is None


def test_what_leads_to_a_result(tmp_path):
    units = [*chain(tmp_path, "abc"), Unit("other", "", print)]
    assert [unit.name for unit in leading_to(units, ["b"])] == ["a", "b"]
    assert leading_to(units, []) == []


def test_names_are_told_apart():
    with pytest.raises(ValueError, match="same name"):
        Board(Path("nowhere"), [Unit("a", "", print), Unit("a", "", print)])


def test_a_failure_blocks_all_that_need_it(tmp_path):
    board = Board(tmp_path, chain(tmp_path, "abcd"))
    (tmp_path / WORK).mkdir()
    board.mark("b", "broken")
    assert board.blocked() == {"b", "c", "d"}
    (tmp_path / "b").touch()  # somebody made it after all
    assert board.blocked() == set()
    (tmp_path / "b").unlink()
    board.mark("b")
    assert board.blocked() == set()


def test_what_another_call_gave_up_is_no_success(tmp_path, monkeypatch):
    """The failure comes from another call while this one is at work."""
    (tmp_path / WORK).mkdir()
    monkeypatch.setattr(Board, "mark", lambda *_: None)  # as if it came after the beginning
    (tmp_path / WORK / "bad.failed").write_text("elsewhere")
    with pytest.raises(VideoAlignError, match="2 stages are not done, first bad"):
        work(tmp_path, broken(tmp_path), 1)
    assert (tmp_path / "other").exists()


SCRIPT = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from unit_makers import many
from videoalign.miniature.study.workers import work
if __name__ == "__main__":
    out = Path(sys.argv[1])
    work(out, many(out, int(sys.argv[2]), float(sys.argv[3])), int(sys.argv[4]))
"""


def call(tmp_path, count, seconds, processes):
    """A call in a process group of its own, returned when its first unit is done."""
    (tmp_path / "long.py").write_text(SCRIPT)
    command = [sys.executable, tmp_path / "long.py", tmp_path / "out", str(count), str(seconds), str(processes)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert any("done in" in line for line in process.stdout)
    return process, tmp_path / "out"


@pytest.mark.slow
def test_a_killed_call_goes_on(tmp_path):
    """SIGKILL ends the whole group, and the locks end with the processes."""
    process, out = call(tmp_path, 8, 0.7, 2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    made = {path for path in (out / "u").glob("*") if path.suffix != ".runs"}
    assert 1 <= len(made) < 8
    before = {path: path.stat().st_mtime_ns for path in made}
    process, _ = call(tmp_path, 8, 0, 2)
    process.communicate()
    assert process.returncode == 0
    assert all((out / f"u/{i}").exists() for i in range(8))
    assert {path: path.stat().st_mtime_ns for path in made} == before


@pytest.mark.slow
def test_workers_end_with_their_call(tmp_path):
    """A parent that is killed alone leaves no orphan that goes on computing."""
    process, out = call(tmp_path, 200, 0.2, 1)
    process.kill()
    process.wait()
    before, count = -1, 0
    while count != before:
        time.sleep(1.5)  # several units' time
        before, count = count, len(list((out / "u").glob("*")))
    assert count < 2 * 200  # two files a unit: an orphan goes on to the last
