"""Outputs: whole or not there, never in the place of something else, under odd names and in odd places."""

import contextlib
import errno
import os
import shutil
from pathlib import Path

import pytest

from output_kit import a_set, fill, mine, names, nobody
from videoalign import VideoAlignError
from videoalign.datamodules.parts import Parts
from videoalign.datamodules.shards import Index, ShardSet
from videoalign.models import locks, renames
from videoalign.models.files import (
    check_free,
    new_file,
    new_folder,
    sweep,
    write_bytes,
    write_json,
    write_text,
)
from videoalign.models.locks import temporary
from videoalign.models.renames import move


@pytest.fixture
def portable(monkeypatch):
    """Replaces renameat2, which some systems and file systems do not have."""
    monkeypatch.setattr(renames, "_renameat2", lambda *args: False)


@pytest.fixture(params=["renameat2", "portable"])
def system(request):
    if request.param == "portable":
        request.getfixturevalue("portable")


# --- whole or not there ---------------------------------------------------------------------------


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


def test_a_home_folder_that_no_shell_has_named_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VideoAlignError, match=r"output ~/latents: a shell has left ~ as it is.*; write /\S+/latents$"):
        a_set(Path("~/latents"))
    assert names(tmp_path) == []
    Path("~").mkdir()
    a_set(Path("~/latents"))
    assert names(Path("~")) == ["latents"]


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
