"""Outputs: one writer at a time, whole or not there, never in the place of something else, with the umask's modes."""

import contextlib
import errno
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import lightning as L
import pytest
import safetensors.torch
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from videoalign import VideoAlignError
from videoalign.callbacks.tensorboard import own_folders
from videoalign.cli import main
from videoalign.datamodules.parts import Parts
from videoalign.datamodules.shards import Index, ShardSet, ShardWriter
from videoalign.models import locks, renames
from videoalign.models.files import (
    check_free,
    check_readable,
    claims_out,
    new_file,
    new_folder,
    read_json,
    scratch_folder,
    sweep,
    write_bytes,
    write_json,
    write_text,
)
from videoalign.models.locks import HOST, Hold, beside, held, temporary
from videoalign.models.renames import move


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(folder: Path, text: str = "made") -> None:
    (folder / "record.json").write_text(text)
    (folder / "deep").mkdir()
    (folder / "deep" / "weights").write_text(text)


def a_set(path: Path, samples: int = 3, **options) -> None:
    with ShardWriter(path, "videos", **options) as writer:
        for number in range(samples):
            writer.write(f"{number}", {"": b"%d" % number * 50}, {"prompt": "a cat"})


@pytest.fixture
def portable(monkeypatch):
    """Replaces renameat2, which some systems and file systems do not have."""
    monkeypatch.setattr(renames, "_renameat2", lambda *args: False)


@pytest.fixture(params=["renameat2", "portable"])
def system(request):
    if request.param == "portable":
        request.getfixturevalue("portable")


# --- one writer at a time -------------------------------------------------------------------------


@contextlib.contextmanager
def another_process(path: Path):
    """Another process that holds an output."""
    script = (
        "import sys; from videoalign.models.locks import held\n"
        "with held(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen([sys.executable, "-c", script, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an output ``out`` that another process holds."""
    folder = tmp_path_factory.mktemp("held")
    (folder / "link").symlink_to(folder / "out")
    (folder / "other").symlink_to(folder)
    with another_process(folder / "out") as process:
        yield folder, process


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
def test_the_second_writer_is_refused_at_once(write, place, capsys):
    folder, process = place
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
def test_other_ranks_of_a_run_join_in(rank, place, monkeypatch):
    for name, value in rank.items():
        monkeypatch.setenv(name, value)
    with held(place[0] / "out"):
        check_free(place[0] / "out")
    with pytest.raises(VideoAlignError, match="another process"), held(place[0] / "out", every=True):
        pass


@pytest.mark.parametrize(
    "rank", [{"RANK": "0", "LOCAL_RANK": "0"}, {"LOCAL_RANK": "0"}, {"SLURM_PROCID": "0"}], ids=str
)
def test_the_first_rank_takes_the_lock(rank, place, monkeypatch):
    for name, value in rank.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(VideoAlignError, match="another process"):
        check_free(place[0] / "out")


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


# --- whole or not there ---------------------------------------------------------------------------


def mine(path: Path) -> None:
    path.write_text("mine")


def a_folder(path: Path) -> None:
    path.mkdir()
    (path / "mine").write_text("mine")


APPEARING = {
    "a file": mine,
    "a folder": a_folder,
    "an empty folder": Path.mkdir,
    "a link": lambda path: path.symlink_to("elsewhere"),
    "a pipe": os.mkfifo,
}


@pytest.mark.parametrize("was_there", [False, True], ids=["nothing before", "an empty folder before"])
@pytest.mark.parametrize("appear", APPEARING.values(), ids=APPEARING)
def test_what_appears_meanwhile_stays(appear, was_there, system, tmp_path):
    if was_there and appear is APPEARING["an empty folder"]:
        pytest.skip("it is as it was")
    out = tmp_path / "out"
    if was_there:
        out.mkdir()
    with pytest.raises(VideoAlignError, match=r"something has appeared there.*stands in .*out\.finished"):
        with new_folder(out) as folder:
            fill(folder)
            if was_there:
                out.rmdir()
            appear(out)
            before = out.lstat().st_ino, out.lstat().st_mode
    assert (out.lstat().st_ino, out.lstat().st_mode) == before
    assert names(tmp_path) == ["out", "out.finished"]
    assert (tmp_path / "out.finished" / "deep" / "weights").read_text() == "made"


def test_an_empty_folder_is_filled(system, tmp_path):
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as folder:
        fill(folder)
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["deep", "record.json"]


def earlier(tmp_path: Path) -> Path:
    out = tmp_path / "out"
    out.mkdir()
    fill(out, "earlier")
    return out


def test_an_earlier_one_is_replaced(system, tmp_path):
    out = earlier(tmp_path)
    with new_folder(out, replaces="record.json") as folder:
        (folder / "record.json").write_text("new")
        assert (out / "deep" / "weights").read_text() == "earlier"  # until the end
    assert names(tmp_path) == ["out"]
    assert names(out) == ["record.json"]
    assert (out / "record.json").read_text() == "new"


CHANGES = {
    "a file in it": lambda out: mine(out / "notes"),
    "a file deep in it": lambda out: mine(out / "deep" / "notes"),
    "another folder": lambda out: (shutil.rmtree(out), a_folder(out)),
    "a file": lambda out: (shutil.rmtree(out), mine(out)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_earlier_one_that_was_changed_meanwhile_stays(change, system, tmp_path):
    out = earlier(tmp_path)
    with pytest.raises(VideoAlignError, match="something has appeared"):
        with new_folder(out, replaces="record.json") as folder:
            (folder / "record.json").write_text("new")
            change(out)
    assert names(tmp_path) == ["out", "out.finished"]
    assert any(path.read_text() == "mine" for path in [*out.rglob("*"), out] if path.is_file())


def test_an_earlier_one_that_was_removed_meanwhile_is_no_matter(system, tmp_path):
    out = earlier(tmp_path)
    with new_folder(out, replaces="record.json") as folder:
        (folder / "record.json").write_text("new")
        shutil.rmtree(out)
    assert names(tmp_path) == ["out"]
    assert (out / "record.json").read_text() == "new"


def test_an_earlier_one_comes_back_when_the_new_one_cannot_take_its_name(portable, tmp_path, monkeypatch):
    out = earlier(tmp_path)

    def fail(source, target):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(renames, "move", fail)
    with pytest.raises(VideoAlignError, match="Input/output error"), new_folder(out, replaces="record.json") as folder:
        fill(folder, "new")
    assert names(tmp_path) == ["out"]
    assert (out / "record.json").read_text() == "earlier"


def test_a_folder_that_a_kill_left_aside_comes_back(tmp_path, monkeypatch, capsys):
    """Where the system cannot exchange two folders, a kill may come between the two renamings."""
    out = earlier(tmp_path)
    monkeypatch.setattr(locks, "_started", lambda pid: 1)
    aside = temporary(out, "old")
    out.rename(aside)
    monkeypatch.undo()
    sweep(tmp_path)
    assert names(tmp_path) == ["out"]
    assert (out / "record.json").read_text() == "earlier"
    assert "is back" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [VideoAlignError("wrong"), OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr
)
@pytest.mark.parametrize("before", ["nothing", "an empty folder", "an earlier one"])
def test_failed_work_leaves_everything_as_it_was(error, before, tmp_path):
    out = tmp_path / "out"
    if before != "nothing":
        earlier(tmp_path) if before == "an earlier one" else out.mkdir()
    was = names(tmp_path), names(out) if out.exists() else None
    with pytest.raises(type(error)), new_folder(out, replaces="record.json") as folder:
        fill(folder)
        raise error
    assert was == (names(tmp_path), names(out) if out.exists() else None)


@pytest.mark.parametrize("kind", ["a file", "a folder", "an empty folder", "a link", "a pipe"])
def test_move_refuses(kind, system, tmp_path):
    APPEARING[kind](tmp_path / "there")
    for make in (mine, a_folder):
        make(tmp_path / "source")
        with pytest.raises(FileExistsError):
            move(tmp_path / "source", tmp_path / "there")
        assert names(tmp_path) == ["source", "there"]
        move(tmp_path / "source", tmp_path / "free")
        shutil.rmtree(tmp_path / "free") if (tmp_path / "free").is_dir() else (tmp_path / "free").unlink()


# --- names and places -----------------------------------------------------------------------------

ODD = [
    "%", "a%06d", "%s%s%n", "a b", "a'b", 'a"b', "[ab]", "{a,b}", "a{0..3}", "a:b", "file:x", "pipe:touch ran", "s3:x",
    "a::b", "ü 猫 🐈", "a\nb", "a\tb", "-x", "--out", "-", "~", "$HOME", "a*?", "a;b&c", "a\\b", "#", "a|b", ".hidden",
    "a.tar", "x" * 200, "ü" * 100, "x" * 255, "\x7f",
]  # fmt: skip


@pytest.mark.parametrize("name", ODD, ids=lambda name: name[:12].encode("unicode_escape").decode())
def test_odd_names_work(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a_set(Path(name))
    assert [content.read("mp4") for content in ShardSet(Path(name)).contents()] == [b"0" * 50, b"1" * 50, b"2" * 50]
    assert names(tmp_path) == [name] and names(Path(name)) == ["000000.parquet", "000000.tar", "index.json"]
    shutil.rmtree(name)
    parts = Parts(name, Index("videos"), {}, 1)
    parts.begin()
    writer = parts.writer(0)
    writer.write("a", {"mp4": b"1"}, {"prompt": "a cat"})
    writer.close()
    parts.finish()
    parts.release()
    assert ShardSet(Path(name)).index.samples == 1
    assert names(tmp_path) == [name]


def deny(tmp_path):
    (tmp_path / "no").mkdir(0o555)
    return tmp_path / "no" / "out"


def below_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    return tmp_path / "file" / "out"


def looping(tmp_path):
    (tmp_path / "out").symlink_to("out")
    return tmp_path / "out"


def occupied(make):
    def prepare(tmp_path):
        make(tmp_path / "out")
        return tmp_path / "out"

    return prepare


REFUSED = {
    "name too long": (lambda tmp: tmp / ("x" * 256), "name too long"),
    "name too long, in bytes": (lambda tmp: tmp / ("ü" * 128), "name too long"),
    "path too long": (lambda tmp: tmp / "/".join(["x" * 200] * 25), "name too long"),
    "not UTF-8": (lambda tmp: tmp / "\udcff", "not UTF-8"),
    "with a NUL": (lambda tmp: f"{tmp}/a\0b", "NUL"),
    "below a file": (below_a_file, "not a directory|file exists"),
    "a link to itself": (looping, "leads to itself"),
    "a read-only folder": (deny, "permission denied"),
    "a file there": (occupied(mine), "exists already"),
    "a folder there": (occupied(a_folder), "exists already"),
    "a pipe there": (occupied(os.mkfifo), "exists already"),
    "of the system": (lambda tmp: "/proc/out", "cannot be written"),
    "the root": (lambda tmp: "/", "is the root"),
}


@contextlib.contextmanager
def nobody(tmp_path: Path):
    """A user who is not root, whom no mode stops."""
    if os.geteuid():
        yield
        return
    for folder in (tmp_path, *tmp_path.parents):
        if folder.is_relative_to("/tmp/pytest-of-root"):
            folder.chmod(0o755)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(("prepare", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize(
    "write",
    [
        check_free,
        lambda path: new_folder(path).__enter__(),
        a_set,
        lambda path: Parts(path, Index("videos"), {}, 1).begin(),
    ],
    ids=["look", "folder", "set", "parts"],
)
def test_what_cannot_be_an_output_is_one_sentence(prepare, message, write, tmp_path):
    path = prepare(tmp_path)
    before = sorted(os.listdir(tmp_path))
    with nobody(tmp_path) if prepare is deny else contextlib.nullcontext():
        with pytest.raises(VideoAlignError, match=f"(?i){message}"):
            write(path)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("target", ["disk", "deep/disk"])
@pytest.mark.parametrize("there", [False, True])
def test_links_are_followed(target, there, tmp_path):
    """The link stays, and the set stands where it leads, on that file system."""
    if there:
        (tmp_path / target).mkdir(parents=True)
    (tmp_path / "out").symlink_to(target)
    a_set(tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert ShardSet(tmp_path / "out").index.samples == 3
    assert names((tmp_path / target).parent) == (["disk", "out"] if target == "disk" else ["disk"])
    with pytest.raises(VideoAlignError, match="exists already"):
        a_set(tmp_path / "out")
    (tmp_path / "text").symlink_to(tmp_path / target / "text")
    write_text(tmp_path / "text", "1")
    assert (tmp_path / "text").is_symlink()
    assert (tmp_path / target / "text").read_text() == "1"


@pytest.mark.parametrize(
    "write",
    [write_text, lambda path, text: write_bytes(path, text.encode()), write_json],
    ids=["text", "bytes", "json"],
)
def test_single_files_are_written_whole(write, tmp_path):
    path = tmp_path / "new" / "folder" / "file.json"
    write(path, "one")
    inode = path.stat().st_ino
    write(path, "two")
    assert "two" in path.read_text()
    assert path.stat().st_ino != inode
    assert names(path.parent) == ["file.json"]
    (tmp_path / "folder").mkdir()
    with pytest.raises(VideoAlignError, match="Is a directory"):
        write(tmp_path / "folder", "one")
    with pytest.raises(RuntimeError), new_file(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert "two" in path.read_text()
    assert names(path.parent) == ["file.json"]


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Every file and folder is synced, then renamed, and then the folder above is synced."""
    events, fsync, real = [], os.fsync, renames._renameat2
    monkeypatch.setattr(
        os,
        "fsync",
        lambda file: (events.append(os.path.basename(os.readlink(f"/proc/self/fd/{file}"))), fsync(file))[1],
    )
    monkeypatch.setattr(renames, "_renameat2", lambda *args: (events.append("named"), real(*args))[1])
    a_set(tmp_path / "out", 4, per_shard=2)
    named = events.index("named")
    assert {"000000.tar", "000001.tar", "index.json"} <= {*events[:named]} or events[named - 1].startswith(
        ".out.partial"
    )
    assert {"000000.tar", "000001.tar"} <= {*events[:named]}
    assert events[named + 1 :] == [tmp_path.name]


# --- access ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_modes_are_those_of_the_umask(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        with new_folder(tmp_path / "out") as folder:
            safetensors.torch.save_file({"x": torch.ones(2)}, folder / "a.safetensors")
            (folder / "deep").mkdir(0o700)
            (folder / "deep" / "b").touch(0o600)
        with new_file(tmp_path / "c.safetensors") as file:
            safetensors.torch.save_file({"x": torch.ones(2)}, file)
        write_json(tmp_path / "d.json", 1)
        a_set(tmp_path / "set")
    finally:
        os.umask(before)
    files_ = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files_) == 7
    assert {path.stat().st_mode & 0o777 for path in files_} == {mode}
    assert {p.stat().st_mode & 0o777 for p in tmp_path.rglob("*") if p.is_dir()} == {0o777 & ~umask}


def test_the_reason_why_modes_are_set(tmp_path):
    """When this fails, safetensors follows the umask, and :func:`~videoalign.models.files.settle` may leave modes."""
    before = os.umask(0o022)
    try:
        safetensors.torch.save_file({"x": torch.ones(2)}, tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("where", ["file", "folder", "parent"])
def test_a_file_of_somebody_else_s_is_not_called_damaged(where, tmp_path):
    if os.geteuid():
        pytest.skip("needs root, to stop being root")
    folder = tmp_path / "model"
    folder.mkdir()
    write_json(folder / "record.json", 1)
    for path in (tmp_path, *tmp_path.parents):
        if path.is_relative_to("/tmp/pytest-of-root"):
            path.chmod(0o755)
    (folder / "record.json" if where == "file" else folder).chmod(0o600 if where == "file" else 0o700)
    try:
        with nobody(tmp_path):
            for read in (
                lambda: check_readable(folder / "record.json"),
                lambda: check_readable(folder),
                lambda: read_json(folder / "record.json", "a model"),
            ):
                with pytest.raises(
                    VideoAlignError,
                    match=r"is not damaged, but you have no permission to read it: .* belongs to root, with mode",
                ):
                    read()
    finally:
        folder.chmod(0o755)
    check_readable(folder)
    check_readable("org/name-on-the-hub")


# --- what dead processes leave --------------------------------------------------------------------


def left_by(pid: object, host: str = HOST, start: int = 5, path: str = "out") -> str:
    return f".{path}.partial-{host}-{pid}-{start}-0"


@pytest.fixture(scope="module")
def dead() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    "write",
    [
        lambda tmp: a_set(tmp / "out"),
        lambda tmp: a_set(tmp / "other"),
        lambda tmp: write_text(tmp / "file", "1"),
        lambda tmp: scratch_folder(tmp / "x").__enter__(),
    ],
    ids=["the same set", "another set", "a file", "a spool"],
)
def test_what_the_dead_left_is_removed_with_a_word(write, dead, tmp_path, capsys):
    (tmp_path / left_by(dead)).mkdir()
    (tmp_path / left_by(dead) / "000000.tar").write_text("half")
    (tmp_path / left_by(dead, path="a\nb.json")).write_text("half")
    (tmp_path / left_by(os.getpid(), start=1)).mkdir()  # this number was another process's
    write(tmp_path)
    assert not any(name.startswith((".out.partial", ".a\nb")) for name in names(tmp_path))
    told = capsys.readouterr().err
    assert told.count("videoalign: removed") == 3
    assert f"process {dead} left unfinished" in told


def test_what_is_not_the_dead_s_stays(dead, tmp_path, capsys):
    started = locks._started(os.getppid())
    kept = [
        left_by(os.getppid(), start=started),
        left_by(dead, "elsewhere"),
        ".out.partial",
        ".out.partial-12",
        f".out.partial-{HOST}-{dead}",
        "out.partial-x-1-1-1",
        ".out.parts",
        temporary(tmp_path / "out").name,
    ]
    for name in kept:
        (tmp_path / name).mkdir()
    sweep(tmp_path)
    write_text(tmp_path / "file", "1")
    assert names(tmp_path) == sorted([*kept, "file"]) and capsys.readouterr().err == ""


def test_an_output_that_somebody_works_on_is_not_swept(dead, place, capsys):
    """Several hosts may share a name, and their processes are not seen from here; but the lock is."""
    partial = place[0] / left_by(dead)
    partial.mkdir()
    sweep(place[0])
    assert partial.exists()
    assert capsys.readouterr().err == ""
    partial.rmdir()


WORK = """
import random, sys, time
from pathlib import Path
from videoalign.datamodules.shards import Index, ShardWriter
from videoalign.datamodules.parts import Parts
from videoalign.models.files import new_folder, write_json
kind, out = sys.argv[1], Path(sys.argv[2])
print("begun", flush=True)
for number in range(100_000):
    if kind == "json":
        write_json(out, [number] * 20_000)
    elif kind == "folder":
        with new_folder(out, replaces="record.json") as folder:
            for name in ("a", "b", "record.json"):
                (folder / name).write_text(str(number) * 5000)
    elif kind == "set":
        with ShardWriter(out.with_name(f"{out.name}-{number}"), "videos", per_shard=5) as writer:
            for i in range(20):
                writer.write(f"{i}", {"": b"x" * 20_000}, {"prompt": str(number)})
    else:
        parts = Parts(out.with_name(f"{out.name}-{number}"), Index("videos"), {}, 12)
        parts.begin()
        writer = parts.writer(0, 4)
        for i in range(12):
            key = f"{i}"
            if key not in parts.done():
                writer.write(key, {"mp4": b"x" * 20_000}, {"prompt": "a"})
        writer.close()
        parts.finish()
        parts.release()
"""


def whole(kind: str, folder: Path) -> int:
    """Number of results; asserts that all of them are whole."""
    count = 0
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        count += 1
        if kind == "json":
            assert len(set(json.loads(path.read_text()))) == 1
        elif kind == "folder":
            assert len({(path / name).read_text() for name in ("a", "b", "record.json")}) == 1
        else:
            shards = ShardSet(path)
            assert shards.index.samples == {"set": 20, "parts": 12}[kind] == len(list(shards.contents()))
    return count


@pytest.mark.parametrize("kind", ["json", "folder", "set", pytest.param("parts", marks=pytest.mark.slow)])
def test_kill_at_any_moment(kind, tmp_path):
    """Whatever stands under its name is whole, and the next writer leaves nothing of the dead one's."""
    (tmp_path / "work.py").write_text(WORK)
    folder = tmp_path / "runs"
    process = subprocess.Popen([sys.executable, tmp_path / "work.py", kind, folder / "out"], stdout=subprocess.PIPE)
    process.stdout.readline()
    time.sleep(random.uniform(0.05, 0.5))
    process.kill()
    process.wait()
    found = whole(kind, folder)
    a_set(folder / "next")
    left = [name for name in names(folder) if name.startswith(".") and not name.endswith((".lock", ".parts"))]
    assert left == []
    assert len(names(folder)) >= found + 1


# --- full disks -----------------------------------------------------------------------------------


@pytest.fixture
def small_files():
    """No file may grow beyond 20,000 bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_is_full_in_the_middle(small_files, tmp_path):
    write_text(tmp_path / "file", "earlier")
    with pytest.raises(OSError, match="too large"):
        write_text(tmp_path / "file", "x" * 30_000)
    with pytest.raises(OSError, match="too large"):
        with ShardWriter(tmp_path / "set", "videos") as writer:
            for number in range(4):
                writer.write(f"{number}", {"": b"x" * 15_000}, {"prompt": "a"})
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "earlier"


def test_parts_lose_no_more_than_the_open_shard_to_a_full_disk(small_files, tmp_path):
    """The shard that could not be ended is not taken for a whole one."""
    parts = Parts(tmp_path / "out", Index("videos"), {}, 4)
    parts.begin()
    writer = parts.writer(0, per_shard=2)
    writer.write("a", {"mp4": b"x" * 3000}, {"prompt": "a"})
    writer.write("b", {"mp4": b"x" * 3000}, {"prompt": "a"})
    writer.write("c", {"mp4": b"x" * 3000}, {"prompt": "a"})
    with pytest.raises(OSError, match="too large"):
        writer.write("d", {"mp4": b"x" * 30_000}, {"prompt": "a"})
    writer.close()
    parts.release()
    assert parts.done() == {"a", "b"}
    assert sorted(path.name for path in parts.folder.glob("*.tar")) == ["r0000-00000.tar"]
    resource.setrlimit(resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE)[1:] * 2)
    parts.begin()
    writer = parts.writer(0, per_shard=2)
    for key in "cd":
        writer.write(key, {"mp4": b"x" * 30_000}, {"prompt": "a"})
    writer.close()
    parts.finish()
    parts.release()
    assert [content.key for content in ShardSet(tmp_path / "out").contents()] == list("abcd")


def test_a_set_finds_its_name_taken_and_keeps_its_parts(tmp_path):
    """Once that is moved out of the way, the same parts become the set."""

    def run():
        parts = Parts(tmp_path / "out", Index("videos"), {}, 1)
        parts.begin()
        writer = parts.writer(0)
        if not parts.done():
            writer.write("a", {"mp4": b"1"}, {"prompt": "a cat"})
            mine(tmp_path / "out")
        writer.close()
        try:
            parts.finish()
        finally:
            parts.release()

    with pytest.raises(VideoAlignError, match=r"something has appeared there.*keeps all parts"):
        run()
    assert (tmp_path / "out").read_text() == "mine"
    (tmp_path / "out").unlink()
    run()
    assert ShardSet(tmp_path / "out").index.samples == 1
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("size", ["64k", "300k"])
def test_a_small_file_system(size, tmp_path):
    """On a real file system that is full nothing half-written remains, and what was there is whole."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        write_text(disk / "file", "earlier")
        for write in (lambda: write_text(disk / "file", "x" * 500_000), lambda: a_set(disk / "set", 10_000)):
            with pytest.raises((OSError, VideoAlignError), match="No space left"):
                write()
        assert names(disk) == ["file"]
        assert (disk / "file").read_text() == "earlier"
    finally:
        subprocess.run(["umount", disk], check=True)


def test_threads_that_write_one_file(tmp_path):
    threads = [threading.Thread(target=write_json, args=(tmp_path / "x.json", [i] * 1000)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(json.loads((tmp_path / "x.json").read_text()))) == 1
    assert names(tmp_path) == ["x.json"]


def test_names_beside_an_output_stay_within_what_file_systems_take(tmp_path):
    for name in ("x" * 255, "ü" * 127, "a"):
        for path in (temporary(tmp_path / name), beside(tmp_path / name, "lock"), beside(tmp_path / name, "parts")):
            assert len(os.fsencode(path.name)) <= 255
    assert beside(tmp_path / ("x" * 254 + "a"), "lock") != beside(tmp_path / ("x" * 254 + "b"), "lock")


def test_runs_that_begin_together_have_folders_of_their_own(tmp_path, monkeypatch):
    """All runs see the same folders before any of them has written."""
    for name, options in (("a", {}), ("b", {"version": 3})):
        trainers = [
            own_folders(L.Trainer(accelerator="cpu", logger=TensorBoardLogger(tmp_path, name, **options)))
            for _ in range(3)
        ]
        found = [Path(trainer.logger.log_dir).name for trainer in trainers]
        assert found == (["version_3"] * 3 if options else ["version_0", "version_1", "version_2"])
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert own_folders(L.Trainer(accelerator="cpu", logger=TensorBoardLogger(tmp_path, "c"))).logger.version == 0
    assert not (tmp_path / "c").exists()
