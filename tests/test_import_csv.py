"""Import of a CSV of ratings: the order of samples, rows that repeat, rows that contradict."""

import itertools
from pathlib import Path

import pytest

from helpers import call, plain_clip
from videoalign import VideoAlignError
from videoalign.datamodules.benchmark import Benchmark
from videoalign.datamodules.import_csv import import_csv
from videoalign.datamodules.shards import ShardSet
from videoalign.datamodules.video_sets import import_videos

HEADER = "path_A,path_B,prompt,VQ,MQ,TA,MOS_A_VQ,MOS_B_VQ,A_model,B_model"
FIRST = "0.mp4,1.mp4,a cat,A,B,same,4,2,wan,ltx"


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for number in range(4):
        (folder / f"{number}.mp4").write_bytes(plain_clip(40 * number, 4))
    return folder


def table(folder: Path, *rows: str, header: str = HEADER) -> Path:
    path = folder / "ratings.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def sorted_by_prompt(folder: Path) -> Path:
    ends = ("0.mp4,1.mp4", "0.mp4,2.mp4", "1.mp4,2.mp4", "2.mp4,3.mp4")
    return table(folder, *(f"{pair},prompt {number:02d},A,B,same,,,," for number in range(15) for pair in ends))


def samples(path: Path) -> list[tuple[str, str]]:
    return [(content.key, content.record["prompt"]) for content in ShardSet(path).contents()]


def test_samples_are_shuffled_and_nothing_else_changes(videos: Path, tmp_path: Path) -> None:
    ratings = sorted_by_prompt(tmp_path)
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        import_csv(ratings, videos, tmp_path / name, seed=seed)
    one, two, three = (samples(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two
    assert one != three
    assert sorted(one) == sorted(three)
    assert sorted(one) == [(f"{line:06d}", f"prompt {(line - 2) // 4:02d}") for line in range(2, 62)]
    neighbours = sum(a == b for (_, a), (_, b) in itertools.pairwise(one))
    assert neighbours < 12  # of 45 in the table
    assert {c.key: c.read("a.mp4") for c in ShardSet(tmp_path / "one").contents()} == {
        c.key: c.read("a.mp4") for c in ShardSet(tmp_path / "three").contents()
    }


def test_a_benchmarks_table_keeps_its_order(videos: Path, tmp_path: Path) -> None:
    import_csv(sorted_by_prompt(tmp_path), videos, tmp_path / "set", "videos")
    rated = Benchmark(tmp_path / "set")
    assert [row["prompt"] for row in rated.rows] == [f"prompt {number:02d}" for number in range(15) for _ in range(4)]
    assert rated.keys == [f"{number:06d}" for number in range(60)]
    keys = [key for key, _ in samples(tmp_path / "set")]
    assert keys != sorted(keys)
    assert sorted(keys) == rated.keys


def test_unrated_videos_are_shuffled(videos: Path, tmp_path: Path) -> None:
    rows = [f"{number % 4}.mp4,prompt {number},wan" for number in range(20)]
    import_videos(table(tmp_path, *rows, header="path,prompt,source"), videos, tmp_path / "set")
    keys = [key for key, _ in samples(tmp_path / "set")]
    assert keys != sorted(keys)
    assert sorted(keys) == [f"{line:06d}" for line in range(2, 22)]


SAME = {
    "the row": FIRST,
    "A and B exchanged": "1.mp4,0.mp4,a cat,B,A,same,2,4,ltx,wan",
    "another spelling": "./0.mp4,1.mp4, a cat ,A,B,same,4.0,2,wan,ltx",
    "other capitals and spaces in the prompt": '0.mp4,1.mp4,"A  Cat\n",A,B,same,4,2,wan,ltx',
    "quotes around every cell": ",".join(f'"{cell}"' for cell in FIRST.split(",")),
    "spaces around labels": "0.mp4,1.mp4,a cat, A,B ,same,4,2,wan,ltx",
}


@pytest.mark.parametrize("row", SAME.values(), ids=SAME)
@pytest.mark.parametrize("kind", ["pairs", "videos"])
def test_rows_that_say_the_same_are_merged(videos: Path, tmp_path: Path, row: str, kind: str) -> None:
    ratings = table(tmp_path, FIRST, "2.mp4,3.mp4,a dog,A,A,A,,,,", row, row)
    report = import_csv(ratings, videos, tmp_path / "set", kind)
    assert [r.line for r in report.rows] == [2, 3]
    first, second = (4 + row.count("\n"), 5 + 2 * row.count("\n"))  # a row is named by its last line
    assert report.merged == [first, second]
    merged = f"2 rows say again what earlier ones say, and were merged with them (lines {first}, {second})"
    assert merged in report.text()
    assert "0 rows rejected" in report.text()
    assert ShardSet(tmp_path / "set").index.samples == (2 if kind == "pairs" else 4)


OTHER = {
    "labels": ("0.mp4,1.mp4,a cat,A,A,same,4,2,wan,ltx", "labels"),
    "a label less": ("0.mp4,1.mp4,a cat,A,B,,4,2,wan,ltx", "labels"),
    "an invalid label": ("0.mp4,1.mp4,a cat,A,B,invalid,4,2,wan,ltx", "labels"),
    "exchanged, but for the labels": ("1.mp4,0.mp4,a cat,A,B,same,2,4,ltx,wan", "labels"),
    "exchanged, but for the scores": ("1.mp4,0.mp4,a cat,B,A,same,4,2,ltx,wan", "scores"),
    "scores": ("0.mp4,1.mp4,a cat,A,B,same,4,3,wan,ltx", "scores"),
    "models": ("0.mp4,1.mp4,a cat,A,B,same,4,2,ltx,wan", "models"),
    "labels, under other capitals": ("0.mp4,1.mp4,A Cat,A,A,same,4,2,wan,ltx", "labels"),
    "labels and models": ("0.mp4,1.mp4,a cat,B,B,same,4,2,ltx,wan", "labels and models"),
}


@pytest.mark.parametrize(("row", "what"), OTHER.values(), ids=OTHER)
def test_rows_that_contradict_are_refused(videos: Path, tmp_path: Path, row: str, what: str) -> None:
    with pytest.raises(
        VideoAlignError, match=f"line 3: repeats line 2: the same two videos and prompt, but other {what}\n"
    ):
        import_csv(table(tmp_path, FIRST, row), videos, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_another_prompt_is_another_pair(videos: Path, tmp_path: Path) -> None:
    report = import_csv(table(tmp_path, FIRST, FIRST.replace("a cat", "a dog")), videos, tmp_path / "set")
    assert len(report.rows) == 2
    assert not report.merged


OFFICIAL = "path_A,path_B,prompt,VQ,MQ,TA,fps_A,num_frames_A,fps_B,num_frames_B"
"""The header of the official repository's example.csv."""


def official_example(folder: Path) -> Path:
    """Twelve rows in the official example's form, of which nine repeat: prompts in quotes, paths in two spellings."""
    prompts = (
        '"The camera remains still, a girl sits down, warm light."',
        "A cat sleeps.",
        '"A ""red"" kite, flying."',
    )
    labels, ends = ("B,B,A", "same,same,A", "A,invalid,B"), ((0, 1), (2, 3), (1, 2))
    rows = [
        f"videos/{a}.mp4,./videos/{b}.mp4,{prompts[n]},{labels[n]},24.0,126.0,30.0,{152.0 + repetition}"
        for repetition in range(4)
        for n, (a, b) in enumerate(ends)
    ]
    return table(folder, *rows, header=OFFICIAL)


@pytest.mark.parametrize("kind", ["pairs", "videos"])
def test_the_official_example_is_imported(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture, kind: str
) -> None:
    (tmp_path / "data" / "videos").mkdir(parents=True)
    for number in range(4):
        (tmp_path / "data/videos" / f"{number}.mp4").write_bytes((videos / f"{number}.mp4").read_bytes())
    given = ("shards", "import-csv", official_example(tmp_path), "--videos", tmp_path / "data", "--kind", kind)
    assert call(*given, "--workers", 1, "--out", tmp_path / "set") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 pairs of 4 unique videos"
    merged = "9 rows say again what earlier ones say, and were merged with them"
    assert f"{merged} (lines 5, 6, 7, 8, 9, 10, 11, 12, 13)" in lines
    if kind == "pairs":
        found = {c.key: c.record for c in ShardSet(tmp_path / "set").contents()}
        assert found["000002"]["prompt"] == "The camera remains still, a girl sits down, warm light."
        assert found["000004"]["labels"] == {"VQ": "A", "MQ": "invalid", "TA": "B"}
        assert found["000004"]["prompt"] == 'A "red" kite, flying.'
    else:
        assert len(Benchmark(tmp_path / "set").rows) == 3


def test_unrated_videos_that_repeat_are_merged(videos: Path, tmp_path: Path) -> None:
    rows = ("0.mp4,a cat,wan", "1.mp4,a cat,wan", "./0.mp4, A  cat,wan", "0.mp4,a dog,wan")
    text = import_videos(table(tmp_path, *rows, header="path,prompt,source"), videos, tmp_path / "set")
    assert "1 rows say again what earlier ones say, and were merged with them (lines 4)" in text
    assert sorted(samples(tmp_path / "set")) == [("000002", "a cat"), ("000003", "a cat"), ("000005", "a dog")]
    contradicting = table(tmp_path, *rows, "0.mp4,a cat,ltx", header="path,prompt,source")
    with pytest.raises(VideoAlignError, match="line 6: repeats line 2: the same video and prompt, but another source"):
        import_videos(contradicting, videos, tmp_path / "two")


def test_a_video_is_of_one_model(videos: Path, tmp_path: Path) -> None:
    rows = (
        "0.mp4,1.mp4,a cat,A,B,same,4,2,wan ,ltx",
        "0.mp4,2.mp4,a cat,A,B,same,4,2, wan,",
        "2.mp4,1.mp4,a cat,A,,,,,,",
    )
    import_csv(table(tmp_path, *rows), videos, tmp_path / "set")
    found = [content.record["sources"] for content in ShardSet(tmp_path / "set").contents()]
    assert sorted(map(str, found)) == sorted(
        map(str, ({"A": "wan", "B": "ltx"}, {"A": "wan", "B": ""}, {"A": "", "B": ""}))
    )
    exchanged = table(tmp_path, *rows, "3.mp4,0.mp4,a cat,A,B,same,4,2,wan,ltx")
    with pytest.raises(VideoAlignError, match=r"line 5.*0\.mp4 is of 'ltx' here and of 'wan' in line 2"):
        import_csv(exchanged, videos, tmp_path / "two")
    assert "1 rows rejected" in import_csv(exchanged, videos, tmp_path / "three", skip_bad_rows=True).text()
