"""The pairs of a training round, whose right labels are known: a CSV file with columns ``key_A, key_B, VQ, MQ, TA``.

In a round of single videos there is ``key_A`` alone, and labels are scores; in one of rankings, ``key_A`` to ``key_F``
as far as there are videos, and labels are like ``B>A=C``.

Keys are easily confused with those of another set. So where the table also holds prompts, models or paths, as the
``pairs.csv`` of a benchmark does, they must be those of the set's videos.
"""

import csv
from collections.abc import Mapping, Sequence

from .. import VideoAlignError
from ..datamodules.contents import Content
from ..datamodules.ratings import prompt_of
from ..datamodules.spreadsheets import original
from .answers import LETTERS
from .pairing import Pair
from .protocol import RatingProtocol


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
        keys = tuple(key for letter in LETTERS if (key := row.get(f"key_{letter}")))
        answers = rules.answers
        if not answers.fewest <= len(keys) <= rules.most:
            wanted = str(rules.most) if answers.fewest == rules.most else f"{answers.fewest} to {rules.most}"
            raise VideoAlignError(f"{where}: there are {len(keys)} keys, not {wanted} (columns key_A, key_B, ...)")
        if missing := [key for key in keys if key not in contents]:
            zeros = "; spreadsheets take the zeros of a key away" if missing[0].isdecimal() else ""
            raise VideoAlignError(f"{where}: there is no video {missing[0]!r} in the set{zeros}")
        choices = {column: row[column] for column in rules.columns if row.get(column)}
        if not choices or not all(answers.is_one(choice, len(keys)) for choice in choices.values()):
            columns = ", ".join(rules.columns)
            raise VideoAlignError(f"{where}: choices {choices} must be {answers.words} in some of {columns}")
        if twice := [key for key in keys if keys.count(key) > 1]:
            same = " and ".join(f"key_{letter}" for letter, key in zip(LETTERS, keys) if key == twice[0])
            raise VideoAlignError(f"{where}: {same} are the same video {twice[0]!r}")
        if (first := lines.setdefault(frozenset(keys), number)) != number:
            raise VideoAlignError(f"{where}: repeats the pair of line {first}")
        found.append((_pair(row, where, [contents[key] for key in keys]), choices))
    return found


def _pair(row: Mapping[str, str], where: str, videos: Sequence[Content]) -> Pair:
    """The pair of two videos (or one, or several); refuses a row that contradicts their records."""
    prompt = prompt_of(videos[0].record, videos[0].name)
    if any(prompt != video.record.get("prompt") for video in videos):
        raise VideoAlignError(f"{where}: the videos are of different prompts")
    keys = tuple(video.key for video in videos)
    both = [*zip(LETTERS, (video.record for video in videos))]
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
    sources = tuple(str(record.get("source") or "") for _, record in both)
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
    return [{column: original(cell) for column, cell in row.items()} for row in rows]
