"""Import of rated pairs from the official repository's CSV and a folder of videos."""

import csv
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from .. import VideoAlignError
from ..models.files import check_free
from ..models.preference import DIMENSIONS
from .benchmark import PAIRS
from .parallel import in_order
from .ratings import COLUMNS, LABELS, check_score, share_table
from .shards import Kind, ShardWriter
from .verify import GLANCE
from .video import Clip, decode, probe

REQUIRED = ("path_A", "path_B", "prompt", *DIMENSIONS)


@dataclass
class Row:
    """A sound row of the CSV.

    Attributes:
        line: in the file. paths: of A and B, relative to the videos' folder. labels: word per column.
    """

    line: int
    paths: tuple[str, str]
    prompt: str
    labels: dict[str, str]
    scores: dict[str, dict[str, float]]
    sources: tuple[str, str]


@dataclass
class Report:
    """What an import found."""

    rows: list[Row] = field(default_factory=list)
    rejected: list[tuple[int, str]] = field(default_factory=list)
    clips: dict[str, Clip] = field(default_factory=dict)

    def text(self) -> str:
        """Counts, label shares and each rejected row with its reason."""
        lines = [f"{len(self.rows)} pairs of {len({p for row in self.rows for p in row.paths})} unique videos"]
        if self.rows:
            lines.append(share_table([row.labels for row in self.rows]))
        lines += [f"{len(self.rejected)} rows rejected"] + [
            f"  line {line}: {reason}" for line, reason in self.rejected
        ]
        return "\n".join(lines)


def read_ratings(path: Path, videos: Path) -> Report:
    """Rows of the CSV, the unsound ones with their reasons. Looks whether files are there, not into them.

    Raises:
        VideoAlignError: where the file as a whole cannot be read as such a table.
    """
    if not videos.is_dir():
        raise VideoAlignError(f"--videos {videos}: there is no such folder")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            table = [(reader.line_num, values) for values in reader if values]  # number of a row's last line
    except FileNotFoundError:
        raise VideoAlignError(f"{path}: there is no such file") from None
    except UnicodeDecodeError as error:
        raise VideoAlignError(f"{path} is not UTF-8 (byte {error.start}); save it in that encoding") from None
    except (csv.Error, OSError) as error:
        raise VideoAlignError(f"{path} cannot be read as CSV ({error})") from None
    if len(table) < 2:
        raise VideoAlignError(f"{path} has no rows")
    header, report, seen = [name.strip() for name in table[0][1]], Report(), {}
    if missing := [name for name in REQUIRED if name not in header]:
        raise VideoAlignError(f"{path} lacks the columns {', '.join(missing)}; it has {', '.join(header)}")
    for line, values in table[1:]:
        try:
            if len(values) != len(header):
                raise VideoAlignError(f"has {len(values)} fields, the header {len(header)}")
            row = _row(line, dict(zip(header, values)), videos)
            same = frozenset(row.paths), row.prompt
            if same in seen:
                raise VideoAlignError(f"repeats line {seen[same]}: the same two videos and prompt")
            seen[same] = line
            report.rows.append(row)
        except VideoAlignError as error:
            report.rejected.append((line, str(error)))
    return report


def _row(line: int, row: dict[str, str], videos: Path) -> Row:
    paths = tuple(_inside(row[f"path_{side}"], videos) for side in "AB")
    if paths[0] == paths[1]:
        raise VideoAlignError(f"both videos are {paths[0]}")
    labels = {column: row[column].strip() for column in COLUMNS if column in row}
    if unknown := {c: word for c, word in labels.items() if word not in LABELS}:
        raise VideoAlignError(f"unknown labels {unknown}; they are A, B, same, invalid or empty")
    if not row["prompt"].strip():
        raise VideoAlignError("there is no prompt")
    scores: dict[str, dict[str, float]] = {}
    for side in "AB":
        for dimension in DIMENSIONS:
            text = row.get(f"MOS_{side}_{dimension}", "").strip()
            if text:
                scores.setdefault(side, {})[dimension] = _score(text, f"MOS_{side}_{dimension}")
    return Row(line, paths, row["prompt"].strip(), labels, scores, (row.get("A_model", ""), row.get("B_model", "")))


def _score(text: str, column: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    return check_score(value, f"{column} {text!r}")


def _inside(path: str, videos: Path) -> str:
    """A path relative to the folder, refused where it is absolute, leads out of it or names no file."""
    pure = PurePosixPath(path.strip().replace("\\", "/"))
    if not pure.name or pure.is_absolute() or ".." in pure.parts or ":" in pure.parts[0]:
        raise VideoAlignError(f"path {path!r} is not a path inside the videos' folder")
    if not (videos / pure).is_file():
        raise VideoAlignError(f"there is no file {videos / pure}")
    if not (videos / pure).resolve().is_relative_to(videos.resolve()):
        raise VideoAlignError(f"path {path!r} is a link out of the videos' folder")
    return str(pure)


def check_clip(path: Path) -> Clip | str:
    """What the container says, or why the clip is of no use; decodes it to the end."""
    try:
        decode(path, GLANCE, 2, path.name)
        return probe(path, path.name)
    except VideoAlignError as error:
        return str(error)


def import_csv(
    ratings: Path,
    videos: Path,
    out: Path,
    kind: Kind = "pairs",
    skip_bad_rows: bool = False,
    pool: Executor | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, of: None,
) -> Report:
    """Write the rated pairs of a CSV as a set.

    Args:
        ratings: the CSV. videos: folder that its paths are relative to. out: folder to make.
        kind: ``pairs`` (a sample holds both videos; for training) or ``videos`` (each video once, and ``pairs.csv``; for
            benchmarks). skip_bad_rows: leave unsound rows out; otherwise any of them stops the import.
        pool: processes that look into the videos. progress: called with what is done, how many of how many.

    Raises:
        VideoAlignError: with the whole report, where rows are unsound and not to be skipped, or none is sound.
    """
    check_free(Path(out))  # before the long look into the videos
    report = read_ratings(ratings, videos)
    names = sorted({path for row in report.rows for path in row.paths})
    checked = in_order(pool, check_clip, (videos / name for name in names))
    bad: dict[str, str] = {}
    for done, (name, clip) in enumerate(zip(names, checked), 1):
        if isinstance(clip, str):
            bad[name] = clip
        else:
            report.clips[name] = clip
        progress("videos checked", done, len(names))
    for row in [row for row in report.rows if set(row.paths) & bad.keys()]:
        report.rows.remove(row)
        report.rejected.append((row.line, "; ".join(bad[p] for p in row.paths if p in bad)))
    report.rejected.sort()
    if not report.rows or (report.rejected and not skip_bad_rows):
        raise VideoAlignError(f"{ratings} was not imported.\n{report.text()}\n"
                              + ("No row is sound." if not report.rows else "Mend these rows, or leave them out with --skip-bad-rows."))  # fmt: skip
    with ShardWriter(out, kind) as writer:
        for done, total in (_write_pairs if kind == "pairs" else _write_videos)(writer, report, videos):
            progress("samples written", done, total)
    return report


def _write_pairs(writer: ShardWriter, report: Report, videos: Path) -> Iterator[tuple[int, int]]:
    for number, row in enumerate(report.rows, 1):
        clips = [report.clips[path] for path in row.paths]
        record = {
            "prompt": row.prompt, "labels": row.labels, "scores": row.scores, "sources": dict(zip("AB", row.sources)),
            "paths": dict(zip("AB", row.paths)), "fps": {s: c.fps for s, c in zip("AB", clips)},
            "num_frames": {s: c.frames for s, c in zip("AB", clips)},
        }  # fmt: skip
        writer.write(
            f"{row.line:06d}", {side: (videos / path).read_bytes() for side, path in zip("ab", row.paths)}, record
        )
        yield number, len(report.rows)


def _write_videos(writer: ShardWriter, report: Report, videos: Path) -> Iterator[tuple[int, int]]:
    """Each video once per prompt that it was rated for, then the table."""
    sources = {(p, row.prompt): s for row in report.rows for p, s in zip(row.paths, row.sources)}
    keys = {video: f"{number:06d}" for number, video in enumerate(sources)}
    for number, ((path, prompt), key) in enumerate(keys.items(), 1):
        clip = report.clips[path]
        record = {
            "prompt": prompt,
            "source": sources[path, prompt],
            "path": path,
            "fps": clip.fps,
            "num_frames": clip.frames,
        }
        writer.write(key, {"": (videos / path).read_bytes()}, record)
        yield number, len(keys)
    writer.write_table(PAIRS, [
        {"key_A": keys[row.paths[0], row.prompt], "key_B": keys[row.paths[1], row.prompt], "prompt": row.prompt,
         "A_model": row.sources[0], "B_model": row.sources[1], **{c: row.labels.get(c, "") for c in COLUMNS}}
        for row in report.rows
    ])  # fmt: skip
