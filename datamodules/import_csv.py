"""Import of rated pairs from a CSV of the official repository's columns."""

from concurrent.futures import Executor
from pathlib import Path

from ..models.dimensions import DIMENSIONS, OVERALL
from .importing import Progress, Report, rated_row, read_rows, write_set
from .media import Images, open_media
from .shards import Kind
from .tables import read_table
from .uploads import claims_set

REQUIRED = ("path_A", "path_B", "prompt", *DIMENSIONS)
OPTIONAL = (OVERALL, "A_model", "B_model", "image", *(f"MOS_{side}_{name}" for side in "AB" for name in DIMENSIONS))
"""Columns that are read where they are there."""


@claims_set
def import_csv(
    ratings: Path,
    videos: Path,
    out: str | Path,
    kind: Kind = "pairs",
    skip_bad_rows: bool = False,
    allow_missing: bool = False,
    pool: Executor | None = None,
    progress: Progress = lambda what, done, of: None,
    seed: int = 0,
    held_out: float = 0.0,
) -> Report:
    """Write the rated pairs of a CSV as a set.

    In a column ``image`` the CSV may name the picture that both videos of a pair begin with (image-to-video); an empty
    cell names none.

    Args:
        ratings: Path of the CSV.
        videos: Folder or zip archive that its paths are relative to.
        out: Folder or address to write.
        kind: ``pairs`` to train on, or ``videos`` with ``pairs.csv`` for a benchmark.
        skip_bad_rows: Leave invalid rows out; otherwise any of them stops the import.
        allow_missing: Leave out rows whose videos are missing.
        pool: Processes that check the videos.
        progress: Callback that is told the progress.
        seed: Seed of the order of the samples, and of the choice of those that are held out.
        held_out: Share of the samples that become the set ``val`` in ``out``, see :func:`.importing.write_set`.

    Returns:
        The rows and videos of the import.

    Raises:
        VideoAlignError: If the CSV cannot be read, or rows are invalid and not left out.
    """
    media = open_media(videos)
    report = read_rows(read_table(ratings, REQUIRED, optional=OPTIONAL), media, rated_row, Images(media, ratings))
    return write_set(
        report, str(ratings), media, out, kind, skip_bad_rows, allow_missing, pool, progress, seed, held_out
    )
