"""A round as rated pairs: shards to train a reward model on, a benchmark with ``pairs.csv``, and a data card."""

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import VideoAlignError
from ..datamodules.benchmark import PAIRS
from ..datamodules.contents import Content
from ..datamodules.ratings import COLUMNS, share_table
from ..datamodules.shards import ShardSet, ShardWriter
from ..models.dimensions import DIMENSIONS
from ..models.files import new_folder, write_json
from .overview import overview
from .protocol import Decision, Vote
from .rounds import Round
from .store import Store
from .vote_tables import PairRow

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""First characters of a cell that spreadsheets take for a formula, or that they skip before one.

The last four are the wide forms that East Asian keyboards type.
"""
Decided = dict[str, list[tuple[PairRow, Decision]]]
"""Decided pairs by split."""


def export(store: Store, videos: ShardSet, out: str | Path, names: bool = False) -> dict[str, Any]:
    """Write a folder with all that a round has decided.

    ``OUT/train`` and ``OUT/validation`` are sets of *pairs*, ``OUT/benchmark`` is a set of *videos* + ``pairs.csv``;
    each pair's JSON holds its votes. Only decided pairs are in them; unsafe and broken ones are counted in the data
    card (``card.md``, ``card.json``). ``votes.jsonl`` holds every vote that ever came: on all pairs, on repetitions, in
    training, and those that were taken back. ``decided.csv`` is for spreadsheets: an apostrophe precedes what they
    would take for a formula. All other files are for programs, and hold every text as it is.

    Args:
        store: The file of votes.
        videos: The set that was rated.
        out: The folder to make.
        names: Whether to call people by their names, not by numbers.

    Returns:
        The content of the data card.

    Raises:
        VideoAlignError: The set is not the one that was rated, or no pair is decided yet.
    """
    if store.fact("data") != videos.digest:
        raise VideoAlignError(f"--videos {videos.name} is not the set that {store.path} was begun with")
    round_ = store.round()  # people may go on meanwhile
    decided: Decided = {}
    for row in round_.pairs:
        if (decision := round_.decisions[row.id]).state == "done":
            decided.setdefault(row.split, []).append((row, decision))
    if not decided:
        raise VideoAlignError(f"no pair of {store.path} is decided yet, so there is nothing to export")
    contents = {content.key: content for content in videos.contents()}
    called = {person["name"]: person["name"] if names else f"person-{person['id']:03d}" for person in round_.people}
    card = _card(round_, decided, called)
    with new_folder(out) as folder:
        for split, rows in decided.items():
            if split == "benchmark":
                _write_benchmark(folder / split, rows, contents)
            else:
                _write_pairs(folder / split, rows, round_, contents, called)
        _write_votes(folder / "votes.jsonl", round_, called)
        _write_decided(folder / "decided.csv", decided)
        write_json(folder / "card.json", card)
        (folder / "card.md").write_text(_card_text(card, _labels(decided)), encoding="utf-8")
    return card


def _labels(decided: Decided) -> list[dict[str, str]]:
    return [decision.labels for rows in decided.values() for _, decision in rows]


def _card(round_: Round, decided: Decided, called: Mapping[str, str]) -> dict[str, Any]:
    """The content of the data card; ``called``: what each person is called in it, by name."""
    found, labels = overview(round_), _labels(decided)
    del found["queue"]
    return {
        **found,
        "people": [{**person, "name": called[person["name"]]} for person in found["people"]],
        "exported": {split: len(rows) for split, rows in decided.items()},
        "labels": {c: dict(Counter(label[c] for label in labels)) for c in round_.protocol.columns},
        "same_source": sum(row.source_a == row.source_b for row in round_.pairs),
    }


def _write_pairs(
    out: Path,
    rows: list[tuple[PairRow, Decision]],
    round_: Round,
    contents: Mapping[str, Content],
    called: Mapping[str, str],
) -> None:
    with ShardWriter(out, "pairs") as writer:
        for row, decision in rows:
            both = {"A": contents[row.key_a], "B": contents[row.key_b]}
            media = {side.lower(): content.read("mp4") for side, content in both.items()}
            record = _record(row, decision, round_.votes.get(row.id, []), both, called)
            writer.write(f"{row.id:07d}", media, record)


def _record(
    row: PairRow, decision: Decision, votes: list[Vote], both: Mapping[str, Content], called: Mapping[str, str]
) -> dict[str, Any]:
    """The JSON of a pair."""
    record: dict[str, Any] = {
        "prompt": row.prompt,
        "labels": decision.labels,
        "sources": {"A": row.source_a, "B": row.source_b},
        "keys": {"A": row.key_a, "B": row.key_b},
        "votes": [_vote_record(vote, called) for vote in votes],
    }
    for name in ("fps", "num_frames"):
        values = {side: content.record.get(name) for side, content in both.items()}
        if None not in values.values():
            record[name] = values
    scores = {side: _mean_scores(votes, side) for side in "AB"}
    if all(len(row) == len(DIMENSIONS) for row in scores.values()):
        record["scores"] = scores
    return record


def _vote_record(vote: Vote, called: Mapping[str, str]) -> dict[str, Any]:
    return {
        "annotator": called[vote.annotator],
        "choices": vote.choices,
        "scores": vote.scores,
        "flags": list(vote.flags),
        "review": vote.review,
        "seconds": round(vote.seconds, 2),
    }


def _mean_scores(votes: list[Vote], side: str) -> dict[str, float]:
    """Mean over the independent annotators of the scores of one video, in the dimensions that have any."""
    rows = [vote.scores.get(side, {}) for vote in votes if not vote.review and not vote.flags]
    return {d: round(sum(given) / len(given), 3) for d in DIMENSIONS if (given := [row[d] for row in rows if d in row])}


def _write_benchmark(out: Path, rows: list[tuple[PairRow, Decision]], contents: Mapping[str, Content]) -> None:
    keys = dict.fromkeys(key for row, _ in rows for key in (row.key_a, row.key_b))
    with ShardWriter(out, "videos") as writer:
        for key in keys:
            writer.write(key, {"": contents[key].read("mp4")}, contents[key].record)
        writer.write_table(PAIRS, [*_benchmark_rows(rows)])


def _benchmark_rows(rows: list[tuple[PairRow, Decision]]) -> Iterator[dict[str, str]]:
    """Rows of ``pairs.csv``."""
    for row, decision in rows:
        yield {
            "key_A": row.key_a,
            "key_B": row.key_b,
            "prompt": row.prompt,
            "A_model": row.source_a,
            "B_model": row.source_b,
            **{column: decision.labels.get(column, "") for column in COLUMNS},
        }


def _write_votes(path: Path, round_: Round, called: Mapping[str, str]) -> None:
    by_id = {person["id"]: called[person["name"]] for person in round_.people}
    with open(path, "w", encoding="utf-8") as file:
        for vote in round_.history:
            file.write(json.dumps({**vote, "annotator": by_id[vote["annotator"]]}, ensure_ascii=False) + "\n")


def _write_decided(path: Path, decided: Decided) -> None:
    """Write all decided pairs as a table for people."""
    header = ("split", "pair", "prompt", "source_A", "source_B", "key_A", "key_B", *COLUMNS, "votes")
    with open(path, "w", newline="", encoding="utf-8-sig") as file:  # the mark tells spreadsheets that it is UTF-8
        writer = csv.writer(file)
        writer.writerow(header)
        for split, rows in decided.items():
            for row, decision in rows:
                texts = map(plain, (row.prompt, row.source_a, row.source_b, row.key_a, row.key_b))
                labels = (decision.labels.get(column, "") for column in COLUMNS)
                writer.writerow((split, row.id, *texts, *labels, row.votes))


def plain(text: str) -> str:
    """A text as a cell of a spreadsheet: an apostrophe precedes what would be taken for a formula."""
    return f"'{text}" if text.lstrip(" ").startswith(FORMULA) else text


def _card_text(card: dict[str, Any], labels: list[dict[str, str]]) -> str:
    """The data card for people, in Markdown."""

    def number(value: float | None) -> str:
        return "-" if value is None or value != value else f"{value:.3f}"

    agreement = "\n".join(
        f"| {column} | {number(a['alpha'])} | {number(a['raw'])} | {number(a['ties'])} | {a['votes']} |"
        for column, a in card["agreement"].items()
    )
    exported = ", ".join(f"{count} {split}" for split, count in card["exported"].items())
    states = ", ".join(f"{count} {state}" for state, count in card["states"].items())
    people = sum(person["votes"] > 0 for person in card["people"])
    sources = "The two videos of a pair are from different sources."
    if alike := card["same_source"]:
        sources = (
            f"The two videos of {alike} pairs are from one source, or their sources are unknown; win rates of sources "
            "leave these pairs out."
        )
    return f"""# Data card

Exported pairs: {exported}. Of {card["pairs"]} pairs: {states}. {card["votes"]} votes of {people} people.
No prompt is in two splits. {sources}

`decided.csv` is for spreadsheets: an apostrophe precedes what they would take for a formula. The other files are for
programs.

Protocol: {json.dumps(card["protocol"])}.
Where all votes on a pair agree they are the label; elsewhere a reviewer's vote is.

| | Krippendorff's alpha (ordinal) | raw agreement | ties among votes | votes |
|---|---|---|---|---|
{agreement}

Labels:

```
{share_table([{c: label.get(c, "") for c in COLUMNS} for label in labels])}
```
"""
