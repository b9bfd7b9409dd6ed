"""Labels and scores of rated pairs, which are words on disk and numbers in tensors."""

import math
import unicodedata
from typing import TYPE_CHECKING

from ..models.dimensions import DIMENSIONS, OVERALL
from .contents import ShardError

if TYPE_CHECKING:
    from torch import Tensor

LABELS = {"A": 1.0, "same": 0.0, "B": -1.0, "invalid": math.nan, "": math.nan}
"""Value of each label word; losses and metrics leave NaN out."""
WORDS = {1: "A", 0: "same", -1: "B"}
COLUMNS = (*DIMENSIONS, OVERALL)
"""Columns of labels: the three dimensions and, in benchmarks, overall."""


def labels_in(record: dict, name: str) -> list[float]:
    """Labels in the order of :data:`COLUMNS`: +1, -1, 0, or NaN where there is none.

    Args:
        record: JSON record of a pair.
        name: What to call the sample in messages.

    Raises:
        ShardError: If the labels have an unknown column or word.
    """
    labels = record.get("labels")
    if not isinstance(labels, dict) or not labels.keys() <= set(COLUMNS):
        raise ShardError(f"{name}: labels must be an object with some of {COLUMNS}, got {labels!r}")
    if unknown := {d: w for d, w in labels.items() if not isinstance(w, str) or w not in LABELS}:
        raise ShardError(f"{name}: unknown labels {unknown}; they are A, B, same, invalid or empty")
    return [LABELS[labels.get(column, "")] for column in COLUMNS]


def labels_of(record: dict, name: str) -> "Tensor":
    """Labels of :func:`labels_in` as a tensor (4,)."""
    import torch  # here, because what only describes a set does without

    return torch.tensor(labels_in(record, name))


def scores_of(record: dict, name: str) -> "Tensor":
    """Scores (2, 3) of A and B per dimension, from 1 to 5; NaN where there is none.

    Args:
        record: JSON record of a pair.
        name: What to call the sample in messages.

    Raises:
        ShardError: If a score is no number from 1 to 5.
    """
    scores = record.get("scores") or {}
    if not isinstance(scores, dict) or not all(isinstance(row, dict) for row in scores.values()):
        raise ShardError(f"{name}: scores must be an object of A and B, each with some of {DIMENSIONS}, got {scores!r}")
    import torch

    values = [[scores.get(side, {}).get(d) for d in DIMENSIONS] for side in ("A", "B")]
    return torch.tensor([[math.nan if v is None else check_score(v, name) for v in row] for row in values])


def single_scores(record: dict, name: str) -> list[tuple[str, int, list[float]]]:
    """What each rater gave to each video of a pair: rater, side (0 for A, 1 for B), and scores (3,), NaN for none.

    They stand in the record's ``votes``. A reviewer's and a flagging person's scores do not count, as in ``scores``.

    Args:
        record: JSON record of a pair.
        name: What to call the sample in messages.

    Raises:
        ShardError: If the votes are no objects with a rater's name, or a score is no number from 1 to 5.
    """
    votes = record.get("votes") or []
    if not isinstance(votes, list) or not all(isinstance(vote, dict) for vote in votes):
        raise ShardError(f"{name}: votes must be a list of objects with annotator and scores, got {votes!r}")
    found = []
    for vote in votes:
        rater, given = vote.get("annotator"), vote.get("scores") or {}
        if not isinstance(given, dict) or not all(isinstance(row, dict) for row in given.values()):
            raise ShardError(f"{name}: scores of a vote must be an object of A and B, got {given!r}")
        if vote.get("review") or vote.get("flags"):
            continue
        if any(given.values()) and not (isinstance(rater, str) and rater):
            raise ShardError(f"{name}: a vote with scores must name its annotator, got {rater!r}")
        for side, letter in enumerate("AB"):
            values = [given.get(letter, {}).get(d) for d in DIMENSIONS]
            if any(value is not None for value in values):
                found.append((rater, side, [math.nan if v is None else check_score(v, name) for v in values]))
    return found


def sources_of(record: dict, name: str) -> tuple[str, str]:
    """Names of the models that made A and B; empty where unknown."""
    sources = record.get("sources") or {}
    if not isinstance(sources, dict):
        raise ShardError(f"{name}: sources must be an object of A and B, got {sources!r}")
    return str(sources.get("A") or ""), str(sources.get("B") or "")


def check_score(value: object, name: str) -> float:
    """Return a score as a float, or refuse a value that is no number from 1 to 5.

    Args:
        value: Score as JSON or a table has it.
        name: What to call the sample in messages.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= 5:
        raise ShardError(f"{name}: score {value!r} is not a number from 1 to 5")
    return float(value)


def prompt_of(record: dict, name: str) -> str:
    """The prompt of a record, or an error where it is missing or empty."""
    prompt = record.get("prompt")
    if not isinstance(prompt, str) or not says_something(prompt):
        raise ShardError(f"{name}: there is no prompt")
    if not is_whole(prompt):
        raise ShardError(f"{name}: its prompt holds half a character ({prompt[:40]!r})")
    return prompt


def says_something(text: str) -> bool:
    """Whether a text has a character that can be seen; spaces of no width are none."""
    return any(character.isprintable() and not character.isspace() for character in text)


def is_whole(text: str) -> bool:
    """Whether a text holds no lone surrogate, half a character, which JSON can spell and no tokenizer or file takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def prompt_key(prompt: str) -> str:
    """A prompt as it is compared with others: Unicode's compatible form, one space between words, no capitals."""
    return " ".join(unicodedata.normalize("NFKC", prompt).split()).casefold()


def shares(rows: list[dict[str, str]]) -> dict[str, dict[str, int]]:
    """Number of rows with each label word, per column that has labels."""
    counts: dict[str, dict[str, int]] = {}
    for column in COLUMNS:
        words = [row.get(column, "") for row in rows]
        if any(words):
            counts[column] = {
                word: words.count(word) for word in ("A", "B", "same", "invalid", "") if words.count(word)
            }
    return counts


def share_table(rows: list[dict[str, str]]) -> str:
    """Shares of the label words as text, a line per column."""
    lines = [f"{'':8} {'A':>8} {'B':>8} {'same':>8} {'invalid':>8} {'missing':>8}"]
    for column, count in shares(rows).items():
        cells = [count.get(word, 0) for word in ("A", "B", "same", "invalid", "")]
        lines.append(f"{column:8} " + " ".join(f"{cell / len(rows):8.1%}" for cell in cells))
    return "\n".join(lines)
