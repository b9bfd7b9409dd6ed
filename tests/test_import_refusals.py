"""Damaged tables, videos and archives of public benchmarks: one message each, and nothing is left behind."""

import io
import json
import re
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest

from import_kit import (
    ALLOW,
    HEADER,
    MISSING,
    SKIP,
    SOUND,
    UNKNOWN,
    Place,
    arrow,
    ballot,
    clip,
    content_and_path,
    folder_with_top,
    hub,
    parquet,
    rated,
    save_to_disk,
    table,
    voted,
    zip_with_top,
)
from videoalign.cli import main

# --- bad input ------------------------------------------------------------------------------------

Prepare = Callable[[Place], list[str]]


@dataclass
class Case:
    """A mistake: ``args`` prepares the place and gives the command line; the message must match ``words``."""

    args: Prepare
    words: str


def command(line: str, change: Callable[[Place], object] = lambda place: None) -> Prepare:
    """A command line as it is typed, after a change of the place."""

    def args(place: Place) -> list[str]:
        change(place)
        return line.split()

    return args


def videogen(
    *rows: list[str],
    layout: Prepare = folder_with_top,
    change: Callable[[Place], object] = lambda place: None,
    options: tuple[str, ...] = (),
    header: list[str] = HEADER,
) -> Prepare:
    """The import of these rows; ``change`` damages the files before."""

    def args(place: Place) -> list[str]:
        place.file("outside.mp4", clip("j"))
        place.file("src/videogen-rewardbench.csv", table(*(rows or [SOUND]), header=header))
        source = layout(place)
        change(place)
        return ["import-videogen-rewardbench", *source, "--out", "out", *options]

    return args


def naming(path: str, **options: object) -> Prepare:
    """The import of a row whose first video has this path."""
    return videogen([path, *SOUND[1:]], **options)


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


OUTSIDE = "path .* is not a path inside"
VIDEOGEN = {
    "no such folder": Case(
        command("import-videogen-rewardbench none --out out"), "none: there is no such file or folder"
    ),
    "no csv": Case(videogen(change=lambda p: Path("src/videogen-rewardbench.csv").unlink()), "src is no download"),
    "a column missing": Case(without("Overall"), "lacks the columns Overall; it has path_A, path_B"),
    "a model's column missing": Case(without("B_model"), "lacks the columns B_model"),
    "header only": Case(videogen(change=lambda p: p.file("src/videogen-rewardbench.csv", table())), "has no rows"),
    "no videos at all": Case(
        videogen(layout=lambda p: ["src"]),
        r"2 videos are not there, which 1 rows name.*src/videos/a\.mp4 \(line 3\).*No row is sound",
    ),
    "nothing left but missing ones": Case(
        videogen(MISSING, options=(ALLOW,)), "1 videos are not there.*No row is sound"
    ),
    "nothing left but bad ones": Case(videogen(UNKNOWN, options=(SKIP,)), "1 rows rejected.*No row is sound"),
    "unknown label": Case(videogen(UNKNOWN), r"line 3: unknown labels \{'TA': 'tie'\}"),
    "the same pair twice": Case(
        videogen(SOUND, rated("b", "c"), rated("a", "b", "B B same A")),
        "line 7: repeats line 3: the same two videos and prompt, but other labels",
    ),
    "the same pair turned round": Case(videogen(SOUND, rated("b", "a", "A B same A")), "line 5: repeats line 3"),
    "the same pair in another spelling": Case(
        videogen(SOUND, rated("a", "b", "B B same A", path="{}.mp4")), "line 5: repeats line 3"
    ),
    "the same video twice": Case(
        videogen(["videos/a.mp4", "a.mp4", *SOUND[2:]]), r"line 3: both videos are videos/a\.mp4"
    ),
    "the same video under another name": Case(
        videogen(SOUND, rated("a", "e", "A B same A"), change=lambda p: p.file("src/videos/e.mp4", clip("a"))),
        r"line \d: the videos videos/a\.mp4 and videos/e\.mp4 are the same, byte by byte",
    ),
    "a prompt that cannot be seen": Case(
        videogen([*SOUND[:4], "\u200b\u200b", *SOUND[5:]]), "line 2: there is no prompt"
    ),
    "absolute path": Case(
        lambda p: naming(str(p.tmp / "here/outside.mp4"))(p), r"line 3: path '/.*outside\.mp4' is not a path inside"
    ),
    "path that leads out": Case(naming("../outside.mp4"), r"line 3: path '\.\./outside\.mp4' is not a path inside"),
    "path that leads out on the way": Case(naming("videos/../../outside.mp4"), f"line 3: {OUTSIDE}"),
    "Windows path that leads out": Case(naming("..\\outside.mp4"), f"line 3: {OUTSIDE}"),
    "path with a drive": Case(naming("C:\\videos\\a.mp4"), f"line 3: {OUTSIDE}"),
    "path on a server": Case(naming("\\\\server\\a.mp4"), f"line 3: {OUTSIDE}"),
    "path of dots": Case(naming("./."), r"line 3: path '\./\.' is not a path inside"),
    "link out of the folder": Case(
        naming("videos/link.mp4", change=linked_out), r"line 3: path 'videos/link\.mp4' is a link out"
    ),
    "folder linked out": Case(naming("videos/link/outside.mp4", change=linked_out), "line 3: path .* is a link out"),
    "path that leads out of an archive": Case(naming("../outside.mp4", layout=zip_with_top), f"line 3: {OUTSIDE}"),
    "path too long": Case(videogen(["a long story " * 30, *SOUND[1:]]), r"line 3|is not there"),
    "no such folder of videos": Case(
        videogen(layout=lambda p: ["src", "--videos", "none"]), "none: there is no such folder or zip archive"
    ),
    "archive of another kind": Case(
        videogen(layout=lambda p: ["src", "--videos", str(p.file("videos.tar", "x"))]),
        r"videos\.tar: there is no such folder or zip archive",
    ),
    "archive with a name that leads out": Case(
        member("../x.mp4"), r"1 names lead out of the archive and 0 are links \(such as '\.\./x\.mp4'\)"
    ),
    "archive with a name that leads out on the way": Case(member("videos/../../x.mp4"), "1 names lead out"),
    "archive with an absolute name": Case(member("/tmp/x.mp4"), "1 names lead out"),
    "archive with a Windows name": Case(member("..\\x.mp4"), "1 names lead out"),
    "archive with a link": Case(
        member("videos/link.mp4", 0o120777),
        r"0 names lead out of the archive and 1 are links \(such as 'videos/link\.mp4'\)",
    ),
    "archive cut short": Case(archive(cut), r"src/videos\.zip is no zip archive, or was cut short"),
    "archive of text": Case(
        archive(lambda content: content.__setitem__(slice(None), b"text" * 99)), "is no zip archive"
    ),
    "archive empty": Case(archive(bytearray.clear), "is no zip archive"),
    "archive with an encrypted member": Case(
        archive(headers(6, 8, 1)), r"line 3: src/videos\.zip, videos/a\.mp4: cannot be read \(.*encrypted"
    ),
    "archive with a member of an unknown method": Case(
        archive(headers(8, 10, 99)), r"line 3: .*videos/a\.mp4: cannot be read"
    ),
    "archive with a changed member": Case(archive(flip), r"line 3: .*videos/a\.mp4: cannot be read \(Bad CRC-32"),
    "archive with a garbled deflated member": Case(
        archive(garble, zipfile.ZIP_DEFLATED), r"line 3: .*videos/a\.mp4: cannot be read"
    ),
    "archive with a garbled LZMA member": Case(
        archive(garble, zipfile.ZIP_LZMA), r"line 3: .*videos/a\.mp4: cannot be read"
    ),
    "archive with a garbled name": Case(archive(garble_name), r"src/videos\.zip"),
    "archive of a later version": Case(archive(headers(4, 6, 99)), r"src/videos\.zip"),
    "text as a video in an archive": Case(
        videogen(rated("a", "t"), layout=zip_with_top, change=add_text), r"line 3: t\.mp4 is no readable video"
    ),
    "output exists": Case(
        videogen(change=lambda p: p.file("out/mine.txt", "mine")), r"\Avideoalign: error: output out exists already"
    ),
    "option of the other benchmark": Case(videogen(options=("--split", "test")), "there is no option --split"),
}


def genai(
    *rows: object,
    name: str = "votes.json",
    videos: str = "videos",
    change: Callable[[Place], object] = lambda place: None,
    options: tuple[str, ...] = (),
    out: str = "out",
) -> Prepare:
    """The import of these rows from a file of the kind that its name says."""

    def args(place: Place) -> list[str]:
        place.file("outside.mp4", clip("j"))
        place.videos(videos)
        write = {".parquet": parquet, ".arrow": arrow, ".json": json.dumps}[Path(name).suffix]
        place.file(name, write(list(rows) or ballot()))
        change(place)
        return ["import-genai-bench", name, "--out", out, *options]

    return args


def left(video: object, **options: object) -> Prepare:
    """The import of one vote whose left video is this."""
    return genai(voted("a", "b", left_video=video), **options)


def embedded(*rows: dict) -> Prepare:
    """The import of these rows as parquet."""
    return genai(*rows, name="votes.parquet")


def given(content: str | bytes, name: str = "votes.json") -> Prepare:
    """The import of a file of this content."""
    return lambda place: ["import-genai-bench", str(place.file(name, content)), "--out", "out"]


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
    "no such file": Case(
        command("import-genai-bench none.parquet --out out"), r"none\.parquet: there is no such file or folder"
    ),
    "folder without a table": Case(
        command("import-genai-bench src --out out", lambda p: p.videos("src")), "src holds no parquet, arrow, JSON"
    ),
    "another ending": Case(
        given(json.dumps(ballot()), "votes.csv"), r"votes\.csv: \.csv ending; parquet, arrow, json and jsonl are read"
    ),
    "columns missing in parquet": Case(
        embedded({"prompt": "p", "left_video": "a"}),
        r"votes\.parquet, row 1: lacks right_video, vote_type; it has \['left_video', 'prompt'\]",
    ),
    "column missing in a later row": Case(
        genai(GOOD, {k: v for k, v in GOOD.items() if k != "prompt"}), "row 2: lacks prompt"
    ),
    "null video": Case(
        embedded(GOOD, voted("b", "c", right_video=None)),
        "line 2: right_video holds neither a path nor a video's bytes",
    ),
    "struct of nulls": Case(
        genai(voted("b", "c", left_video={"bytes": None, "path": None})), "line 1: left_video holds neither"
    ),
    "empty video": Case(embedded(voted("b", "c", value=clip, left_video=b"")), "line 1: left_video holds neither"),
    "number as video": Case(left(7), "line 1: left_video holds neither"),
    "number as prompt": Case(embedded(voted("a", "b", value=clip, prompt=7)), "line 1: prompt is no text"),
    "null as vote": Case(genai(voted("a", "b", None)), "line 1: vote_type is no text"),
    "blank prompt": Case(genai(voted("a", "b", prompt=" \n")), "line 1: there is no prompt"),
    "unknown vote": Case(
        genai(GOOD, voted("b", "c", "centrevote")),
        "line 2: unknown vote_type 'centrevote'; they are leftvote, rightvote, tievote, bothbad_vote",
    ),
    "vote of another case": Case(genai(voted("a", "b", "LeftVote")), "line 1: unknown vote_type 'LeftVote'"),
    "the same pair twice": Case(genai(GOOD, voted("a", "b", "tievote")), "line 2: repeats line 1"),
    "the same pair turned round": Case(
        embedded(voted("a", "b", value=clip), voted("b", "a", "tievote", clip)), "line 2: repeats line 1"
    ),
    "the same video twice": Case(genai(voted("a", "a")), r"line 1: both videos are videos/a\.mp4"),
    "the same content twice": Case(embedded(SAME), r"line 1: both videos are [0-9a-f]{32}\.mp4"),
    "no video in parquet": Case(
        embedded(voted("a", "b", value=content_and_path, left_video={"bytes": b"text" * 99, "path": "a.mp4"})),
        r"line 1: [0-9a-f]{32}\.mp4 is no readable video",
    ),
    "video cut short in parquet": Case(
        embedded(voted("a", "b", value=clip, left_video=clip("a")[: clip("a").index(b"moov") - 4])),
        r"line 1: \w+\.mp4.*cut short",
    ),
    "missing video": Case(
        genai(GOOD, voted("b", "z"), voted("z", "c")),
        r"1 videos are not there, which 2 rows name\n +there is no file videos/z\.mp4 \(line 2 and 1 more\)",
    ),
    "absolute path": Case(lambda p: left(str(p.tmp / "here/outside.mp4"))(p), f"line 1: {OUTSIDE}"),
    "path that leads out": Case(
        left("../outside.mp4", name="src/votes.json", videos="src/videos"), f"line 1: {OUTSIDE}"
    ),
    "path that leads out of embedded videos": Case(
        embedded(voted("a", "b", value=content_and_path, left_video={"bytes": None, "path": "../outside.mp4"})),
        f"line 1: {OUTSIDE}",
    ),
    "Windows path": Case(left("C:\\videos\\a.mp4"), f"line 1: {OUTSIDE}"),
    "link out of the folder": Case(
        left("videos/link.mp4", name="src/votes.json", videos="src/videos", change=linked_out),
        "line 1: path .* is a link out",
    ),
    "address in place of a path": Case(
        left("https://example.org/a.mp4"),
        r"https://example\.org/a\.mp4 is not downloaded: no end of this address is a file in \. \(line 1\)",
    ),
    "archive that leads out": Case(
        genai(
            change=lambda p: zipfile.ZipFile(p.zip("x.zip"), "a").writestr("../x", "x"), options=("--videos", "x.zip")
        ),
        "1 names lead out",
    ),
    "no such folder of videos": Case(
        genai(options=("--videos", "none")), "none: there is no such folder or zip archive"
    ),
    "several splits": Case(
        command("import-genai-bench src --out out", hub),
        "it has several splits; choose one with --split. There are: test, test_v1",
    ),
    "unknown split": Case(
        command("import-genai-bench src --out out --split train", hub),
        "it has no split 'train'. There are: test, test_v1",
    ),
    "unknown split of one": Case(
        command("import-genai-bench src --out out --split train", lambda p: save_to_disk(p, "src/test", ballot(clip))),
        "it has no split 'train'. There are: test",
    ),
    "unknown split of a file": Case(genai(options=("--split", "train")), "split"),
    "splits as folders of numbered files": Case(numbered_in_folders, "several splits"),
    "parquet cut short": Case(
        given(parquet(ballot(clip))[:-20], "votes.parquet"),
        r"votes\.parquet cannot be read, it is damaged or of another format",
    ),
    "parquet changed": Case(
        given(parquet(ballot(clip)).replace(b"moov", b"void"), "votes.parquet"),
        r"line 1: \w+\.mp4 is no readable video",
    ),
    "text as parquet": Case(given(json.dumps(ballot()), "votes.parquet"), r"votes\.parquet cannot be read"),
    "empty file as parquet": Case(given(b"", "votes.parquet"), r"votes\.parquet cannot be read"),
    "folder as parquet": Case(
        command("import-genai-bench votes.parquet --out out", lambda p: p.videos("votes.parquet")), r"holds no parquet"
    ),
    "arrow cut short": Case(given(arrow(ballot(clip))[:9999], "votes.arrow"), r"votes\.arrow cannot be read"),
    "arrow of the other format": Case(given(feather(ballot()), "votes.arrow"), r"votes\.arrow cannot be read"),
    "arrow with impossible lengths": Case(given(impossible_lengths(), "votes.arrow"), r"votes\.arrow cannot be read"),
    "JSON cut short": Case(given(json.dumps(ballot())[:-20]), r"votes\.json cannot be read"),
    "JSON lines cut short": Case(
        given("\n".join(map(json.dumps, ballot()))[:-20], "votes.jsonl"), r"votes\.jsonl cannot be read"
    ),
    "JSON an object": Case(
        given(json.dumps({"rows": ballot()})),
        r"votes\.json, row 1: lacks prompt, left_video, right_video, vote_type; it has \['rows'\]",
    ),
    "JSON an object of several lines": Case(
        given(json.dumps({"rows": ballot()}, indent=1)), r"votes\.json cannot be read"
    ),
    "JSON of numbers": Case(given("[1, 2]"), r"row 1: lacks all columns; it has int"),
    "JSON of another encoding": Case(
        given(json.dumps([voted("a", "b", prompt="né")], ensure_ascii=False).encode("latin-1")),
        r"votes\.json cannot be read",
    ),
    "JSON too deep": Case(given("[" * 99999), r"votes\.json"),
    "JSON with half a character": Case(genai(voted("a", "b", prompt="half \ud83d")), "line 1"),
    "path too long": Case(left("a long story " * 30), "line 1|is not there"),
    "empty parquet": Case(
        given(parquet(ballot(clip), rows=0), "votes.parquet"), "0 pairs of 0 unique videos.*No row is sound"
    ),
    "empty JSON": Case(given("[]"), "0 pairs of 0 unique videos.*No row is sound"),
    "empty file as JSON lines": Case(given("", "votes.jsonl"), "No row is sound"),
    "paths beside content": Case(
        embedded(
            voted("a", "b", value=content_and_path),
            voted("a", "c", value=content_and_path, right_video={"bytes": None, "path": "c.mp4"}),
        ),
        r"line 2: names the path 'c\.mp4', where other rows embed",
    ),
    "output exists": Case(
        genai(change=lambda p: p.file("out/mine.txt", "mine")), r"\Avideoalign: error: output out exists already"
    ),
    "output exists and nothing else": Case(
        command("import-genai-bench none.json --out out", lambda p: p.file("out", "mine")), "output out exists already"
    ),
    "output in new folders": Case(genai(voted("a", "b", "centrevote"), out="new/deep/out"), "unknown vote_type"),
}

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
    assert "Traceback" not in err
    assert out == ""
    assert err.count("error:") == 1
    assert re.search(case.words, err, re.DOTALL), err
    assert place.tree() == before
