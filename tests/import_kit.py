"""What the tests of importing public benchmarks share: their tables, clips, layouts, and what must come out."""

import csv
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers import plain_clip, tree
from videoalign.cli import main
from videoalign.datamodules.ratings import COLUMNS
from videoalign.datamodules.shards import ShardSet

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
    return plain_clip(20 * NAMES.index(name) + 20, frames, height, width, fps)


@dataclass
class Place:
    """Where a test happens.

    Attributes:
        tmp: Folder above the current one, so that files which escape from the current one are seen.
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
        return tree(self.tmp)

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
    """A row of VideoGen-RewardBench whose frame rates and counts are wrong."""
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
    """A video as the datasets library stores it."""
    return {"bytes": clip(name), "path": f"gone/{name}.mp4"}


def parquet(content: list[dict], rows: int | None = None, **options: int) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(content).slice(0, rows), file, **options)
    return file.getvalue()


def arrow(rows: list[dict]) -> bytes:
    """One batch as an Arrow stream, the format of the datasets library."""
    batch, file = pa.RecordBatch.from_pylist(rows), io.BytesIO()
    with pa.ipc.new_stream(file, batch.schema) as writer:
        writer.write_batch(batch)
    return file.getvalue()


def save_to_disk(place: Place, folder: str, rows: list[dict]) -> None:
    """The files of ``Dataset.save_to_disk``."""
    place.file(f"{folder}/data-00000-of-00001.arrow", arrow(rows))
    place.file(f"{folder}/state.json", json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    place.file(f"{folder}/dataset_info.json", json.dumps({"features": {"prompt": {"dtype": "string"}}}))


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
    """Assert that the set holds the pairs of RATED."""
    found = joined(out)
    assert [(a, b) for a, b, _ in found] == [(a, b) for a, b, _ in RATED]
    for (a, b, row), (_, _, labels) in zip(found, RATED):
        words = {column: word.strip("-") for column, word in zip(COLUMNS, labels.split())}
        rest = {"prompt": PROMPT, "A_model": f"model-{a}", "B_model": f"model-{b}"}
        assert {name: row[name] for name in row if not name.startswith("key")} == {**rest, **words}
    assert ShardSet(out).index.samples == 5


def check_voted(out: str = "out", votes: list[tuple[str, str, str]] = VOTED) -> None:
    """Assert that the set holds the pairs of VOTED."""
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


def zip_with_top(place: Place) -> list[str]:
    place.zip("src/videos.zip")
    return ["src"]


def hub(place: Place) -> None:
    rows = ballot(content_and_path)
    for number, part in enumerate((rows[:1], rows[1:])):
        place.file(f"src/data/test-{number:05d}-of-00002.parquet", parquet(part))
    place.file("src/data/test_v1-00000-of-00001.parquet", parquet([voted("f", "g", "tievote", clip)]))
    place.file("src/README.md", "---\nconfigs: []\n---\n")


SOUND, MISSING, UNKNOWN = rated("a", "b"), rated("a", "z"), rated("b", "c", "A B tie A")
ALLOW, SKIP = "--allow-missing", "--skip-bad-rows"
