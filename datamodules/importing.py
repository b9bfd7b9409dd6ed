"""Import of rated pairs: a table's rows and the videos that they name become a set of shards."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from .. import VideoAlignError
from ..models.dimensions import DIMENSIONS
from .media import ImageFile, Images, Media, MissingVideo
from .new_samples import NewSample, Progress, write_samples
from .parallel import in_order
from .ratings import COLUMNS, LABELS, check_score, prompt_key, says_something, share_table
from .set_index import SHAPE, Kind, shape_by_side
from .split_sets import Compared
from .uploads import claims_set
from .verify import GLANCE
from .video import Clip, examine

SHOWN = 20
"""Largest number of missing videos, and of merged lines, that a report names."""
_EXCHANGED = {"A": "B", "B": "A", "leftvote": "rightvote", "rightvote": "leftvote"}
"""Words of a rating for the pair with A and B exchanged; all other words stay."""


@dataclass
class Row:
    """A valid row of a table.

    Attributes:
        line: Number of its line in the file.
        paths: Paths of A and B, as :meth:`Media.find` returns them.
        prompt: Text that the videos were generated from.
        labels: Label word per column.
        scores: Score per side and dimension.
        sources: Names of the models that made A and B.
        votes: Further columns for ``pairs.csv``, such as the original vote.
        image: Picture that both videos begin with; None where the table names none.
    """

    line: int
    paths: tuple[str, str]
    prompt: str
    labels: dict[str, str]
    scores: dict[str, dict[str, float]]
    sources: tuple[str, str]
    votes: dict[str, str] = field(default_factory=dict)
    image: ImageFile | None = None

    def rating(self) -> dict[str, Any]:
        """The rating in a fixed order of the two videos, so that rows with A and B exchanged can be compared."""
        turned = self.paths[0] > self.paths[1]
        words = _EXCHANGED if turned else {}
        return {
            "labels": {column: words.get(word, word) for column, word in self.labels.items()},
            "scores": {words.get(side, side): scores for side, scores in self.scores.items()},
            "models": self.sources[::-1] if turned else self.sources,
            "votes": {column: words.get(word, word) for column, word in self.votes.items()},
            "image": self.image,
        }


@dataclass
class Report:
    """Rows and videos of an import.

    Attributes:
        rows: Valid rows.
        merged: Lines that repeat an earlier rating.
        rejected: Invalid lines with reasons.
        missing: Missing videos and images, with the lines that name them.
        clips: Frame count, frame rate and size of the videos, by path.
        shares: Counts of the sets ``train`` and ``val``, as text; empty where one set was written.
        files: What the table names, in words.
    """

    rows: list[Row] = field(default_factory=list)
    merged: list[int] = field(default_factory=list)
    rejected: list[tuple[int, str]] = field(default_factory=list)
    missing: dict[str, list[int]] = field(default_factory=dict)
    clips: dict[str, Clip] = field(default_factory=dict)
    shares: str = ""
    files: str = "videos"

    def text(self) -> str:
        """Counts, label shares, missing videos, and each rejected row with its reason."""
        lines = [f"{len(self.rows)} pairs of {len({p for row in self.rows for p in row.paths})} unique videos"]
        if self.rows:
            lines.append(share_table([row.labels for row in self.rows]))
        if self.merged:
            lines.append(merged_text(self.merged))
        if self.missing:
            pairs = {line for named in self.missing.values() for line in named}
            lines.append(f"{len(self.missing)} {self.files} are not there, which {len(pairs)} rows name")
            lines += [
                f"  {reason} (line {named[0]}{f' and {len(named) - 1} more' if len(named) > 1 else ''})"
                for reason, named in list(self.missing.items())[:SHOWN]
            ]
            lines += [f"  ... and {len(self.missing) - SHOWN} more"] if len(self.missing) > SHOWN else []
        lines += [f"{len(self.rejected)} rows rejected"]
        lines += [f"  line {line}: {reason}" for line, reason in self.rejected]
        return "\n".join([*lines, self.shares] if self.shares else lines)


def merged_text(lines: Sequence[int]) -> str:
    """A note on rows that repeat earlier ones, with the numbers of the first few."""
    named = ", ".join(map(str, lines[:SHOWN])) + (", ..." if len(lines) > SHOWN else "")
    return f"{len(lines)} rows say again what earlier ones say, and were merged with them (lines {named})"


def read_rows(
    table: Iterable[tuple[int, dict[str, str] | str]],
    media: Media,
    row: Callable[..., Row],
    images: Images | None = None,
) -> Report:
    """Sort rows into valid and invalid ones. Checks that the videos exist, and does not read them.

    A row that rates a pair again is merged with the first one if both agree in labels, scores, models, votes and image,
    also with A and B exchanged and whatever spaces and capitals the prompt has; other columns are not compared. If they
    differ it is invalid, because nothing tells which of the two is right.

    Args:
        table: Line numbers with cells by column, or with the reason why the line has none.
        media: Files of the videos.
        row: Turns (line, cells, paths) into a :class:`Row`, or raises :class:`VideoAlignError`.
        images: Finds the images of the rows; None where the table's column ``image`` means nothing.
    """
    report = Report()
    seen: dict[tuple[frozenset[str], str], Row] = {}
    for line, cells in table:
        try:
            if isinstance(cells, str):
                raise VideoAlignError(cells)
            if images and cells.get("image", "").strip():
                report.files = "videos and images"
            found: list[Any] = []
            finders = [partial(media.find, cells[f"path_{side}"]) for side in "AB"]
            for find in [*finders, *([partial(images.find, cells)] if images else [])]:
                try:
                    found.append(find())
                except MissingVideo as error:
                    named = report.missing.setdefault(str(error), [])
                    named += [line] if line not in named[-1:] else []
            if len(found) < 2 + bool(images):
                continue
            paths = found[:2]
            if paths[0] == paths[1]:
                raise VideoAlignError(f"both videos are {paths[0]}")
            if not says_something(cells["prompt"]):
                raise VideoAlignError("there is no prompt")
            sound = row(line, cells, tuple(paths))
            sound.image = found[2] if images else None
            first = seen.setdefault((frozenset(paths), prompt_key(sound.prompt)), sound)
            if first is sound:
                report.rows.append(sound)
            elif other := [what for what, said in sound.rating().items() if said != first.rating()[what]]:
                raise VideoAlignError(
                    f"repeats line {first.line}: the same two videos and prompt, but other {' and '.join(other)}"
                )
            else:
                report.merged.append(line)
        except VideoAlignError as error:
            report.rejected.append((line, str(error)))
    return report


def rated_row(line: int, cells: dict[str, str], paths: tuple[str, str]) -> Row:
    """A row of the official repository's columns: words A, B, same or invalid, and scores where there are any."""
    labels = {column: cells[column].strip() for column in COLUMNS if column in cells}
    if unknown := {c: word for c, word in labels.items() if word not in LABELS}:
        raise VideoAlignError(f"unknown labels {unknown}; they are A, B, same, invalid or empty")
    scores: dict[str, dict[str, float]] = {}
    for side in "AB":
        for dimension in DIMENSIONS:
            text = cells.get(f"MOS_{side}_{dimension}", "").strip()
            if text:
                scores.setdefault(side, {})[dimension] = _score(text, f"MOS_{side}_{dimension}")
    sources = cells.get("A_model", "").strip(), cells.get("B_model", "").strip()
    return Row(line, paths, cells["prompt"].strip(), labels, scores, sources)


def _score(text: str, column: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    return check_score(value, f"{column} {text!r}")


def check_clip(media: Media, name: str) -> Clip | str:
    """Decode a video to its end.

    Returns:
        Its frame count, frame rate and size, or the reason why it cannot be used.
    """
    try:
        return examine(media.source(name), GLANCE, Path(name).name)
    except VideoAlignError as error:
        return str(error)


def look(
    media: Media, paths: Iterable[str], pool: Executor | None, progress: Progress
) -> tuple[dict[str, Clip], dict[str, str]]:
    """Check videos, each once.

    Args:
        media: Files of the videos.
        paths: Paths of the videos; they may repeat.
        pool: Processes that check the videos; None checks them in this one.
        progress: Callback that is told the progress.

    Returns:
        Frame count, frame rate and size of the usable videos, and the reason for each unusable one, by path.
    """
    clips, bad, names = {}, {}, sorted(set(paths))
    for done, (path, clip) in enumerate(zip(names, in_order(pool, partial(check_clip, media), names)), 1):
        (bad if isinstance(clip, str) else clips)[path] = clip
        progress("videos checked", done, len(names))
    return clips, bad


def look_at_images(
    images: Iterable[ImageFile | None], pool: Executor | None, progress: Progress
) -> dict[ImageFile, str]:
    """Check images, each once; None among them stands for no image.

    Args:
        images: Files of the images; they may repeat.
        pool: Processes that check them; None checks them in this one.
        progress: Callback that is told the progress.

    Returns:
        The reason for each unusable one.
    """
    files = list(dict.fromkeys(image for image in images if image))
    bad = {}
    for done, (file, why) in enumerate(zip(files, in_order(pool, ImageFile.why_not, files)), 1):
        bad |= {file: why} if why else {}
        progress("images checked", done, len(files))
    return bad


def video_record(prompt: str, source: str, path: str, clip: Clip) -> dict[str, Any]:
    """The JSON record of a sample of a *videos* set; height and width are those that a player shows."""
    return {"prompt": prompt, "source": source, "path": path, **_shape(clip)}


def _shape(clip: Clip) -> dict[str, Any]:
    return dict(zip(SHAPE, (clip.fps, clip.frames, clip.height, clip.width)))


@claims_set
def write_set(
    report: Report,
    name: str,
    media: Media,
    out: str | Path,
    kind: Kind,
    skip_bad_rows: bool = False,
    allow_missing: bool = False,
    pool: Executor | None = None,
    progress: Progress = lambda what, done, of: None,
    seed: int = 0,
    held_out: float = 0.0,
) -> Report:
    """Check the videos of the valid rows and write the set.

    Samples are written in a random order: training shuffles within a window only, so that batches of a table that is
    sorted by prompt would hold one prompt many times. Keys are still line numbers, and ``pairs.csv`` keeps its order.

    Args:
        report: Result of :func:`read_rows`.
        name: Name of the table, for messages.
        media: Files of its videos.
        out: Folder or address to write.
        kind: ``pairs`` (a sample holds both videos; for training) or ``videos`` (each video once, and ``pairs.csv``;
            for benchmarks).
        skip_bad_rows: Leave invalid rows out; otherwise any of them stops the import.
        allow_missing: Leave out rows whose videos are missing.
        pool: Processes that check the videos.
        progress: Callback that is told the progress.
        seed: Seed of the order of the samples, and of the choice of those that are held out.
        held_out: Share of the samples that become the set ``val`` in ``out``, the others being ``train`` there; 0
            writes one set.

    Returns:
        The report, completed by the check of the videos.

    Raises:
        VideoAlignError: If rows are invalid and not left out, or none is valid; the message holds the whole report.
    """
    report.clips, bad = look(media, (path for row in report.rows for path in row.paths), pool, progress)
    bad |= look_at_images((row.image for row in report.rows), pool, progress)
    unusable = {r.line: [bad[file] for file in (*r.paths, r.image) if file in bad] for r in report.rows}
    for row in report.rows:
        if not unusable[row.line] and media.same(*row.paths):
            unusable[row.line] = [f"the videos {row.paths[0]} and {row.paths[1]} are the same, byte by byte"]
    for line, why in _contradictions(report.rows):
        unusable[line].append(why)
    report.rejected = sorted([*report.rejected, *((line, "; ".join(why)) for line, why in unusable.items() if why)])
    report.rows = [row for row in report.rows if not unusable[row.line]]
    remedies = ["No row is sound."] if not report.rows else []
    if report.missing and not (allow_missing or skip_bad_rows):
        remedies.append(f"Fetch the missing {report.files}, or leave their pairs out with --allow-missing.")
    if report.rejected and not skip_bad_rows:
        remedies.append("Mend the rejected rows, or leave them out with --skip-bad-rows.")
    if remedies:
        raise VideoAlignError("\n".join([f"{name} was not imported.", report.text(), *remedies]))
    samples, rows = _pair_samples(report) if kind == "pairs" else _video_samples(report)
    report.shares = write_samples(samples, rows, media, out, kind, seed, held_out, pool, progress)
    return report


def _contradictions(rows: Sequence[Row]) -> Iterator[tuple[int, str]]:
    """Lines of rows that name another model of a video than an earlier row does, and both names."""
    first: dict[str, tuple[str, int]] = {}
    for row in rows:
        for path, source in zip(row.paths, row.sources):
            known, line = first.setdefault(path, (source, row.line)) if source else ("", 0)
            if source != known:
                yield row.line, f"{path} is of {source!r} here and of {known!r} in line {line}"


def _pair_samples(report: Report) -> tuple[list[NewSample], list[Compared]]:
    samples = []
    for row in report.rows:
        clips = [report.clips[path] for path in row.paths]
        record = {
            "prompt": row.prompt,
            "labels": row.labels,
            "scores": row.scores,
            "sources": dict(zip("AB", row.sources)),
            "paths": dict(zip("AB", row.paths)),
            **shape_by_side(*map(_shape, clips)),
        }
        samples.append(NewSample(f"{row.line:06d}", row.paths, row.sources, record, row.image))
    return samples, []


def _video_samples(report: Report) -> tuple[list[NewSample], list[Compared]]:
    """Each video once per prompt and image that it was rated for, and the rows of the table."""
    sources = {(p, row.prompt, row.image): s for row in report.rows for p, s in zip(row.paths, row.sources)}
    numbers = {video: number for number, video in enumerate(sources)}
    samples = [
        NewSample(
            f"{number:06d}",
            (path,),
            (sources[path, prompt, image],),
            video_record(prompt, sources[path, prompt, image], path, report.clips[path]),
            image,
        )
        for (path, prompt, image), number in numbers.items()
    ]
    rows = []
    for row in report.rows:
        a, b = (numbers[path, row.prompt, row.image] for path in row.paths)
        rows.append(Compared(a, b, _table_row(row, (samples[a].key, samples[b].key))))
    return samples, rows


def _table_row(row: Row, keys: tuple[str, str]) -> dict[str, str]:
    """A row of ``pairs.csv``; ``keys`` are those of the videos A and B."""
    ends = {f"key_{side}": key for side, key in zip("AB", keys)}
    models = {f"{side}_model": source for side, source in zip("AB", row.sources)}
    return {**ends, "prompt": row.prompt, **models, **{c: row.labels.get(c, "") for c in COLUMNS}, **row.votes}
