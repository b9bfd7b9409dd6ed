"""Import of the public benchmarks, from their published files, as *videos* sets with ``pairs.csv``.

VideoGen-RewardBench (VideoAlign, Table 9): 26,457 pairs of 4,923 videos, labels VQ, MQ, TA and Overall.
GenAI-Bench, its video part: 1,891 pairs with one vote of four kinds.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .. import VideoAlignError
from ..models.benchmark_protocols import VOTES
from ..models.dimensions import OVERALL
from .import_csv import REQUIRED
from .importing import Progress, Report, Row, rated_row, read_rows, write_set
from .limits import FILE_BYTES
from .media import Folder, Media, open_media
from .ratings import is_whole
from .tables import read_table
from .uploads import claims_set, scratch_beside

CSV = "videogen-rewardbench.csv"
_COLUMNS = ("prompt", "left_video", "right_video", "vote_type")
_SHARD = re.compile(r"(?P<name>.+?)-\d{5}(-of-(?P<of>\d{5}))?(-[0-9a-f]+)?")  # test-00000-of-00001.parquet
_STEP = 16
"""Rows that are in memory at once; a row may hold two videos."""


@claims_set
def import_videogen_rewardbench(
    source: Path,
    out: str | Path,
    videos: Path | None = None,
    skip_bad_rows: bool = False,
    allow_missing: bool = False,
    pool: Executor | None = None,
    progress: Progress = lambda what, done, of: None,
    seed: int = 0,
) -> Report:
    """Write VideoGen-RewardBench as a set.

    Args:
        source: Folder with ``videogen-rewardbench.csv``, and ``videos/`` or ``videos.zip``.
        out: Folder or address to write.
        videos: Folder or zip archive of the videos, if they are not in ``source``.
        skip_bad_rows: Leave invalid rows out; otherwise any of them stops the import.
        allow_missing: Leave out rows whose videos are missing.
        pool: Processes that check the videos.
        progress: Callback that is told the progress.
        seed: Seed of the order of the samples.

    Returns:
        The rows and videos of the import.

    Raises:
        VideoAlignError: If the folder is no download of the benchmark, or rows are invalid and not left out.
    """
    table = source / CSV
    if not table.is_file():
        raise VideoAlignError(f"{source} is no download of VideoGen-RewardBench: it has no {CSV}")
    if videos is None:
        packed = source / "videos.zip"
        unpacked = (source / "videos").is_dir() and any((source / "videos").iterdir())
        videos = packed if packed.is_file() and not unpacked else source
    media = open_media(videos, within=("videos",))
    rows = read_table(table, (*REQUIRED, OVERALL, "A_model", "B_model"))
    report = read_rows(rows, media, rated_row)
    return write_set(report, str(table), media, out, "videos", skip_bad_rows, allow_missing, pool, progress, seed)


@claims_set
def import_genai_bench(
    source: Path,
    out: str | Path,
    videos: Path | None = None,
    split: str | None = None,
    skip_bad_rows: bool = False,
    allow_missing: bool = False,
    pool: Executor | None = None,
    progress: Progress = lambda what, done, of: None,
    seed: int = 0,
) -> Report:
    """Write GenAI-Bench's video part as a set, with the original vote as column ``vote_type`` of ``pairs.csv``.

    Args:
        source: Parquet, JSON or JSON-lines file, a folder of them, or a folder of the ``datasets`` library, with the
            columns prompt, left_video, right_video and vote_type; videos as paths, as addresses in the web (of files
            that were downloaded under ``videos``), or as embedded bytes.
        out: Folder or address to write.
        videos: Folder or zip archive that paths are relative to; the source's folder if not given.
        split: Name of the split, where the source has several.
        skip_bad_rows: Leave invalid rows out; otherwise any of them stops the import.
        allow_missing: Leave out rows whose videos are missing.
        pool: Processes that check the videos.
        progress: Callback that is told the progress.
        seed: Seed of the order of the samples.

    Returns:
        The rows and videos of the import.

    Raises:
        VideoAlignError: If the source is no such table, or rows are invalid and not left out.
    """
    files = _files(source, split)
    with scratch_beside(out, "videos") as spool:
        rows = list(_unpacked(files, spool))
        if embedded := any(spool.iterdir()):
            rows = [(line, _all_embedded(cells, spool)) for line, cells in rows]
        folder = source if source.is_dir() else source.parent
        media: Media = Folder(spool) if embedded else open_media(videos or folder)
        report = read_rows(rows, media, _voted_row)
        return write_set(report, str(source), media, out, "videos", skip_bad_rows, allow_missing, pool, progress, seed)


def _all_embedded(cells: dict[str, str] | str, spool: Path) -> dict[str, str] | str:
    """The cells, or why the row is invalid: a table either embeds its videos or names them."""
    if isinstance(cells, str):
        return cells
    paths = [path for s in "AB" if not (spool / (path := cells[f"path_{s}"])).is_file()]
    return f"names the path {paths[0]!r}, where other rows embed their videos" if paths else cells


def _voted_row(line: int, cells: dict[str, str], paths: tuple[str, str]) -> Row:
    vote = cells["vote_type"]
    if vote not in VOTES:
        raise VideoAlignError(f"unknown vote_type {vote!r}; they are {', '.join(VOTES)}")
    sources = cells.get("left_model", "").strip(), cells.get("right_model", "").strip()
    return Row(line, paths, cells["prompt"].strip(), {OVERALL: VOTES[vote]}, {}, sources, {"vote_type": vote})


def _files(source: Path, split: str | None) -> list[Path]:
    """The files of the table, or of one split where the source has several."""
    if source.is_file():
        if split:
            raise VideoAlignError(f"{source} is one file, so there is no split {split!r} to choose; leave --split out")
        return [source]
    if not source.is_dir():
        raise VideoAlignError(f"{source}: there is no such file or folder")
    endings = (".parquet", ".arrow", ".json", ".jsonl")
    files = sorted(p for p in source.rglob("*") if p.suffix in endings and p.is_file())
    # dataset_info.json and the like describe a dataset, they are no table
    tables = [p for p in files if p.suffix != ".json"] or files
    if not tables:
        raise VideoAlignError(f"{source} holds no parquet, arrow, JSON or JSON-lines file")
    splits: dict[str, list[Path]] = {}
    for path in tables:
        splits.setdefault(_split(path.relative_to(source)), []).append(path)
    if split is None and len(splits) == 1:
        (split,) = splits
    if split not in splits:
        why = f"it has no split {split!r}" if split else "it has several splits; choose one with --split"
        raise VideoAlignError(f"{source}: {why}. There are: {', '.join(sorted(splits))}")
    shards = [m for p in splits[split] if (m := _SHARD.fullmatch(p.stem)) and m["of"]]
    if shards and len(shards) != int(shards[0]["of"]):
        raise VideoAlignError(
            f"{source}: {len(shards)} of {int(shards[0]['of'])} files of {split} are there; fetch the others"
        )
    return splits[split]


def _split(path: Path) -> str:
    """The split that a table belongs to, from its path.

    Such paths are data/test-00000-of-00001.parquet, test/0000.parquet and test/data-00000-of-00001.arrow.
    """
    shard = _SHARD.fullmatch(path.stem)
    name = shard["name"] if shard else path.stem
    parts = [part for part in path.parent.parts if part != "data"]
    if name != "data" and not name.isdigit():
        parts.append(name)
    return "/".join(parts) or "data"


def _unpacked(files: list[Path], spool: Path) -> Iterator[tuple[int, dict[str, str] | str]]:
    """Row numbers with cells for :func:`read_rows`; embedded videos are written to files named by their content."""
    line = 0
    for file in files:
        for record in _records(file):
            line += 1
            if not isinstance(record, dict) or (absent := [c for c in _COLUMNS if c not in record]):
                have = sorted(record) if isinstance(record, dict) else type(record).__name__
                lacks = ", ".join(absent) if isinstance(record, dict) else "all columns"
                raise VideoAlignError(f"{file}, row {line}: lacks {lacks}; it has {have}")
            cells = {name: value for name, value in record.items() if isinstance(value, str)}
            try:
                for name, value in cells.items():
                    _text(name, value)
                for side, column in (("A", "left_video"), ("B", "right_video")):
                    cells[f"path_{side}"] = _path(record[column], column, spool)
                if empty := [c for c in ("prompt", "vote_type") if c not in cells]:
                    raise VideoAlignError(f"{', '.join(empty)} is no text")
                yield line, cells
            except VideoAlignError as error:
                yield line, str(error)


def _text(name: str, value: str) -> None:
    if not is_whole(value):
        raise VideoAlignError(f"{name} holds half a character ({value[:40]!r})")


def _path(value: Any, column: str, spool: Path) -> str:
    """The path of a video; embedded content is written to a new file first."""
    if isinstance(value, dict):  # datasets' Video feature
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        if why := FILE_BYTES.excess(len(value)):
            raise VideoAlignError(f"{column} {why}")
        name = f"{hashlib.sha256(value).hexdigest()[:32]}.mp4"
        if not (spool / name).exists():
            (spool / name).write_bytes(value)
        return name
    if isinstance(value, str) and value:
        return value
    raise VideoAlignError(f"{column} holds neither a path nor a video's bytes")


def _records(file: Path) -> Iterator[Any]:
    try:
        if file.suffix == ".parquet":
            for batch in pq.ParquetFile(file).iter_batches(_STEP):
                yield from batch.to_pylist()
        elif file.suffix == ".arrow":
            with pa.memory_map(str(file)) as memory:
                for batch in pa.ipc.open_stream(memory):
                    batch.validate(full=True)  # a damaged file can crash the reader otherwise
                    for start in range(0, len(batch), _STEP):
                        yield from batch.slice(start, _STEP).to_pylist()
        elif file.suffix in (".json", ".jsonl"):
            text = file.read_text(encoding="utf-8-sig")
            if text.lstrip()[:1] == "[":
                yield from json.loads(text)
            else:
                yield from [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            raise VideoAlignError(f"{file}: {file.suffix or 'no'} ending; parquet, arrow, json and jsonl are read")
    except (OSError, ValueError, RecursionError, pa.ArrowException) as error:
        raise VideoAlignError(
            f"{file} cannot be read, it is damaged or of another format ({str(error).splitlines()[0][:160]})"
        ) from None
