"""A round as rated pairs: shards that train a reward model, benchmarks with ``pairs.csv``, and a card of what is in them."""

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

from .. import VideoAlignError
from ..datamodules.benchmark import PAIRS
from ..datamodules.ratings import COLUMNS, share_table
from ..datamodules.shards import Content, ShardSet, ShardWriter, sha256
from ..models.dimensions import DIMENSIONS
from ..models.files import new_folder, write_json
from .overview import overview
from .protocol import Decision, Vote
from .store import PairRow, Store

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""First characters with which spreadsheets take a cell for a formula, or skip to one; the last four are wide ones of East Asia."""


def export(store: Store, videos: ShardSet, out: str | Path, names: bool = False) -> dict[str, Any]:
    """Write ``OUT/train`` and ``OUT/validation`` (*pairs*), ``OUT/benchmark`` (*videos* + ``pairs.csv``), ``OUT/votes.jsonl``,
    ``OUT/decided.csv``, and ``OUT/card.md`` and ``.json``.

    Only decided pairs are written; unsafe and broken ones are counted. Their votes stand in the pairs' JSON, and every vote that
    ever came (of all pairs, repetitions, training, taken back) in ``votes.jsonl``. ``decided.csv`` is for spreadsheets: an apostrophe
    stands before what they would take for a formula. All other files are for programs, and have every text as it is.

    Args:
        store: The file of votes.
        videos: The set that was rated.
        out: Folder to make.
        names: Call people by their names; otherwise they are numbers.

    Returns:
        What the card says.
    """
    if store.fact("data") != sha256(videos.path / "index.json"):
        raise VideoAlignError(f"--videos {videos.path} is not the set that {store.path} was begun with")
    round_ = store.round()  # people may go on meanwhile
    decided: dict[str, list[tuple[PairRow, Decision]]] = {}
    for row in round_.pairs:
        if (decision := round_.decisions[row.id]).state == "done":
            decided.setdefault(row.split, []).append((row, decision))
    if not decided:
        raise VideoAlignError(f"no pair of {store.path} is decided yet, so there is nothing to export")
    contents = {content.key: content for content in videos.contents()}
    called = {person["name"]: person["name"] if names else f"person-{person['id']:03d}" for person in round_.people}
    by_id = {person["id"]: called[person["name"]] for person in round_.people}
    with new_folder(out) as folder:
        for split, rows in decided.items():
            if split == "benchmark":
                _write_benchmark(folder / split, rows, contents)
            else:
                with ShardWriter(folder / split, "pairs") as writer:
                    for row, decision in rows:
                        media = {"a": contents[row.key_a].read("mp4"), "b": contents[row.key_b].read("mp4")}
                        writer.write(
                            f"{row.id:07d}",
                            media,
                            _record(row, decision, round_.votes.get(row.id, []), contents, called),
                        )
        labels = [decision.labels for rows in decided.values() for _, decision in rows]
        found = overview(round_)
        del found["queue"]
        card = {
            **found,
            "people": [{**person, "name": called[person["name"]]} for person in found["people"]],
            "exported": {split: len(rows) for split, rows in decided.items()},
            "labels": {c: dict(Counter(label[c] for label in labels)) for c in round_.protocol.columns},
            "same_source": sum(row.source_a == row.source_b for row in round_.pairs),
        }
        with open(folder / "votes.jsonl", "w", encoding="utf-8") as file:
            for vote in round_.history:
                file.write(json.dumps({**vote, "annotator": by_id[vote["annotator"]]}, ensure_ascii=False) + "\n")
        _write_decided(folder / "decided.csv", decided)
        write_json(folder / "card.json", card)
        (folder / "card.md").write_text(_card(card, labels), encoding="utf-8")
    return card


def _record(
    row: PairRow, decision: Decision, votes: list[Vote], contents: dict[str, Content], called: dict[str, str]
) -> dict[str, Any]:
    both = {"A": contents[row.key_a].record, "B": contents[row.key_b].record}
    record: dict[str, Any] = {
        "prompt": row.prompt,
        "labels": decision.labels,
        "sources": {"A": row.source_a, "B": row.source_b},
        "keys": {"A": row.key_a, "B": row.key_b},
        "votes": [
            {
                "annotator": called[v.annotator],
                "choices": v.choices,
                "scores": v.scores,
                "flags": list(v.flags),
                "review": v.review,
                "seconds": round(v.seconds, 2),
            }
            for v in votes
        ],
    }
    for name in ("fps", "num_frames"):
        if all(one.get(name) is not None for one in both.values()):
            record[name] = {side: one[name] for side, one in both.items()}
    scores = {side: _mean_scores(votes, side) for side in "AB"}
    if all(len(row) == len(DIMENSIONS) for row in scores.values()):
        record["scores"] = scores
    return record


def _mean_scores(votes: list[Vote], side: str) -> dict[str, float]:
    """Mean of the independent annotators' scores of one video, where there are any."""
    rows = [vote.scores.get(side, {}) for vote in votes if not vote.review and not vote.flags]
    return {d: round(sum(given) / len(given), 3) for d in DIMENSIONS if (given := [row[d] for row in rows if d in row])}


def _write_benchmark(out: Path, rows: list[tuple[PairRow, Decision]], contents: dict[str, Content]) -> None:
    keys = dict.fromkeys(key for row, _ in rows for key in (row.key_a, row.key_b))
    with ShardWriter(out, "videos") as writer:
        for key in keys:
            writer.write(key, {"": contents[key].read("mp4")}, contents[key].record)
        writer.write_table(
            PAIRS,
            [
                {
                    "key_A": row.key_a,
                    "key_B": row.key_b,
                    "prompt": row.prompt,
                    "A_model": row.source_a,
                    "B_model": row.source_b,
                    **{c: decision.labels.get(c, "") for c in COLUMNS},
                }
                for row, decision in rows
            ],
        )


def _write_decided(path: Path, decided: dict[str, list[tuple[PairRow, Decision]]]) -> None:
    """All decided pairs for people, by split."""
    with open(path, "w", newline="", encoding="utf-8-sig") as file:  # the mark tells spreadsheets that it is UTF-8
        writer = csv.writer(file)
        writer.writerow(("split", "pair", "prompt", "source_A", "source_B", "key_A", "key_B", *COLUMNS, "votes"))
        for split, rows in decided.items():
            for row, decision in rows:
                cells = (row.prompt, row.source_a, row.source_b, row.key_a, row.key_b)
                writer.writerow(
                    (split, row.id, *map(plain, cells), *(decision.labels.get(c, "") for c in COLUMNS), row.votes)
                )


def plain(text: str) -> str:
    """A text as a spreadsheet's cell: with an apostrophe before it where it would be taken for a formula."""
    return f"'{text}" if text.lstrip(" ").startswith(FORMULA) else text


def _card(card: dict[str, Any], labels: list[dict[str, str]]) -> str:
    def number(value: float | None) -> str:
        return "-" if value is None or value != value else f"{value:.3f}"

    rows = "\n".join(
        f"| {column} | {number(a['alpha'])} | {number(a['raw'])} | {number(a['ties'])} | {a['votes']} |"
        for column, a in card["agreement"].items()
    )
    states = ", ".join(f"{count} {state}" for state, count in card["states"].items())
    sources = "The two videos of a pair are of different sources."
    if alike := card["same_source"]:
        sources = f"The two videos of {alike} pairs are of one source, or nobody knows of which; win rates of sources leave these out."
    return f"""# Data card

Exported pairs: {", ".join(f"{count} {split}" for split, count in card["exported"].items())}. Of {card["pairs"]} pairs: {states}. {card["votes"]} votes of
{sum(p["votes"] > 0 for p in card["people"])} people. No prompt is in two splits. {sources}

`decided.csv` is for spreadsheets: in cells that they would take for a formula an apostrophe stands first. The other files are for programs.

RatingProtocol: {json.dumps(card["protocol"])}. Where all votes of a pair agree they are the label, elsewhere a reviewer's vote is.

| | Krippendorff's alpha (ordinal) | raw agreement | ties among votes | votes |
|---|---|---|---|---|
{rows}

Labels:

```
{share_table([{c: label.get(c, "") for c in COLUMNS} for label in labels])}
```
"""
