"""Videos that nobody rated yet become one set, ready for annotators."""

import pytest

from helpers import call, flags, noise_clip
from videoalign.annotation.store import Store
from videoalign.cli import main
from videoalign.datamodules.shards import ShardSet, ShardWriter
from videoalign.datamodules.verify import verify


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two models' videos of three prompts, and their table."""
    folder = tmp_path_factory.mktemp("files")
    rows = ["source,prompt,path"]
    for i, (source, prompt) in enumerate(
        (s, p) for s in ("wan", "ltx") for p in ("a cat", "a dog", 'a "red, fast" car')
    ):
        path = folder / source / f"{i}.mp4"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(noise_clip(i, 4, fps=4))
        quoted = prompt.replace('"', '""')
        rows.append(f'{source},"{quoted}",{source}/{i}.mp4')
    (folder / "table.csv").write_text("\n".join(rows))
    return folder


def run(capsys, *command):
    """Status, standard output and errors of a command."""
    status = 0
    try:
        main(["shards", *map(str, command)])
    except SystemExit as done:
        status = done.code
    told = capsys.readouterr()
    return status, told.out, told.err


def test_a_table_of_files_becomes_a_set_that_can_be_rated(files, tmp_path, capsys):
    status, said, _ = run(
        capsys, "import-videos", files / "table.csv", "--videos", files, "--out", tmp_path / "set", "--workers", "1"
    )
    assert status == 0
    assert "6 videos of 3 prompts: 3 by wan, 3 by ltx" in said
    shards = ShardSet(tmp_path / "set", "videos")
    assert not [*verify(shards)]
    content = next(c for c in shards.contents() if c.key == "000007")
    assert content.read("mp4") == noise_clip(5, 4, fps=4)
    assert content.record == {
        "prompt": 'a "red, fast" car',
        "source": "ltx",
        "path": "ltx/5.mp4",
        "fps": 4.0,
        "num_frames": 4,
        "height": 32,
        "width": 32,
    }
    given = flags(videos=tmp_path / "set", db=tmp_path / "votes.db", validation=0, benchmark=0)
    assert call("annotate", "begin", *given) == 0
    assert len(Store(tmp_path / "votes.db").pairs()) == 3


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("wan,a cat,nowhere.mp4", "there is no file"),
        ("wan,,wan/0.mp4", "there is no prompt"),
        (",a cat,wan/1.mp4", "there is no source"),
        ("ltx,a cat,wan/0.mp4", "repeats line 2: the same video and prompt, but another source"),
        ("wan,a cat,broken.mp4", "broken.mp4"),
        ("wan,a cat,../x.mp4", "not a path inside"),
    ],
)
def test_unsound_rows_are_named_or_left_out(files, tmp_path, capsys, row, reason):
    (files / "broken.mp4").write_bytes(b"no video")
    table = tmp_path / "table.csv"
    table.write_text((files / "table.csv").read_text() + f"\n{row}\n")
    command = ("import-videos", table, "--videos", files, "--out", tmp_path / "set", "--workers", "1")
    status, _, errors = run(capsys, *command)
    assert status == 2
    assert "line 8: " in errors
    assert reason in errors
    assert not (tmp_path / "set").exists()
    status, said, _ = run(capsys, *command, "--skip-bad-rows")
    assert status == 0
    assert "6 videos" in said
    assert "1 rows rejected" in said


def test_a_table_without_sources_is_refused(files, tmp_path, capsys):
    table = tmp_path / "table.csv"
    table.write_text("path,prompt\nwan/0.mp4,a cat\n")
    status, _, errors = run(capsys, "import-videos", table, "--videos", files, "--out", tmp_path / "set")
    assert status == 2
    assert "lacks the columns source" in errors


def sampled(path, seeds, **record):
    with ShardWriter(path, "videos") as writer:
        for number, seed in enumerate(seeds):
            writer.write(f"{number}", {"": noise_clip(seed, 4, fps=4)}, {"prompt": f"prompt {number}", **record})
    return path


def test_sets_of_several_generators_become_one(tmp_path, capsys):
    a, b = sampled(tmp_path / "a", (0, 1), source="generator"), sampled(tmp_path / "b", (2, 3), source="generator")
    status, said, _ = run(capsys, "join", a, b, "--sources", "wan", "ltx", "--out", tmp_path / "both")
    assert status == 0
    assert "4 videos of 2 prompts: 2 by wan, 2 by ltx" in said
    found = {
        c.key: (c.record["source"], c.record["prompt"], c.read("mp4")) for c in ShardSet(tmp_path / "both").contents()
    }
    assert found == {
        "0-0": ("wan", "prompt 0", noise_clip(0, 4, fps=4)),
        "0-1": ("wan", "prompt 1", noise_clip(1, 4, fps=4)),
        "1-0": ("ltx", "prompt 0", noise_clip(2, 4, fps=4)),
        "1-1": ("ltx", "prompt 1", noise_clip(3, 4, fps=4)),
    }


def test_sets_that_cannot_be_joined_leave_nothing(tmp_path, capsys):
    a, b = sampled(tmp_path / "a", (0,), source="x"), sampled(tmp_path / "b", (1,))
    for more, message in ((("--sources", "x"), "names 1 models, of 2 sets"), ((), "video '0' names no source")):
        status, _, errors = run(capsys, "join", a, b, *more, "--out", tmp_path / "both")
        assert status == 2
        assert message in errors
        assert not (tmp_path / "both").exists()
