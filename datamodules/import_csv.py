"""Import of rated pairs from a CSV of the official repository's columns."""

from concurrent.futures import Executor
from pathlib import Path

from ..models.files import claims_out
from ..models.preference import DIMENSIONS
from .importing import Progress, Report, rated_row, read_rows, write_set
from .media import open_media
from .shards import Kind
from .tables import read_table

REQUIRED = ("path_A", "path_B", "prompt", *DIMENSIONS)


@claims_out
def import_csv(
    ratings: Path,
    videos: Path,
    out: Path,
    kind: Kind = "pairs",
    skip_bad_rows: bool = False,
    allow_missing: bool = False,
    pool: Executor | None = None,
    progress: Progress = lambda what, done, of: None,
    seed: int = 0,
) -> Report:
    """Write the rated pairs of a CSV as a set.

    Args:
        ratings: The CSV.
        videos: Folder or zip archive that its paths are relative to.
        out: Folder to make.
        kind: See :func:`.importing.write_set`, as of all that follow.
    """
    media = open_media(videos)
    report = read_rows(read_table(ratings, REQUIRED), media, rated_row)
    return write_set(report, str(ratings), media, out, kind, skip_bad_rows, allow_missing, pool, progress, seed)
