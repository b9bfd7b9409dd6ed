"""Public benchmarks as they are published: every layout gives the same set, and bad input leaves nothing behind."""

import csv
import io
import json
import re
import struct
import zipfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from videoalign.cli import main
from videoalign.datamodules.benchmark import Benchmark
from videoalign.datamodules.import_benchmarks import import_genai_bench, import_videogen_rewardbench
from videoalign.datamodules.ratings import COLUMNS, LABELS
from videoalign.datamodules.shards import ShardSet
from videoalign.datamodules.video import encode

HEADER = "path_A path_B A_model B_model prompt VQ MQ TA Overall fps_A num_frames_A fps_B num_frames_B".split()
NAMES = "abcdefghij"
SIZES = {"a": (9, 32, 48, 8), "b": (7, 48, 32, 4)}
"""Frames, height, width and rate of the clips that differ from the others' (5, 32, 32, 8)."""
PROMPT = 'a "red" circle,\nand a blue one'
RATED = [("a", "b", "A B same A"), ("b", "c", "B invalid - -"), ("c", "a", "- A same same"), ("d", "e", "A A A B")]
"""Pairs with their labels; - stands for none."""
VOTED = [("a", "b", "leftvote"), ("b", "c", "rightvote"), ("c", "a", "tievote"), ("d", "e", "bothbad_vote")]
VOTES = {"leftvote": "A", "rightvote": "B", "tievote": "same", "bothbad_vote": "same"}


@cache
def clip(name: str) -> bytes:
    """A small mp4, another one for every letter."""
    frames, height, width, fps = SIZES.get(name, (5, 32, 32, 8))
    return encode(np.full((frames, height, width, 3), 20 * NAMES.index(name) + 20, np.uint8), fps)


@dataclass
class Place:
    """Where a test happens.

    Attributes:
        tmp: the folder above the current one, so that files which escape from that are seen.
    """

    tmp: Path

    def file(self, name: str, content: str | bytes) -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def videos(self, folder: str = "videos", names: str = "abcde") -> None:
        for name in names:
            self.file(f"{folder}/{name}.mp4", clip(name))

    def zip(self, name: str, folder: str = "videos/", names: str = "abcde", method: int = zipfile.ZIP_STORED) -> Path:
        path = self.file(name, "")
        with zipfile.ZipFile(path, "w", method) as archive:
            for video in names:
                archive.writestr(f"{folder}{video}.mp4", clip(video))
        return path

    def tree(self) -> dict[str, bytes | None]:
        """Everything below, with its content."""
        return {
            str(path.relative_to(self.tmp)): path.read_bytes() if path.is_file() else None
            for path in sorted(self.tmp.rglob("*"))
        }

    def videogen(self, *args: str) -> None:
        main(["shards", "import-videogen-rewardbench", *args, "--out", "out", "--workers", "1"])

    def genai(self, *args: str) -> None:
        main(["shards", "import-genai-bench", *args, "--out", "out", "--workers", "1"])


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return Place(tmp_path)


# --- tables ---------------------------------------------------------------------------------------


def rated(a: str, b: str, labels: str = "A B same A", prompt: str = PROMPT, path: str = "videos/{}.mp4") -> list[str]:
    """A row of VideoGen-RewardBench; its frame rates and counts are wrong."""
    words = [word.strip("-") for word in labels.split()]
    return [path.format(a), path.format(b), f"model-{a}", f"model-{b}", prompt, *words, "99", "99", "99", "99"]


def table(*rows: list[str], header: list[str] = HEADER) -> str:
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    return text.getvalue()


def write_csv(place: Place, path: str = "videos/{}.mp4") -> None:
    place.file("src/videogen-rewardbench.csv", table(*(rated(a, b, words, path=path) for a, b, words in RATED)))


def voted(
    a: str,
    b: str,
    vote: object = "leftvote",
    value: Callable[[str], object] = "videos/{}.mp4".format,
    **changes: object,
) -> dict:
    """A row of GenAI-Bench."""
    return {
        "prompt": PROMPT,
        "left_model": f"model-{a}",
        "left_video": value(a),
        "right_model": f"model-{b}",
        "right_video": value(b),
        "vote_type": vote,
        **changes,
    }


def ballot(value: Callable[[str], object] = "videos/{}.mp4".format) -> list[dict]:
    return [voted(*row, value) for row in VOTED]


def content_and_path(name: str) -> dict:
    """As the datasets library stores a video."""
    return {"bytes": clip(name), "path": f"gone/{name}.mp4"}


def parquet(content: list[dict], rows: int | None = None, **options: int) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(content).slice(0, rows), file, **options)
    return file.getvalue()


def arrow(rows: list[dict]) -> bytes:
    """One batch as a stream, the format of the datasets library."""
    batch, file = pa.RecordBatch.from_pylist(rows), io.BytesIO()
    with pa.ipc.new_stream(file, batch.schema) as writer:
        writer.write_batch(batch)
    return file.getvalue()


def save_to_disk(place: Place, folder: str, rows: list[dict]) -> None:
    """The files of ``Dataset.save_to_disk``."""
    place.file(f"{folder}/data-00000-of-00001.arrow", arrow(rows))
    place.file(f"{folder}/state.json", json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    place.file(f"{folder}/dataset_info.json", json.dumps({"features": {"prompt": {"dtype": "string"}}}))


# --- what comes out -------------------------------------------------------------------------------


def joined(out: str = "out") -> list[tuple]:
    """Each row of the table with the clips, the records and the models of its keys."""
    videos = {raw.key: (raw.members["mp4"], raw.record()) for raw in ShardSet(out, "videos")}
    letters = {clip(name): name for name in NAMES}
    rows = []
    for row in ShardSet(out).table("pairs.csv"):
        (a, record_a), (b, record_b) = videos[row["key_A"]], videos[row["key_B"]]
        assert record_a["prompt"] == record_b["prompt"] == row["prompt"]
        assert (record_a["source"], record_b["source"]) == (row["A_model"], row["B_model"])
        rows.append((letters[a], letters[b], row))
    return rows


def check_rated(out: str = "out") -> None:
    """The set is that of RATED."""
    found = joined(out)
    assert [(a, b) for a, b, _ in found] == [(a, b) for a, b, _ in RATED]
    for (a, b, row), (_, _, labels) in zip(found, RATED):
        words = {column: word.strip("-") for column, word in zip(COLUMNS, labels.split())}
        rest = {"prompt": PROMPT, "A_model": f"model-{a}", "B_model": f"model-{b}"}
        assert {name: row[name] for name in row if not name.startswith("key")} == {**rest, **words}
    assert ShardSet(out).index.samples == 5


def check_voted(out: str = "out", votes: list[tuple[str, str, str]] = VOTED) -> None:
    """The set is that of VOTED."""
    found = joined(out)
    assert [(a, b, row["vote_type"]) for a, b, row in found] == votes
    for a, b, row in found:
        rest = {"prompt": PROMPT, "A_model": f"model-{a}", "B_model": f"model-{b}", "vote_type": row["vote_type"]}
        words = {"VQ": "", "MQ": "", "TA": "", "Overall": VOTES[row["vote_type"]]}
        assert {name: row[name] for name in row if not name.startswith("key")} == {**rest, **words}
    assert ShardSet(out).index.samples == len({name for a, b, _ in votes for name in (a, b)})


def folder_with_top(place: Place) -> list[str]:
    place.videos("src/videos")
    return ["src"]


def folder_without_top(place: Place) -> list[str]:
    place.videos("src")
    return ["src"]


def zip_with_top(place: Place) -> list[str]:
    place.zip("src/videos.zip")
    return ["src"]


def zip_without_top(place: Place) -> list[str]:
    place.zip("src/videos.zip", folder="", method=zipfile.ZIP_DEFLATED)
    return ["src"]


def folder_elsewhere(place: Place) -> list[str]:
    place.videos("clips")
    return ["src", "--videos", "clips"]


def zip_elsewhere(place: Place) -> list[str]:
    place.zip("clips.ZIP")
    return ["src", "--videos", "clips.ZIP"]


def links_within(place: Place) -> list[str]:
    place.videos("src/real")
    Path("src/videos").symlink_to("real")
    return ["src"]


LAYOUTS = [
    folder_with_top,
    folder_without_top,
    zip_with_top,
    zip_without_top,
    folder_elsewhere,
    zip_elsewhere,
    links_within,
]


@pytest.mark.parametrize("path", ["videos/{}.mp4", "{}.mp4"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_videogen_gives_the_same_set(
    place: Place, layout: Callable[[Place], list[str]], path: str
) -> None:
    write_csv(place, path)
    args = layout(place)
    before = place.tree()
    place.videogen(*args)
    check_rated()
    after = {name: content for name, content in place.tree().items() if not name.startswith("here/out")}
    assert after == before  # no archive was unpacked


@pytest.mark.parametrize("path", ["videos\\{}.mp4", "./videos//{}.mp4", " videos/{}.mp4 "])
@pytest.mark.parametrize("layout", [folder_with_top, zip_with_top])
def test_other_spellings_of_a_path_name_the_same_video(
    place: Place, layout: Callable[[Place], list[str]], path: str
) -> None:
    write_csv(place, path)
    place.videogen(*layout(place))
    check_rated()


def test_folder_is_taken_where_there_is_an_archive_too(place: Place) -> None:
    write_csv(place)
    place.videos("src/videos")
    place.file("src/videos.zip", "cut short")
    place.videogen("src")
    check_rated()


def test_rows_and_videos_are_counted_and_the_set_is_sound(place: Place, capsys: pytest.CaptureFixture) -> None:
    write_csv(place)
    place.videogen(*zip_with_top(place))
    out = capsys.readouterr().out
    assert "4 pairs of 5 unique videos" in out and "0 rows rejected" in out
    assert re.search(r"Overall +25\.0% +25\.0% +25\.0% +0\.0% +25\.0%", out)
    main(["shards", "verify", "out"])
    assert capsys.readouterr().out == "out is sound: 5 videos in 1 shards\n"


def test_benchmark_opens_it(place: Place) -> None:
    write_csv(place)
    place.videogen(*folder_with_top(place))
    benchmark = Benchmark("out")
    want = torch.tensor([[LABELS[word.strip("-")] for word in labels.split()] for _, _, labels in RATED])
    assert torch.equal(benchmark.labels.nan_to_num(9), want.nan_to_num(9))
    contents = {raw.key: raw.members["mp4"] for raw in benchmark.shards}
    ends = [[contents[benchmark.keys[number]] for number in pair] for pair in benchmark.ends.tolist()]
    assert ends == [[clip(a), clip(b)] for a, b, _ in RATED]


def test_records_say_what_the_files_say(place: Place) -> None:
    write_csv(place)
    place.videogen(*zip_without_top(place))
    records = {raw.record()["source"]: raw.record() for raw in ShardSet("out")}
    rest = {"prompt": PROMPT, "source": "model-a", "path": "a.mp4"}
    assert records["model-a"] == {**rest, "fps": 8.0, "num_frames": 9, "height": 32, "width": 48}
    rest = {"prompt": PROMPT, "source": "model-b", "path": "b.mp4"}
    assert records["model-b"] == {**rest, "fps": 4.0, "num_frames": 7, "height": 48, "width": 32}


def test_a_video_with_two_prompts_has_a_record_for_each(place: Place) -> None:
    place.file("src/videogen-rewardbench.csv", table(rated("a", "b", prompt="one"), rated("a", "b", prompt="two")))
    place.videogen(*folder_with_top(place))
    assert [(a, b, row["prompt"]) for a, b, row in joined()] == [("a", "b", "one"), ("a", "b", "two")]


@pytest.mark.parametrize("layout", [folder_with_top, zip_without_top, "embedded"])
def test_processes_change_nothing(place: Place, layout: Callable[[Place], list[str]] | str) -> None:
    if layout == "embedded":
        run, source = import_genai_bench, place.file("votes.parquet", parquet(ballot(clip)))
    else:
        write_csv(place)
        run, source = import_videogen_rewardbench, Path(layout(place)[0])
    run(source, Path("alone"))
    with ProcessPoolExecutor(2) as pool:
        run(source, Path("together"), pool=pool)
    alone, together = ({p.name: p.read_bytes() for p in Path(out).iterdir()} for out in ("alone", "together"))
    assert alone == together and "000000.tar" in alone


# --- GenAI-Bench ----------------------------------------------------------------------------------


def parquet_of_paths(place: Place) -> list[str]:
    place.videos()
    place.file("votes.parquet", parquet(ballot()))
    return ["votes.parquet"]


def json_list_of_paths(place: Place) -> list[str]:
    place.videos("src/videos")
    place.file("src/votes.json", json.dumps(ballot(), indent=1))
    return ["src"]


def json_lines_of_paths_with_byte_order_mark(place: Place) -> list[str]:
    place.videos()
    place.file("votes.jsonl", "\ufeff" + "\n".join(json.dumps(row) for row in ballot()) + "\n \n")
    return ["votes.jsonl"]


def lines_in_a_json_file_beside_an_archive(place: Place) -> list[str]:
    place.zip("clips.zip")
    place.file("votes.json", "\r\n".join(json.dumps(row) for row in ballot()))
    return ["votes.json", "--videos", "clips.zip"]


def parquet_of_structs_with_paths_only(place: Place) -> list[str]:
    place.videos("clips")
    place.file("votes.parquet", parquet(ballot(lambda name: {"bytes": None, "path": f"{name}.mp4"})))
    return ["votes.parquet", "--videos", "clips"]


def parquet_of_structs(place: Place) -> list[str]:
    place.file("votes.parquet", parquet(ballot(content_and_path)))
    return ["votes.parquet"]


def parquet_of_binary(place: Place) -> list[str]:
    place.file("votes.parquet", parquet(ballot(clip)))
    return ["votes.parquet"]


def saved_dataset(place: Place) -> list[str]:
    save_to_disk(place, "src", ballot(content_and_path))
    return ["src"]


def saved_splits(place: Place) -> list[str]:
    place.file("src/dataset_dict.json", json.dumps({"splits": ["test", "test_v1"]}))
    save_to_disk(place, "src/test", ballot(content_and_path))
    save_to_disk(place, "src/test_v1", [voted("a", "b", "of another split", content_and_path)])
    return ["src", "--split", "test"]


def hub(place: Place) -> None:
    rows = ballot(content_and_path)
    for number, part in enumerate((rows[:1], rows[1:])):
        place.file(f"src/data/test-{number:05d}-of-00002.parquet", parquet(part))
    place.file("src/data/test_v1-00000-of-00001.parquet", parquet([voted("f", "g", "tievote", clip)]))
    place.file("src/README.md", "---\nconfigs: []\n---\n")


def hub_files(place: Place) -> list[str]:
    hub(place)
    return ["src", "--split", "test"]


VOTE_LAYOUTS = [
    parquet_of_paths, json_list_of_paths, json_lines_of_paths_with_byte_order_mark, lines_in_a_json_file_beside_an_archive,
    parquet_of_structs_with_paths_only, parquet_of_structs, parquet_of_binary, saved_dataset, saved_splits, hub_files,
]  # fmt: skip


@pytest.mark.parametrize("layout", VOTE_LAYOUTS)
def test_every_layout_of_genai_bench_gives_the_same_set(place: Place, layout: Callable[[Place], list[str]]) -> None:
    args = layout(place)
    before = place.tree()
    place.genai(*args)
    check_voted()
    after = {name: content for name, content in place.tree().items() if not name.startswith("here/out")}
    assert after == before  # what was embedded is unpacked nowhere


def test_split_chooses_the_other_files(place: Place) -> None:
    hub(place)
    place.genai("src", "--split", "test_v1")
    check_voted(votes=[("f", "g", "tievote")])


def test_votes_are_counted_and_the_set_is_sound(place: Place, capsys: pytest.CaptureFixture) -> None:
    place.genai(*parquet_of_binary(place))
    out = capsys.readouterr().out
    assert "4 pairs of 5 unique videos" in out and "0 rows rejected" in out
    main(["shards", "verify", "out"])
    assert capsys.readouterr().out == "out is sound: 5 videos in 1 shards\n"
    assert Benchmark("out").labels[:, 3].tolist() == [1.0, -1.0, 0.0, 0.0]


def test_models_may_be_unknown(place: Place) -> None:
    row = {name: value for name, value in voted("a", "b", value=clip).items() if "model" not in name}
    place.file("votes.parquet", parquet([row]))
    place.genai("votes.parquet")
    assert [(a, b, row["A_model"], row["B_model"]) for a, b, row in joined()] == [("a", "b", "", "")]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_tables_longer_than_what_is_held_at_once(place: Place, kind: str) -> None:
    pairs = [(a, b) for a in NAMES for b in NAMES if a < b]
    votes = [(*pair, list(VOTES)[number % 4]) for number, pair in enumerate(pairs)]
    rows = [voted(*vote, clip) for vote in votes]
    place.file(f"votes.{kind}", parquet(rows, row_group_size=25) if kind == "parquet" else arrow(rows))
    import_genai_bench(Path(f"votes.{kind}"), Path("out"))
    assert len(votes) == 45
    check_voted(votes=votes)


def test_embedded_videos_lie_beside_the_output_for_a_while(place: Place) -> None:
    seen: dict[str, set[int]] = {}

    def look(what: str, done: int, of: int) -> None:
        seen.setdefault(what, set()).update(
            len(list(spool.iterdir())) for spool in Path("deep").glob(".out.videos.partial-*")
        )

    import_genai_bench(place.file("votes.parquet", parquet(ballot(clip))), Path("deep/out"), progress=look)
    assert seen == {"videos checked": {5}, "samples written": {5}}  # the same content once
    assert [path.name for path in Path("deep").iterdir()] == ["out"]


@pytest.mark.parametrize("when", ["videos checked", "samples written"])
def test_an_interrupted_import_leaves_nothing(place: Place, when: str) -> None:
    def stop(what: str, done: int, of: int) -> None:
        if what == when:
            raise KeyboardInterrupt

    source = place.file("votes.parquet", parquet(ballot(clip)))
    before = place.tree()
    with pytest.raises(KeyboardInterrupt):
        import_genai_bench(source, Path("out"), progress=stop)
    assert place.tree() == before


def test_only_sound_rows_remain_of_a_bad_table(place: Place, capsys: pytest.CaptureFixture) -> None:
    rows = [
        voted("a", "b", value=clip),
        voted("a", "c", value=clip, left_video=None),
        voted("b", "c", value=clip, left_video=b"no video" * 9),
        voted("d", "c", "centrevote", clip),
        voted("b", "a", "tievote", clip),
        voted("e", "a", "tievote", clip),
    ]
    place.file("votes.parquet", parquet(rows))
    place.genai("votes.parquet", "--skip-bad-rows")
    out = capsys.readouterr().out
    assert "2 pairs of 3 unique videos" in out and "4 rows rejected" in out
    assert re.findall(r"^  line (\d+): ", out, re.MULTILINE) == ["2", "3", "4", "5"]
    check_voted(votes=[("a", "b", "leftvote"), ("e", "a", "tievote")])


@pytest.mark.parametrize("separator", ["\u2028", "\x85"])
def test_json_lines_end_at_newlines_only(place: Place, separator: str) -> None:
    place.videos()
    prompt = f"one{separator}two"
    place.file("votes.jsonl", json.dumps(voted("a", "b", prompt=prompt), ensure_ascii=False) + "\n")
    place.genai("votes.jsonl")
    assert [row["prompt"] for _, _, row in joined()] == [prompt]


# --- rows that are left out -----------------------------------------------------------------------

SOUND, MISSING, UNKNOWN = rated("a", "b"), rated("a", "z"), rated("b", "c", "A B tie A")
ALLOW, SKIP = "--allow-missing", "--skip-bad-rows"


@pytest.mark.parametrize(
    ("rows", "options", "remedies"),
    [
        ([SOUND, MISSING], [], {ALLOW}),
        ([SOUND, UNKNOWN], [], {SKIP}),
        ([SOUND, UNKNOWN], [ALLOW], {SKIP}),
        ([SOUND, MISSING, UNKNOWN], [], {ALLOW, SKIP}),
        ([SOUND, MISSING, UNKNOWN], [ALLOW], {SKIP}),
    ],
)
def test_a_refusal_names_the_option_that_leaves_rows_out(
    place: Place, rows: list[list[str]], options: list[str], remedies: set[str], capsys: pytest.CaptureFixture
) -> None:
    place.file("src/videogen-rewardbench.csv", table(*rows))
    with pytest.raises(SystemExit, match="2"):
        place.videogen(*folder_with_top(place), *options)
    assert set(re.findall(r"--[a-z-]+", capsys.readouterr().err)) == remedies
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        ([SOUND, MISSING], [ALLOW]),
        ([SOUND, MISSING], [SKIP]),
        ([UNKNOWN, SOUND], [SKIP]),
        ([MISSING, UNKNOWN, SOUND], [SKIP]),
        ([MISSING, UNKNOWN, SOUND], [ALLOW, SKIP]),
    ],
)
def test_unsound_rows_are_left_out_counted_and_listed(
    place: Place, rows: list[list[str]], options: list[str], capsys: pytest.CaptureFixture
) -> None:
    place.file("src/videogen-rewardbench.csv", table(*rows))
    place.videogen(*folder_with_top(place), *options)
    out = capsys.readouterr().out
    assert [(a, b) for a, b, _ in joined()] == [("a", "b")]
    assert "1 pairs of 2 unique videos" in out
    assert ("1 videos are not there, which 1 rows name\n  there is no file src/videos/z.mp4" in out) == (
        MISSING in rows
    )
    assert ("1 rows rejected\n" if UNKNOWN in rows else "0 rows rejected\n") in out


def test_pairs_of_a_csv_come_out_of_an_archive(place: Place, capsys: pytest.CaptureFixture) -> None:
    place.zip("clips.zip", folder="", names="abc")
    rows = [rated(a, b, words, path="{}.mp4") for a, b, words in RATED]
    ratings = place.file("ratings.csv", table(*rows))
    main(["shards", "import-csv", str(ratings), "--videos", "clips.zip", ALLOW, "--out", "out", "--workers", "1"])
    assert "2 videos are not there, which 1 rows name" in capsys.readouterr().out
    found = [
        (raw.members["a.mp4"], raw.members["b.mp4"]) for raw in sorted(ShardSet("out", "pairs"), key=lambda r: r.key)
    ]
    assert found == [(clip(a), clip(b)) for a, b, _ in RATED[:3]]


@pytest.mark.parametrize("count", [20, 21, 33])
def test_many_missing_videos_are_abbreviated(place: Place, count: int, capsys: pytest.CaptureFixture) -> None:
    rows = [rated("a", f"z{number}") for number in range(count)] + [rated("b", "z0")]
    place.file("src/videogen-rewardbench.csv", table(*rows))
    with pytest.raises(SystemExit):
        place.videogen(*zip_with_top(place))
    err = capsys.readouterr().err
    assert f"{count} videos are not there, which {count + 1} rows name" in err
    named = re.findall(r"there is no file src/videos\.zip/videos/(z\d+)\.mp4 \(line \d+( and 1 more)?\)", err)
    assert named == [(f"z{number}", "" if number else " and 1 more") for number in range(20)]
    assert re.findall(r"\.\.\. and (\d+) more", err) == ([str(count - 20)] if count > 20 else [])


def test_a_row_that_names_a_missing_video_twice_is_one_row(place: Place) -> None:
    place.file("src/videogen-rewardbench.csv", table(rated("z", "z"), SOUND))
    report = import_videogen_rewardbench(Path(*folder_with_top(place)), Path("out"), allow_missing=True)
    assert [len(lines) for lines in report.missing.values()] == [1]


# --- bad input ------------------------------------------------------------------------------------

Prepare = Callable[[Place], list[str]]


@dataclass
class Case:
    """``args`` prepares the place and gives the command line; the message must match ``words``."""

    args: Prepare
    words: str


def videogen(
    *rows: list[str],
    layout: Prepare = folder_with_top,
    change: Callable[[Place], object] = lambda place: None,
    options: tuple[str, ...] = (),
    header: list[str] = HEADER,
) -> Prepare:
    """The import of these rows, after ``change`` has been at the files."""

    def args(place: Place) -> list[str]:
        place.file("outside.mp4", clip("j"))
        place.file("src/videogen-rewardbench.csv", table(*(rows or [SOUND]), header=header))
        source = layout(place)
        change(place)
        return ["import-videogen-rewardbench", *source, "--out", "out", *options]

    return args


def without(column: str) -> Prepare:
    at = HEADER.index(column)
    cut = [SOUND[:at] + SOUND[at + 1 :], HEADER[:at] + HEADER[at + 1 :]]
    return videogen(cut[0], header=cut[1])


def archive(change: Callable[[bytearray], object], method: int = zipfile.ZIP_STORED) -> Prepare:
    """The import from an archive whose bytes were changed."""

    def layout(place: Place) -> list[str]:
        path = place.zip("src/videos.zip", method=method)
        content = bytearray(path.read_bytes())
        change(content)
        path.write_bytes(content)
        return ["src"]

    return videogen(layout=layout)


def member(name: str, mode: int = 0o100644) -> Prepare:
    """The import from an archive that has one more member."""

    def add(place: Place) -> None:
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        with zipfile.ZipFile("src/videos.zip", "a") as file:
            file.writestr(info, "../../outside.mp4")

    return videogen(layout=zip_with_top, change=add)


def headers(local: int, central: int, value: int) -> Callable[[bytearray], None]:
    """Sets a byte of the first member's two headers."""

    def change(content: bytearray) -> None:
        content[content.index(b"PK\3\4") + local] = value
        content[content.index(b"PK\1\2") + central] = value

    return change


def garble(content: bytearray) -> None:
    """Overwrites the beginning of the first member's compressed content, behind LZMA's nine bytes of properties."""
    start = 30 + len("videos/a.mp4") + 9
    content[start : start + 40] = b"\xff" * 40


def garble_name(content: bytearray) -> None:
    flags = content.index(b"PK\1\2") + 8
    content[flags + 1] |= 8  # the name is UTF-8
    content[content.index(b"videos/a", flags)] = 0xFF


def flip(content: bytearray) -> None:
    content[content.index(clip("a")) + 200] ^= 1


def cut(content: bytearray) -> None:
    del content[len(content) // 2 :]


def linked_out(place: Place) -> None:
    Path("src/videos/link.mp4").symlink_to("../../outside.mp4")
    Path("src/videos/link").symlink_to(place.tmp / "here")


def add_text(place: Place) -> None:
    with zipfile.ZipFile("src/videos.zip", "a") as file:
        file.writestr("videos/t.mp4", "not a video\n" * 9)


VIDEOGEN = {
    "no such folder": Case(lambda p: ["import-videogen-rewardbench", "none", "--out", "out"], r"none is no download .* no videogen-rewardbench\.csv"),
    "no csv": Case(videogen(change=lambda p: Path("src/videogen-rewardbench.csv").unlink()), "src is no download"),
    "a column missing": Case(without("Overall"), "lacks the columns Overall; it has path_A, path_B"),
    "a model's column missing": Case(without("B_model"), "lacks the columns B_model"),
    "header only": Case(videogen(change=lambda p: p.file("src/videogen-rewardbench.csv", table())), "has no rows"),
    "no videos at all": Case(videogen(layout=lambda p: ["src"]), r"2 videos are not there, which 1 rows name.*src/videos/a\.mp4 \(line 3\).*No row is sound"),
    "nothing left but missing ones": Case(videogen(MISSING, options=(ALLOW,)), "1 videos are not there.*No row is sound"),
    "nothing left but bad ones": Case(videogen(UNKNOWN, options=(SKIP,)), "1 rows rejected.*No row is sound"),
    "unknown label": Case(videogen(UNKNOWN), r"line 3: unknown labels \{'TA': 'tie'\}"),
    "the same pair twice": Case(videogen(SOUND, rated("b", "c"), rated("a", "b", "B B same A")), "line 7: repeats line 3: the same two videos and prompt, but other labels"),
    "the same pair turned round": Case(videogen(SOUND, rated("b", "a", "A B same A")), "line 5: repeats line 3"),
    "the same pair in another spelling": Case(videogen(SOUND, rated("a", "b", "B B same A", path="{}.mp4")), "line 5: repeats line 3"),
    "the same video twice": Case(videogen(["videos/a.mp4", "a.mp4", *SOUND[2:]]), r"line 3: both videos are videos/a\.mp4"),
    "absolute path": Case(lambda p: videogen([str(p.tmp / "here/outside.mp4"), *SOUND[1:]])(p), r"line 3: path '/.*outside\.mp4' is not a path inside"),
    "path that leads out": Case(videogen(["../outside.mp4", *SOUND[1:]]), r"line 3: path '\.\./outside\.mp4' is not a path inside"),
    "path that leads out on the way": Case(videogen(["videos/../../outside.mp4", *SOUND[1:]]), "line 3: path .* is not a path inside"),
    "Windows path that leads out": Case(videogen(["..\\outside.mp4", *SOUND[1:]]), "line 3: path .* is not a path inside"),
    "path with a drive": Case(videogen(["C:\\videos\\a.mp4", *SOUND[1:]]), "line 3: path .* is not a path inside"),
    "path on a server": Case(videogen(["\\\\server\\a.mp4", *SOUND[1:]]), "line 3: path .* is not a path inside"),
    "path of dots": Case(videogen(["./.", *SOUND[1:]]), r"line 3: path '\./\.' is not a path inside"),
    "link out of the folder": Case(videogen(["videos/link.mp4", *SOUND[1:]], change=linked_out), r"line 3: path 'videos/link\.mp4' is a link out"),
    "folder linked out": Case(videogen(["videos/link/outside.mp4", *SOUND[1:]], change=linked_out), "line 3: path .* is a link out"),
    "path that leads out of an archive": Case(videogen(["../outside.mp4", *SOUND[1:]], layout=zip_with_top), "line 3: path .* is not a path inside"),
    "path too long": Case(videogen(["a long story " * 30, *SOUND[1:]]), r"line 3|is not there"),
    "no such folder of videos": Case(videogen(layout=lambda p: ["src", "--videos", "none"]), "none: there is no such folder or zip archive"),
    "archive of another kind": Case(videogen(layout=lambda p: ["src", "--videos", str(p.file("videos.tar", "x"))]), r"videos\.tar: there is no such folder or zip archive"),
    "archive with a name that leads out": Case(member("../x.mp4"), r"1 names lead out of the archive and 0 are links \(such as '\.\./x\.mp4'\)"),
    "archive with a name that leads out on the way": Case(member("videos/../../x.mp4"), "1 names lead out"),
    "archive with an absolute name": Case(member("/tmp/x.mp4"), "1 names lead out"),
    "archive with a Windows name": Case(member("..\\x.mp4"), "1 names lead out"),
    "archive with a link": Case(member("videos/link.mp4", 0o120777), r"0 names lead out of the archive and 1 are links \(such as 'videos/link\.mp4'\)"),
    "archive cut short": Case(archive(cut), r"src/videos\.zip is no zip archive, or was cut short"),
    "archive of text": Case(archive(lambda content: content.__setitem__(slice(None), b"text" * 99)), "is no zip archive"),
    "archive empty": Case(archive(bytearray.clear), "is no zip archive"),
    "archive with an encrypted member": Case(archive(headers(6, 8, 1)), r"line 3: src/videos\.zip, videos/a\.mp4: cannot be read \(.*encrypted"),
    "archive with a member of an unknown method": Case(archive(headers(8, 10, 99)), r"line 3: .*videos/a\.mp4: cannot be read"),
    "archive with a changed member": Case(archive(flip), r"line 3: .*videos/a\.mp4: cannot be read \(Bad CRC-32"),
    "archive with a garbled deflated member": Case(archive(garble, zipfile.ZIP_DEFLATED), r"line 3: .*videos/a\.mp4: cannot be read"),
    "archive with a garbled LZMA member": Case(archive(garble, zipfile.ZIP_LZMA), r"line 3: .*videos/a\.mp4: cannot be read"),
    "archive with a garbled name": Case(archive(garble_name), r"src/videos\.zip"),
    "archive of a later version": Case(archive(headers(4, 6, 99)), r"src/videos\.zip"),
    "text as a video in an archive": Case(videogen(rated("a", "t"), layout=zip_with_top, change=add_text), r"line 3: t\.mp4 is no readable video"),
    "output exists": Case(videogen(change=lambda p: p.file("out/mine.txt", "mine")), r"\Avideoalign: error: output out exists already"),
    "option of the other benchmark": Case(videogen(options=("--split", "test")), "unrecognized arguments: --split test"),
}  # fmt: skip


def genai(
    *rows: object,
    name: str = "votes.json",
    videos: str = "videos",
    change: Callable[[Place], object] = lambda place: None,
    options: tuple[str, ...] = (),
    out: str = "out",
) -> Prepare:
    """The import of these rows as the kind of file that the name says."""

    def args(place: Place) -> list[str]:
        place.file("outside.mp4", clip("j"))
        place.videos(videos)
        write = {".parquet": parquet, ".arrow": arrow, ".json": json.dumps}[Path(name).suffix]
        place.file(name, write(list(rows) or ballot()))
        change(place)
        return ["import-genai-bench", name, "--out", out, *options]

    return args


def embedded(*rows: dict) -> Prepare:
    return genai(*rows, name="votes.parquet")


def given(content: str | bytes, name: str = "votes.json") -> Prepare:
    """The import of a file of this content."""
    return lambda place: ["import-genai-bench", str(place.file(name, content)), "--out", "out"]


def hub_with(*options: str) -> Prepare:
    return lambda place: (hub(place), ["import-genai-bench", "src", "--out", "out", *options])[1]


def numbered_in_folders(place: Place) -> list[str]:
    """The layout of the hub's own conversion to parquet."""
    for split in ("test", "test_v1"):
        place.file(f"src/{split}/0000.parquet", parquet([voted("a", "b", prompt=split, value=clip)]))
    return ["import-genai-bench", "src", "--out", "out"]


def feather(rows: list[dict]) -> bytes:
    """The other format of Arrow files."""
    file, batch = io.BytesIO(), pa.RecordBatch.from_pylist(rows)
    with pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)
    return file.getvalue()


def impossible_lengths() -> bytes:
    """An arrow stream in which a text ends before it begins, as a changed byte may have it."""
    texts = pa.StringArray.from_buffers(2, pa.py_buffer(struct.pack("<3i", 0, 9, 4)), pa.py_buffer(b"a" * 9))
    file = io.BytesIO()
    rest = {name: ["a.mp4", "b.mp4"] for name in ("left_video", "right_video", "vote_type")}
    batch = pa.record_batch({"prompt": texts, **{name: pa.array(column) for name, column in rest.items()}})
    with pa.ipc.new_stream(file, batch.schema) as writer:
        writer.write_batch(batch)
    return file.getvalue()


GOOD = voted("a", "b")
SAME = voted("a", "a", value=clip)
GENAI = {
    "no such file": Case(lambda p: ["import-genai-bench", "none.parquet", "--out", "out"], r"none\.parquet: there is no such file or folder"),
    "folder without a table": Case(lambda p: (p.videos("src"), ["import-genai-bench", "src", "--out", "out"])[1], "src holds no parquet, arrow, JSON"),
    "another ending": Case(given(json.dumps(ballot()), "votes.csv"), r"votes\.csv: \.csv ending; parquet, arrow, json and jsonl are read"),
    "columns missing in parquet": Case(embedded({"prompt": "p", "left_video": "a"}), r"votes\.parquet, row 1: lacks right_video, vote_type; it has \['left_video', 'prompt'\]"),
    "column missing in a later row": Case(genai(GOOD, {**{k: v for k, v in GOOD.items() if k != "prompt"}}), "row 2: lacks prompt"),
    "null video": Case(embedded(GOOD, voted("b", "c", right_video=None)), "line 2: right_video holds neither a path nor a video's bytes"),
    "struct of nulls": Case(genai(voted("b", "c", left_video={"bytes": None, "path": None})), "line 1: left_video holds neither"),
    "empty video": Case(embedded(voted("b", "c", value=clip, left_video=b"")), "line 1: left_video holds neither"),
    "number as video": Case(genai(voted("a", "b", left_video=7)), "line 1: left_video holds neither"),
    "number as prompt": Case(embedded(voted("a", "b", value=clip, prompt=7)), "line 1: prompt is no text"),
    "null as vote": Case(genai(voted("a", "b", None)), "line 1: vote_type is no text"),
    "blank prompt": Case(genai(voted("a", "b", prompt=" \n")), "line 1: there is no prompt"),
    "unknown vote": Case(genai(GOOD, voted("b", "c", "centrevote")), "line 2: unknown vote_type 'centrevote'; they are leftvote, rightvote, tievote, bothbad_vote"),
    "vote of another case": Case(genai(voted("a", "b", "LeftVote")), "line 1: unknown vote_type 'LeftVote'"),
    "the same pair twice": Case(genai(GOOD, voted("a", "b", "tievote")), "line 2: repeats line 1"),
    "the same pair turned round": Case(embedded(voted("a", "b", value=clip), voted("b", "a", "tievote", clip)), "line 2: repeats line 1"),
    "the same video twice": Case(genai(voted("a", "a")), r"line 1: both videos are videos/a\.mp4"),
    "the same content twice": Case(embedded(SAME), r"line 1: both videos are [0-9a-f]{32}\.mp4"),
    "no video in parquet": Case(embedded(voted("a", "b", value=content_and_path, left_video={"bytes": b"text" * 99, "path": "a.mp4"})),
                                r"line 1: [0-9a-f]{32}\.mp4 is no readable video"),
    "video cut short in parquet": Case(embedded(voted("a", "b", value=clip, left_video=clip("a")[: clip("a").index(b"moov") - 4])), r"line 1: \w+\.mp4.*cut short"),
    "missing video": Case(genai(GOOD, voted("b", "z"), voted("z", "c")), r"1 videos are not there, which 2 rows name\n +there is no file videos/z\.mp4 \(line 2 and 1 more\)"),
    "absolute path": Case(lambda p: genai(voted("a", "b", left_video=str(p.tmp / "here/outside.mp4")))(p), "line 1: path .* is not a path inside"),
    "path that leads out": Case(genai(voted("a", "b", left_video="../outside.mp4"), name="src/votes.json", videos="src/videos"), "line 1: path .* is not a path inside"),
    "path that leads out of embedded videos": Case(embedded(voted("a", "b", value=content_and_path, left_video={"bytes": None, "path": "../outside.mp4"})),
                                                   "line 1: path .* is not a path inside"),
    "Windows path": Case(genai(voted("a", "b", left_video="C:\\videos\\a.mp4")), "line 1: path .* is not a path inside"),
    "link out of the folder": Case(genai(voted("a", "b", left_video="videos/link.mp4"), name="src/votes.json", videos="src/videos", change=linked_out),
                                   "line 1: path .* is a link out"),
    "address in place of a path": Case(genai(voted("a", "b", left_video="https://example.org/a.mp4")), r"https://example\.org/a\.mp4 is not downloaded: no end of this address is a file in \. \(line 1\)"),
    "archive that leads out": Case(genai(change=lambda p: zipfile.ZipFile(p.zip("x.zip"), "a").writestr("../x", "x"), options=("--videos", "x.zip")), "1 names lead out"),
    "no such folder of videos": Case(genai(options=("--videos", "none")), "none: there is no such folder or zip archive"),
    "several splits": Case(hub_with(), "it has several splits; choose one with --split. There are: test, test_v1"),
    "unknown split": Case(hub_with("--split", "train"), "it has no split 'train'. There are: test, test_v1"),
    "unknown split of one": Case(lambda p: (save_to_disk(p, "src/test", ballot(clip)), ["import-genai-bench", "src", "--out", "out", "--split", "train"])[1],
                                 "it has no split 'train'. There are: test"),
    "unknown split of a file": Case(genai(options=("--split", "train")), "split"),
    "splits as folders of numbered files": Case(numbered_in_folders, "several splits"),
    "parquet cut short": Case(given(parquet(ballot(clip))[:-20], "votes.parquet"), r"votes\.parquet cannot be read, it is damaged or of another format"),
    "parquet changed": Case(given(parquet(ballot(clip)).replace(b"moov", b"void"), "votes.parquet"), r"line 1: \w+\.mp4 is no readable video"),
    "text as parquet": Case(given(json.dumps(ballot()), "votes.parquet"), r"votes\.parquet cannot be read"),
    "empty file as parquet": Case(given(b"", "votes.parquet"), r"votes\.parquet cannot be read"),
    "folder as parquet": Case(lambda p: (p.videos("votes.parquet"), ["import-genai-bench", "votes.parquet", "--out", "out"])[1], r"holds no parquet"),
    "arrow cut short": Case(given(arrow(ballot(clip))[:9999], "votes.arrow"), r"votes\.arrow cannot be read"),
    "arrow of the other format": Case(given(feather(ballot()), "votes.arrow"), r"votes\.arrow cannot be read"),
    "arrow with impossible lengths": Case(given(impossible_lengths(), "votes.arrow"), r"votes\.arrow cannot be read"),
    "JSON cut short": Case(given(json.dumps(ballot())[:-20]), r"votes\.json cannot be read"),
    "JSON lines cut short": Case(given("\n".join(map(json.dumps, ballot()))[:-20], "votes.jsonl"), r"votes\.jsonl cannot be read"),
    "JSON an object": Case(given(json.dumps({"rows": ballot()})), r"votes\.json, row 1: lacks prompt, left_video, right_video, vote_type; it has \['rows'\]"),
    "JSON an object of several lines": Case(given(json.dumps({"rows": ballot()}, indent=1)), r"votes\.json cannot be read"),
    "JSON of numbers": Case(given("[1, 2]"), r"row 1: lacks all columns; it has int"),
    "JSON of another encoding": Case(given(json.dumps([voted("a", "b", prompt="né")], ensure_ascii=False).encode("latin-1")), r"votes\.json cannot be read"),
    "JSON too deep": Case(given("[" * 99999), r"votes\.json"),
    "JSON with half a character": Case(genai(voted("a", "b", prompt="half \ud83d")), "line 1"),
    "path too long": Case(genai(voted("a", "b", left_video="a long story " * 30)), "line 1|is not there"),
    "empty parquet": Case(given(parquet(ballot(clip), rows=0), "votes.parquet"), "0 pairs of 0 unique videos.*No row is sound"),
    "empty JSON": Case(given("[]"), "0 pairs of 0 unique videos.*No row is sound"),
    "empty file as JSON lines": Case(given("", "votes.jsonl"), "No row is sound"),
    "paths beside content": Case(embedded(voted("a", "b", value=content_and_path), voted("a", "c", value=content_and_path, right_video={"bytes": None, "path": "c.mp4"})),
                                 r"line 2: names the path 'c\.mp4', where other rows embed"),
    "output exists": Case(genai(change=lambda p: p.file("out/mine.txt", "mine")), r"\Avideoalign: error: output out exists already"),
    "output exists and nothing else": Case(lambda p: (p.file("out", "mine"), ["import-genai-bench", "none.json", "--out", "out"])[1], "output out exists already"),
    "output in new folders": Case(genai(voted("a", "b", "centrevote"), out="new/deep/out"), "unknown vote_type"),
}  # fmt: skip

CASES = {
    f"{benchmark}: {name}": case
    for benchmark, cases in (("videogen", VIDEOGEN), ("genai", GENAI))
    for name, case in cases.items()
}


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
def test_bad_input(case: Case, place: Place, capfd: pytest.CaptureFixture) -> None:
    args = case.args(place)
    before = place.tree()
    with pytest.raises(SystemExit) as stop:
        main(["shards", *args, "--workers", "1"])
    out, err = capfd.readouterr()
    assert stop.value.code == 2
    assert "Traceback" not in err and out == ""
    assert err.count("error:") == 1
    assert re.search(case.words, err, re.DOTALL), err
    assert place.tree() == before


def test_an_import_into_an_empty_folder_works(place: Place) -> None:
    Path("out").mkdir()
    place.genai(*parquet_of_binary(place))
    check_voted()
