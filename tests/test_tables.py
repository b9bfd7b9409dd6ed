"""Tables that users give: what is read, and what is refused because it can be understood in two ways."""

from pathlib import Path

import pytest

from videoalign import VideoAlignError
from videoalign.commands.score_files import read_list
from videoalign.datamodules.benchmark import Benchmark
from videoalign.datamodules.import_benchmarks import import_videogen_rewardbench
from videoalign.datamodules.import_csv import import_csv
from videoalign.datamodules.prompts import read_prompts
from videoalign.datamodules.shards import ShardSet, ShardWriter
from videoalign.datamodules.tables import read_table, sound_rows
from videoalign.datamodules.video_sets import import_videos


def given(folder: Path, content: str | bytes, name: str = "t.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


SOUND = {
    "plain": "a,b\n1,2\n",
    "byte order mark": b"\xef\xbb\xbfa,b\n1,2\n",
    "windows": "a,b\r\n1,2\r\n",
    "old macintosh": "a,b\r1,2\r",
    "no newline at the end": "a,b\n1,2",
    "blank lines": "a,b\n\n1,2\n\n\n",
    "blanks in the header": " a , b\n1,2\n",
    "quoted": '"a","b"\n"1","2"\n',
    "an index that pandas wrote": ",a,b\n0,1,2\n",
    "empty columns of a spreadsheet": "a,b,,\n1,2,,\n",
    "another order": "b,a\n2,1\n",
    "rows of commas that a spreadsheet appended": "a,b\n1,2\n,\n , \n",
}


@pytest.mark.parametrize("content", SOUND.values(), ids=SOUND)
def test_sound_tables(tmp_path: Path, content: str | bytes) -> None:
    ((_, row),) = read_table(given(tmp_path, content), ("a", "b"))
    assert row == {"a": "1", "b": "2"}


def test_lines_are_those_of_the_file(tmp_path: Path) -> None:
    table = read_table(given(tmp_path, 'a,b\n"two\nlines",2\n\n3,4\n'))
    assert table == [(3, {"a": "two\nlines", "b": "2"}), (5, {"a": "3", "b": "4"})]


UNSOUND = {
    "empty": ("", "has no rows"),
    "empty but for a byte order mark": (b"\xef\xbb\xbf", "has no rows"),
    "newlines only": ("\n\n", "has no rows"),
    "header only": ("a,b\n", "has no rows"),
    "a column twice": ("a,b,a\n1,2,3\n", "the column a occurs twice"),
    "a column twice with equal cells": ("a,b,a\n1,2,1\n", "the column a occurs twice"),
    "a column twice but for blanks": ("a,b, a \n1,2,3\n", "the column a occurs twice"),
    "two columns twice": ("a,b,b,a\n1,2,3,4\n", "the column a, b occurs twice"),
    "a column twice, header only": ("a,b,a\n", "the column a occurs twice"),
    "a further column twice": ("a,b,c,c\n1,2,3,4\n", "the column c occurs twice"),
    "a column lacks": ("a,c\n1,2\n", "lacks the columns b; it has a, c; it needs the columns a and b"),
    "another case": ("A,b\n1,2\n", "lacks the columns a; it has A, b"),
    "semicolons": ("a;b\n1;2\n", "separated by semicolons"),
    "tabs": ("a\tb\n1\t2\n", "separated by tabs"),
    "bars": ("a|b\n1|2\n", "separated by bars"),
    "a column without a name": ("a,b,\n1,2,3\n", "column 3 has no name, but content"),
    "an unnamed first column of words": (",a,b\nx,1,2\n", "column 1 has no name, but content"),
    "UTF-16": ("a,b\n1,2\n".encode("utf-16"), "UTF-16"),
    "UTF-16 without a mark": ("a,b\n1,2\n".encode("utf-16-le"), "line 1 holds a zero byte"),
    "latin-1": ("a,b\n1,é\n".encode("latin-1"), r"not UTF-8 \(byte 6, line 2\)"),
    "a zero byte": (b"a,b\n1,2\n3,\x004\n", "line 3 holds a zero byte"),
    "a quote that is not closed": ('a,b\n1,"2\n3,4\n', "line 3.*a quote may not be closed"),
    "text after a quote": ('a,b\n1,"2"x\n', "line 2"),
    "a huge field": (f"a,b\n1,{'x' * 200_000}\n", "line 2.*limit"),
    "a workbook": (b"PK\x03\x04\x00\x00\x00", "zero byte"),
}


@pytest.mark.parametrize(("content", "words"), UNSOUND.values(), ids=UNSOUND)
def test_unsound_tables_are_refused_by_name(tmp_path: Path, content: str | bytes, words: str) -> None:
    with pytest.raises(VideoAlignError, match=words) as error:
        read_table(given(tmp_path, content), ("a", "b"))
    assert "t.csv" in str(error.value)


@pytest.mark.parametrize("row", ["1", "1,2,3", '"1"'])
def test_rows_of_another_length(tmp_path: Path, row: str) -> None:
    path = given(tmp_path, f"a,b\n1,2\n{row}\n")
    good, (line, why) = read_table(path)
    assert good == (2, {"a": "1", "b": "2"})
    assert (line, why) == (3, f"has {row.count(',') + 1} fields, the header 2")
    with pytest.raises(VideoAlignError, match=r"t\.csv: line 3 has \d fields, the header 2; mend"):
        sound_rows(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(VideoAlignError, match=r"none\.csv: there is no such file"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(VideoAlignError, match="cannot be read as CSV"):
        read_table(tmp_path)


# --- every table that users give ------------------------------------------------------------------


def of_a_set(path: Path) -> object:
    """The table of rated pairs beside a set's videos, changed after it was written."""
    with ShardWriter(path.parent / "set", "videos") as writer:
        writer.write("0", {"": b"0"}, {"prompt": "p"})
        writer.write_table("pairs.csv", [{"key_A": "0", "key_B": "0"}])
    (path.parent / "set" / "pairs.csv").write_bytes(path.read_bytes())
    return Benchmark(path.parent / "set")


def of_rewardbench(path: Path) -> object:
    path.rename(path.with_name("videogen-rewardbench.csv"))
    return import_videogen_rewardbench(path.parent, path.parent / "out")


USED = {
    "ratings": ("path_A,path_B,prompt,VQ,MQ,TA", lambda path: import_csv(path, path.parent, path.parent / "out")),
    "videos": ("path,prompt,source", lambda path: import_videos(path, path.parent, path.parent / "out")),
    "prompts": ("prompt,more", read_prompts),
    "score --csv": ("path,prompt", read_list),
    "benchmark": ("path_A,path_B,prompt,VQ,MQ,TA,Overall,A_model,B_model", of_rewardbench),
    "pairs.csv": ("key_A,key_B,prompt", of_a_set),
}


@pytest.mark.parametrize("repeated", ["first", "further"])
@pytest.mark.parametrize(("header", "read"), USED.values(), ids=USED)
def test_a_column_that_occurs_twice_is_refused_everywhere(tmp_path: Path, header: str, read, repeated: str) -> None:
    columns = [*header.split(","), header.split(",")[0]] if repeated == "first" else [*header.split(","), "x", "x"]
    cells = [f"{place}" for place, _ in enumerate(columns)]
    with pytest.raises(VideoAlignError, match=f"the column {columns[-1]} occurs twice"):
        read(given(tmp_path, ",".join(columns) + "\n" + ",".join(cells) + "\n"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"", b"\x00\x00", b'"', b"a\n", b"\xe9,\xe9\n1,2\n"], ids=repr)
@pytest.mark.parametrize(("header", "read"), USED.values(), ids=USED)
def test_what_is_no_table_is_refused_everywhere(tmp_path: Path, header: str, read, content: bytes) -> None:
    with pytest.raises(VideoAlignError, match=r"\.csv"):
        read(given(tmp_path, content))


def test_prompts_of_a_text_file(tmp_path: Path) -> None:
    text = b"\xef\xbb\xbfa cat\r\na dog\xe2\x80\xa8that runs\r\n\r\na cat\r\na \xc2\x85 cow"
    assert read_prompts(given(tmp_path, text, "p.txt")) == ["a cat", "a dog\u2028that runs", "a \x85 cow"]
    with pytest.raises(VideoAlignError, match="UTF-16"):
        read_prompts(given(tmp_path, "a cat\n".encode("utf-16"), "q.txt"))
    for name in ("p.jsonl", "p.JSON", "p.tsv"):  # not their lines as prompts
        with pytest.raises(VideoAlignError, match=f"files that end in {name[1:].lower()} are not read; give a text"):
            read_prompts(given(tmp_path, '{"prompt": "a cat"}', name))


def test_a_table_of_pairs_is_read_as_it_was_written(tmp_path: Path) -> None:
    rows = [{"key_A": "0", "key_B": "1", "prompt": 'a "red",\n car'}, {"key_A": "1", "key_B": "0", "prompt": ""}]
    with ShardWriter(tmp_path / "set", "videos") as writer:
        writer.write("0", {"": b"0"}, {"prompt": "p"})
        writer.write_table("pairs.csv", rows)
    assert ShardSet(tmp_path / "set").table("pairs.csv") == rows


@pytest.mark.parametrize("header", ["a,b,Image", "a,b,IMAGE", "a,b,image,Image", "a,b,B"])
def test_a_column_that_would_be_overlooked_is_refused(tmp_path, header):
    """It differs from one that is read in capitals alone."""
    path = given(tmp_path, f"{header}\n{','.join('1' * len(header.split(',')))}\n")
    with pytest.raises(VideoAlignError, match=r"the column \w+ would not be read, (image|b) would"):
        read_table(path, ("a", "b"), optional=("image",))


def test_ratings_in_a_column_of_another_case_are_not_lost(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = given(tmp_path, "path_A,path_B,prompt,VQ,MQ,TA,overall\na.mp4,b.mp4,p,A,A,A,A\n")
    with pytest.raises(VideoAlignError, match="the column overall would not be read, Overall would"):
        import_csv(path, tmp_path, tmp_path / "out")


def test_utf_32_is_named(tmp_path):
    with pytest.raises(VideoAlignError, match="UTF-32"):
        read_table(given(tmp_path, "a,b\n1,2\n".encode("utf-32")), ("a", "b"))
