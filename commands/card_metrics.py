"""Measured numbers on a card: what `bench`, `compare` and a test's win rates have written, with their intervals."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import VideoAlignError
from ..models.dimensions import DIMENSIONS, OVERALL
from ..models.files import read_results

COLUMNS = (*DIMENSIONS, OVERALL)
DATASETS = {"videogen-rewardbench": "KwaiVGI/VideoGen-RewardBench", "genai-bench": "TIGER-Lab/GenAI-Bench"}
"""Data sets on the hub of the public protocols."""


@dataclass
class Measured:
    """A table of the card.

    Attributes:
        title: Heading of the table.
        head: Names of the columns.
        rows: Cells by row.
        note: Sentence below the table.
        results: Single numbers for the card's metadata: name of the metric, its value.
        dataset: Name of the data, and its id on the hub or a word for it.
    """

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str
    results: list[tuple[str, float]]
    dataset: tuple[str, str]


def measured(path: str) -> Measured:
    """Read a file of results.

    Args:
        path: JSON file of ``bench`` (``OUT/NAME.json``), ``compare`` (``comparison.json``) or a test
            (``win_rate.json``).

    Raises:
        VideoAlignError: Where it is none of them.
    """
    found = read_results(Path(path), "a folder of results")
    try:
        if "accuracies" in found:
            return _bench(found)
        if "arms" in found:
            return _comparison(found)
        if "drift" in found:
            return _win_rate(found)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
        raise VideoAlignError(f"--metrics {path} lacks something that its kind of results has ({why})") from None
    raise VideoAlignError(
        f"--metrics {path} is no result of `bench` (OUT/NAME.json), `compare` (comparison.json) or a test "
        "(win_rate.json)"
    )


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def _with_interval(value: float, ends: Any) -> str:
    if not ends or any(end is None or math.isnan(end) for end in ends):
        return _number(value)
    return f"{_number(value)} ({ends[0]:.3f} to {ends[1]:.3f})"


def _known(results: list[tuple[str, float | None]]) -> list[tuple[str, float]]:
    return [(name, round(value, 4)) for name, value in results if value is not None and not math.isnan(value)]


def _bench(found: dict[str, Any]) -> Measured:
    rows, results = [], []
    for column, row in found["accuracies"].items():
        cells = [_with_interval(row[k], row.get(i)) for k, i in _ACCURACIES.values()]
        rows.append([column, *cells, _number(row.get("held_out")), _number(row.get("floor")), str(row["pairs"])])
        results += [(f"accuracy {title}, {column}", row[key]) for title, (key, _) in _ACCURACIES.items()]
    head = ["", *(f"{title} (95 %)" for title in _ACCURACIES), "with ties, held-out threshold", "always a tie", "pairs"]
    note = (
        "Intervals are bootstrapped over prompts. Accuracy with ties is at the best threshold on these very pairs; the "
        "held-out one was chosen on others."
    )
    dataset = found["benchmark"], DATASETS.get(found.get("protocol") or "", found["benchmark"])
    return Measured(f"Accuracy on {found['benchmark']}", head, rows, note, _known(results), dataset)


_ACCURACIES = {"without ties": ("without_ties", "interval"), "with ties": ("with_ties", "interval_with_ties")}


def _wins(columns: dict[str, dict[str, Any]]) -> list[str]:
    return [
        _with_interval(columns[c]["win_rate"], columns[c].get("win_rate_interval")) if c in columns else "-"
        for c in COLUMNS
    ]


def _comparison(found: dict[str, Any]) -> Measured:
    rows, results = [], []
    for name, arm in found["arms"].items():
        for judge, columns in (arm.get("against_base") or {}).items():
            rows.append([name, judge, *_wins(columns)])
            results.append((f"win rate of {name} over its base, {judge}", columns[OVERALL]["win_rate"]))
    note = f"Win rates over the base at the same noise, {found['prompts']} prompts with {found['samples']} noises each."
    head = ["", "judge", *(f"{c} (95 %)" for c in COLUMNS)]
    return Measured("Win rates over the base", head, rows, note, _known(results), ("own prompts", "own-prompts"))


def _win_rate(found: dict[str, Any]) -> Measured:
    columns = found["columns"]
    rows = [["same noise", *_wins(columns)]]
    rows.append(
        [
            "other noise",
            *(_with_interval(columns[c]["superiority"], columns[c].get("superiority_interval")) for c in columns),
        ]
    )
    note = f"Judged by a reward model; {len(found['prompts'])} prompts with {found['samples']} noises each."
    results = [(f"win rate over the reference, {c}", columns[c]["win_rate"]) for c in columns]
    head = ["", *(f"{c} (95 %)" for c in columns)]
    return Measured("Win rates over the reference", head, rows, note, _known(results), ("own prompts", "own-prompts"))
