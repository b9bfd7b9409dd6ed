"""What the tests of outputs share: something to write, and another process that writes."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from videoalign.datamodules.shards import ShardWriter


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
def held_folder(tmp_path_factory):
    """A folder with an output ``out`` that another process holds."""
    folder = tmp_path_factory.mktemp("held")
    (folder / "link").symlink_to(folder / "out")
    (folder / "other").symlink_to(folder)
    with another_process(folder / "out") as process:
        yield folder, process


def mine(path: Path) -> None:
    path.write_text("mine")


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
