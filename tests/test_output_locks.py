"""An output has one writer at a time."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from output_kit import a_set, another_process, fill, names
from videoalign import VideoAlignError
from videoalign.cli import main
from videoalign.datamodules.parts import Parts
from videoalign.datamodules.shards import Index
from videoalign.models.files import (
    check_free,
    claims_out,
    new_folder,
)
from videoalign.models.locks import Hold, held

# --- one writer at a time -------------------------------------------------------------------------


def command(line):
    """Calls a command line with the output that is to be written."""
    return lambda path: main([*line.split(), "--out", str(path)])


WRITERS = {
    "folder": lambda path: new_folder(path).__enter__(),
    "folder that replaces": lambda path: new_folder(path, "record.json").__enter__(),
    "set": lambda path: a_set(path),
    "parts": lambda path: Parts(path, Index("videos"), {}, 1).begin(),
    "look": check_free,
    "hold": lambda path: Hold().take(path),
    "decorated": lambda path: claims_out(lambda out: None)(path),
    "by a link": lambda path: new_folder(path.parent / "link").__enter__(),
    "by a link of its folder": lambda path: new_folder(path.parent / "other" / "out").__enter__(),
    "by dots": lambda path: new_folder(path.parent / "x" / ".." / "out").__enter__(),
    "generate": command("generate --generator g --prompts p.txt --num-frames 9 --height 32 --width 32"),
    "sprites": command("sprites --workers 1"),
    "join": command("shards join nowhere"),
    "convert": command("convert --from nowhere"),
    "import": command("shards import-csv no.csv --videos . --workers 1"),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_the_second_writer_is_refused_at_once(write, held_folder, capsys):
    folder, process = held_folder
    before = names(folder)
    try:
        write(folder / "out")
    except VideoAlignError as error:
        message = str(error)
    except SystemExit as stop:
        message = capsys.readouterr().err
        assert stop.code == 2
    if "no.csv" in message or "choose from" in message or "required" in message:
        pytest.fail(message)
    assert f"another process (PID {process.pid} on " in message
    assert "name another output" in message
    assert names(folder) == before
    assert process.poll() is None


def test_a_killed_process_leaves_no_lock(tmp_path):
    with another_process(tmp_path / "out") as process:
        with pytest.raises(VideoAlignError, match=f"PID {process.pid}"):
            check_free(tmp_path / "out")
        process.send_signal(signal.SIGKILL)
        process.wait()
        with new_folder(tmp_path / "out") as folder:
            fill(folder)
    assert names(tmp_path) == ["out"]


def test_children_do_not_keep_a_dead_parent_s_lock(tmp_path):
    """Pool and loader processes are forked while the lock is held, and may outlive the process that holds it."""
    script = (
        "import os, sys, time; from videoalign.models.locks import held\n"
        "with held(sys.argv[1]):\n"
        "    if os.fork() == 0: time.sleep(30); os._exit(0)\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, tmp_path / "out"], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    process.kill()
    process.wait()
    check_free(tmp_path / "out")


def test_blocks_of_one_process_nest(tmp_path):
    with held(tmp_path / "out"), new_folder(tmp_path / "out") as folder:
        check_free(tmp_path / "out")
        fill(folder)
    assert names(tmp_path) == ["out"]
    hold = Hold()
    hold.take(tmp_path / "x")
    hold.take(tmp_path / "x")
    assert names(tmp_path) == [".x.lock", "out"]
    hold.drop()
    assert names(tmp_path) == ["out"]


RANKS = [
    {"RANK": "1"},
    {"RANK": "3", "LOCAL_RANK": "0"},
    {"LOCAL_RANK": "1"},
    {"LOCAL_RANK": "0", "NODE_RANK": "1"},
    {"SLURM_PROCID": "2"},
]


@pytest.mark.parametrize("rank", RANKS, ids=str)
def test_other_ranks_of_a_run_join_in(rank, held_folder, monkeypatch):
    for name, value in rank.items():
        monkeypatch.setenv(name, value)
    with held(held_folder[0] / "out"):
        check_free(held_folder[0] / "out")
    with pytest.raises(VideoAlignError, match="another process"), held(held_folder[0] / "out", every=True):
        pass


@pytest.mark.parametrize(
    "rank", [{"RANK": "0", "LOCAL_RANK": "0"}, {"LOCAL_RANK": "0"}, {"SLURM_PROCID": "0"}], ids=str
)
def test_the_first_rank_takes_the_lock(rank, held_folder, monkeypatch):
    for name, value in rank.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(VideoAlignError, match="another process"):
        check_free(held_folder[0] / "out")


def test_a_rank_that_outlives_its_run_keeps_the_next_one_out(tmp_path):
    parts = Parts(tmp_path / "out", Index("videos"), {}, 1)
    parts.begin()
    parts.release()
    with another_process(parts.folder / "r0001") as process:
        with pytest.raises(VideoAlignError, match=f"r0001 is being written by another process \\(PID {process.pid}"):
            parts.begin()
        parts.release()
    parts.begin()
    parts.release()


def _compete(path, start, results):
    start.wait()
    try:
        with new_folder(path) as folder:
            fill(folder, str(os.getpid()))
            time.sleep(0.2)
        results.put("made")
    except VideoAlignError as error:
        results.put("being written" if "being written" in str(error) else str(error))


def test_many_begin_together_and_one_makes_it(tmp_path):
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(6), context.SimpleQueue()
    processes = [context.Process(target=_compete, args=(tmp_path / "out", start, results)) for _ in range(6)]
    for process in processes:
        process.start()
    found = sorted(results.get() for _ in processes)
    for process in processes:
        process.join()
    assert found.count("made") == 1 and len(set(found)) <= 3, found
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["deep", "record.json"]
