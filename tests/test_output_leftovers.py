"""Outputs: modes that the umask says, what dead processes and full disks leave."""

import json
import os
import random
import resource
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

from output_kit import a_set, mine, names, nobody
from videoalign import VideoAlignError
from videoalign.callbacks.run_folder import own_folders
from videoalign.datamodules.parts import Parts
from videoalign.datamodules.shards import Index, ShardSet, ShardWriter
from videoalign.models import locks
from videoalign.models.files import (
    check_readable,
    new_file,
    new_folder,
    read_json,
    scratch_folder,
    sweep,
    write_json,
    write_text,
)
from videoalign.models.locks import HOST, beside, temporary

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


def test_an_output_that_somebody_works_on_is_not_swept(dead, held_folder, capsys):
    """Several hosts may share a name, and their processes are not seen from here; but the lock is."""
    partial = held_folder[0] / left_by(dead)
    partial.mkdir()
    sweep(held_folder[0])
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
