"""Public benchmarks as they are published: every layout gives the same set."""

import json
import re
import zipfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from import_kit import (
    ALLOW,
    MISSING,
    NAMES,
    PROMPT,
    RATED,
    SKIP,
    SOUND,
    UNKNOWN,
    VOTES,
    Place,
    arrow,
    ballot,
    check_rated,
    check_voted,
    clip,
    content_and_path,
    folder_with_top,
    hub,
    joined,
    parquet,
    rated,
    save_to_disk,
    table,
    voted,
    write_csv,
    zip_with_top,
)
from videoalign.cli import main
from videoalign.datamodules.benchmark import Benchmark
from videoalign.datamodules.import_benchmarks import import_genai_bench, import_videogen_rewardbench
from videoalign.datamodules.ratings import LABELS
from videoalign.datamodules.shards import ShardSet

# --- what comes out -------------------------------------------------------------------------------


def folder_without_top(place: Place) -> list[str]:
    place.videos("src")
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
    assert "4 pairs of 5 unique videos" in out
    assert "0 rows rejected" in out
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
    assert alone == together
    assert "000000.tar" in alone


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


def hub_files(place: Place) -> list[str]:
    hub(place)
    return ["src", "--split", "test"]


VOTE_LAYOUTS = [
    parquet_of_paths,
    json_list_of_paths,
    json_lines_of_paths_with_byte_order_mark,
    lines_in_a_json_file_beside_an_archive,
    parquet_of_structs_with_paths_only,
    parquet_of_structs,
    parquet_of_binary,
    saved_dataset,
    saved_splits,
    hub_files,
]


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
    assert "4 pairs of 5 unique videos" in out
    assert "0 rows rejected" in out
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
    assert "2 pairs of 3 unique videos" in out
    assert "4 rows rejected" in out
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


def test_an_import_into_an_empty_folder_works(place: Place) -> None:
    Path("out").mkdir()
    place.genai(*parquet_of_binary(place))
    check_voted()
