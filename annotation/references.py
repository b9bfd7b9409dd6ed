"""The pairs of a training round, whose right labels are known: a CSV file with columns ``key_A, key_B, VQ, MQ, TA``.

Keys are easily confused with those of another set. So where the table also holds prompts, models or paths, as the
``pairs.csv`` of a benchmark does, they must be those of the set's videos.
"""

import csv
from collections.abc import Mapping

from .. import VideoAlignError
from ..datamodules.contents import Content
from ..datamodules.ratings import COLUMNS, prompt_of
from .pairing import Pair
from .protocol import CHOICES, RatingProtocol


def read_references(
    path: str, contents: Mapping[str, Content], rules: RatingProtocol
) -> list[tuple[Pair, dict[str, str]]]:
    """Read the pairs of a training round with their right choices.

    Args:
        path: The CSV file.
        contents: The videos of the set, by key.
        rules: The round's rules; choices in columns that they do not ask for are left out.

    Raises:
        VideoAlignError: The table cannot be read, or a line of it is wrong; names the line.
    """
    found: list[tuple[Pair, dict[str, str]]] = []
    lines: dict[frozenset[str], int] = {}
    for number, row in enumerate(_table(path), 2):
        where = f"--references {path}, line {number}"
        keys = row.get("key_A") or "", row.get("key_B") or ""
        if missing := [key for key in keys if key not in contents]:
            zeros = "; spreadsheets take the zeros of a key away" if missing[0].isdecimal() else ""
            raise VideoAlignError(f"{where}: there is no video {missing[0]!r} in the set{zeros}")
        choices = {column: row[column] for column in rules.columns if row.get(column)}
        if not choices or not {*choices.values()} <= {*CHOICES}:
            raise VideoAlignError(f"{where}: choices {choices} must be A, same or B in some of {', '.join(COLUMNS)}")
        if keys[0] == keys[1]:
            raise VideoAlignError(f"{where}: key_A and key_B are the same video {keys[0]!r}")
        if (first := lines.setdefault(frozenset(keys), number)) != number:
            raise VideoAlignError(f"{where}: repeats the pair of line {first}")
        found.append((_pair(row, where, contents[keys[0]], contents[keys[1]]), choices))
    return found


def _pair(row: Mapping[str, str], where: str, a: Content, b: Content) -> Pair:
    """The pair of two videos; refuses a row that contradicts their records."""
    prompt = prompt_of(a.record, a.name)
    if prompt != b.record.get("prompt"):
        raise VideoAlignError(f"{where}: the two videos are of different prompts")
    keys, both = (a.key, b.key), (("A", a.record), ("B", b.record))
    known = {
        "prompt": prompt,
        **{f"{side}_model": record.get("source") for side, record in both},
        **{f"path_{side}": record.get("path") for side, record in both},
    }
    for column, value in known.items():
        said = row.get(column)
        if said and value and said.strip() != value.strip():
            raise VideoAlignError(
                f"{where}: {column} is {said!r}, but the set's videos {keys} have {value!r}; the keys are those of "
                "another set"
            )
    sources = str(a.record.get("source") or ""), str(b.record.get("source") or "")
    return Pair(prompt, keys, sources, "training round")


def _table(path: str) -> list[dict[str, str]]:
    """Rows of the CSV file; refuses one whose columns or fields are ambiguous."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            rows, header = list(reader), reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise VideoAlignError(f"--references {path} cannot be read ({error})") from None
    if twice := sorted({name for name in header if name and header.count(name) > 1}):
        named = ", ".join(twice)
        raise VideoAlignError(f"--references {path} has the column {named} more than once; leave one of each")
    if not rows:
        raise VideoAlignError(f"--references {path} holds no pair; leave it out for a round without training")
    if short := [number for number, row in enumerate(rows, 2) if None in row or None in row.values()]:
        where = f"--references {path}, line {short[0]}"
        raise VideoAlignError(f"{where}: it has not as many fields as the header, {len(header)}")
    return rows
