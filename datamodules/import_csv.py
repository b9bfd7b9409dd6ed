"""Import of rated pairs from a CSV of the official repository's columns."""

import csv
from collections.abc import Iterator
from concurrent.futures import Executor
from pathlib import Path

from .. import VideoAlignError
from ..models.files import claims_out
from ..models.preference import DIMENSIONS
from .importing import Progress, Report, rated_row, read_rows, write_set
from .media import open_media
from .shards import Kind

REQUIRED = ("path_A", "path_B", "prompt", *DIMENSIONS)


def read_csv(path: Path, required: tuple[str, ...] = REQUIRED) -> Iterator[tuple[int, dict[str, str] | str]]:
    """Line numbers with cells by column, or with why the line has none.

    Raises:
        VideoAlignError: where the file as a whole cannot be read as such a table.
    """
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
    header = [name.strip() for name in table[0][1]]
    if missing := [name for name in required if name not in header]:
        raise VideoAlignError(f"{path} lacks the columns {', '.join(missing)}; it has {', '.join(header)}")
    for line, values in table[1:]:
        sound = len(values) == len(header)
        yield line, dict(zip(header, values)) if sound else f"has {len(values)} fields, the header {len(header)}"


@claims_out
def import_csv(
    ratings: Path, videos: Path, out: Path, kind: Kind = "pairs", skip_bad_rows: bool = False,
    allow_missing: bool = False, pool: Executor | None = None, progress: Progress = lambda what, done, of: None,
) -> Report:  # fmt: skip
    """Write the rated pairs of a CSV as a set.

    Args:
        ratings: the CSV. videos: folder or zip archive that its paths are relative to. out: folder to make.
        kind, skip_bad_rows, allow_missing, pool, progress: see :func:`.importing.write_set`.
    """
    media = open_media(videos)
    report = read_rows(read_csv(ratings), media, rated_row)
    return write_set(report, str(ratings), media, out, kind, skip_bad_rows, allow_missing, pool, progress)
