"""The reader of users' CSV tables; it refuses tables that can be understood in two ways."""

import codecs
import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .. import VideoAlignError
from .spreadsheets import original

_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
Line = tuple[int, dict[str, str] | str]
"""Number of a row's last line in its file, and its cells by column or the reason why it has none."""


def read_table(
    path: str | Path | bytes,
    required: Sequence[str] = (),
    name: str = "",
    fill: bool = False,
    optional: Sequence[str] = (),
) -> list[Line]:
    """Rows of a CSV in UTF-8 (with a byte order mark or without), separated by commas.

    An apostrophe that keeps spreadsheets from running a cell as a formula is taken away, see :mod:`.spreadsheets`.

    Args:
        path: Path of the file, or its content.
        required: Columns that the table must have.
        name: What to call the file in messages, such as ``--csv list.csv``; its path if not given. Content needs one.
        fill: Whether missing cells at the end of a row count as empty.
        optional: Further columns that are read where they are there; one that differs from these in capitals alone is
            refused.

    Returns:
        Every row, in order; a row with too many or too few fields has a reason in place of cells.

    Raises:
        VideoAlignError: If the file as a whole is no such table: no file, another encoding or separator, unmatched
            quotes, a column that is missing, has no name or occurs twice, or no row.
    """
    name = name or str(path)
    (_, header), *rows = _fields(read_text(path, name, "CSV"), name) or [(0, [])]
    header = [column.strip() for column in header]
    if not header:
        raise VideoAlignError(f"{name} has no rows, it is empty; it needs {_listed(required)}")
    named = _check_header(header, rows, required, optional, name)
    if not rows:
        raise VideoAlignError(f"{name} has no rows; it needs at least one row below its header")
    table: list[Line] = []
    for line, values in rows:
        if fill:
            values = values + [""] * (len(header) - len(values))
        if len(values) != len(header):
            table.append((line, f"has {len(values)} fields, the header {len(header)}"))
        else:
            table.append((line, {header[place]: original(values[place]) for place in named}))
    return table


def sound_rows(
    path: str | Path | bytes,
    required: Sequence[str] = (),
    name: str = "",
    fill: bool = False,
    optional: Sequence[str] = (),
) -> list[tuple[int, dict[str, str]]]:
    """Rows of a table all of whose rows must be valid.

    Args:
        path: Path of the file, or its content.
        required: Columns that the table must have.
        name: What to call the file in messages; its path if not given.
        fill: Whether missing cells at the end of a row count as empty.
        optional: Further columns that are read where they are there.

    Returns:
        Number of each row's last line in its file, and cells by column.

    Raises:
        VideoAlignError: As in :func:`read_table`, and if a row has too many or too few fields.
    """
    table = read_table(path, required, name, fill, optional)
    if unsound := [f"line {line} {cells}" for line, cells in table if isinstance(cells, str)]:
        more = f", and {len(unsound) - 3} more" if len(unsound) > 3 else ""
        raise VideoAlignError(f"{name or path}: {'; '.join(unsound[:3])}{more}; mend these lines")
    return table


def read_text(path: str | Path | bytes, name: str = "", kind: str = "text") -> str:
    """Content of a text file in UTF-8, without its byte order mark.

    Args:
        path: Path of the file, or its content.
        name: What to call the file in messages; its path if not given.
        kind: Format that the file should have, for messages.

    Raises:
        VideoAlignError: If the file cannot be read, or is no such text.
    """
    name = f"{name or path} cannot be read as {kind}"
    try:
        content = path if isinstance(path, bytes) else Path(path).read_bytes()
    except FileNotFoundError:
        raise VideoAlignError(f"{name}: {path}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise VideoAlignError(f"{name} ({error})") from None
    if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        raise VideoAlignError(f"{name}: it is UTF-32, not UTF-8; save it as UTF-8")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise VideoAlignError(f"{name}: it is UTF-16, not UTF-8; save it as UTF-8")
    if (zero := content.find(0)) >= 0:
        line = content.count(b"\n", 0, zero) + 1
        raise VideoAlignError(f"{name}: line {line} holds a zero byte; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise VideoAlignError(f"{name}: it is not UTF-8 (byte {error.start}, line {line}); save it as UTF-8") from None


def _listed(columns: Sequence[str]) -> str:
    if len(columns) < 2:
        return f"a column {', '.join(columns)}"
    return f"the columns {', '.join(columns[:-1])} and {columns[-1]}"


def _fields(text: str, name: str) -> list[tuple[int, list[str]]]:
    """Numbers and fields of the lines that are not empty; spreadsheets append some that hold commas alone."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        return [(reader.line_num, v) for v in reader if v and (len(v) == 1 or any(cell.strip() for cell in v))]
    except csv.Error as error:
        hint = "; a quote may not be closed" if "limit" in str(error) or "unexpected end" in str(error) else ""
        raise VideoAlignError(f"{name} cannot be read as CSV: line {reader.line_num}: {error}{hint}") from None


def _check_header(
    header: list[str],
    rows: list[tuple[int, list[str]]],
    required: Sequence[str],
    optional: Sequence[str],
    name: str,
) -> list[int]:
    """Places of the columns that have a name.

    An unnamed column is left out if it holds no data: a table's index, as pandas writes it in front, and empty columns,
    as spreadsheets append them.
    """
    if twice := [column for column, count in Counter(header).items() if count > 1 and column]:
        columns = ", ".join(twice)
        raise VideoAlignError(
            f"{name}: the column {columns} occurs twice, so it is open which one is meant; rename or remove one"
        )
    if missing := [column for column in required if column not in header]:
        words = [word for sign, word in _SEPARATORS.items() if any(sign in column for column in header)]
        hint = f"; it seems to be separated by {words[0]}: save it with commas" if words else ""
        have = f"{name} lacks the columns {', '.join(missing)}; it has {', '.join(header)}"
        raise VideoAlignError(f"{have}; it needs {_listed(required)}{hint}")
    read = {column.casefold(): column for column in (*required, *optional)}
    if alike := [column for column in header if read.get(column.casefold(), column) != column]:
        meant = read[alike[0].casefold()]
        raise VideoAlignError(
            f"{name}: the column {alike[0]} would not be read, {meant} would: rename it, or remove it if it is another"
        )
    for place in [place for place, column in enumerate(header) if not column]:
        cells = [values[place] for _, values in rows if len(values) == len(header)]
        if any(cell.strip() for cell in cells) and not (place == 0 and all(cell.strip().isdigit() for cell in cells)):
            raise VideoAlignError(f"{name}: column {place + 1} has no name, but content; name or remove it")
    return [place for place, column in enumerate(header) if column]
