"""Progress of long work, on a terminal and in a log."""

import io
import re

import pytest

from videoalign import bars, stopping
from videoalign.bars import Bar, Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_gets_whole_lines_with_rate_and_time_left(capfd):
    bar = Bar("videos", 10, seconds=0.0)
    for _ in range(10):
        bar.update()
    bar.close()
    text = capfd.readouterr().err
    assert "\r" not in text
    lines = text.splitlines()
    assert len(lines) == 10
    for number, line in zip(range(1, 11), lines):
        assert re.fullmatch(rf"videos: {number}/10, +(\?|[\d.]+)\w*/s, [\d:?]+ left", line.replace("it/s", "/s")), line


def test_a_log_gets_no_line_before_its_time(capfd):
    bar = Bar("videos", 10, seconds=3600.0)
    bar.update(3)
    assert capfd.readouterr().err == ""
    bar.close()  # what is known at the end is said
    assert capfd.readouterr().err.startswith("videos: 3/10")


def test_steps_before_the_first_do_not_count_in_the_rate(capfd):
    bar = Bar("step", 1_000_000, first=999_990, seconds=0.0)
    bar.start_t -= 10
    bar.update(5)
    bar.close()
    assert "step: 999995/1000000,  0.50it/s, 00:10 left" in capfd.readouterr().err


def test_a_terminal_keeps_one_line(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    bar = Bar("videos", 4)
    bar.update(4)
    bar.close()
    assert "\r" in stream.getvalue() and stream.getvalue().count("\n") == 1


def test_each_kind_of_work_has_a_bar_of_its_own(capfd, monkeypatch):
    made = []
    monkeypatch.setattr(bars, "Bar", lambda *args: made.append(Bar(*args)) or made[-1])
    progress = Progress()
    for what, of in (("pairs", 3), ("videos", 2)):
        for done in range(1, of + 1):
            progress(what, done, of)
    assert [(bar.desc, bar.n, bar.total) for bar in made] == [("pairs", 3, 3), ("videos", 2, 2)]
    assert progress.bar is None
    assert [line.partition(",")[0] for line in capfd.readouterr().err.splitlines()] == ["pairs: 3/3", "videos: 2/2"]


def test_long_work_stops_where_it_reports(capfd, monkeypatch):
    def asked():
        raise stopping.Stopped(15)

    monkeypatch.setattr(stopping, "check", asked)
    with pytest.raises(stopping.Stopped):
        Progress()("pairs", 1, 3)
