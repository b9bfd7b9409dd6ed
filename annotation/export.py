"""A round as files: shards to train a reward model on, a benchmark with ``pairs.csv``, tables, and a data card."""

import csv
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import VideoAlignError
from ..datamodules.ratings import COLUMNS
from ..datamodules.shards import ShardSet
from ..datamodules.spreadsheets import exact, plain
from ..models.files import new_folder, write_json
from .data_card import card_of, card_text
from .export_sets import SCORES, SetWriter
from .rated_pairs import RatedPair, ScoredVideo, ranking_rows, rated_pairs, scored_videos
from .rounds import Round
from .shown import shown_by
from .store import Store

RANKINGS = "rankings.csv"


def export(
    store: Store,
    videos: ShardSet,
    out: str | Path,
    names: bool = False,
    margin: float | None = None,
    spreadsheet_safe: bool = False,
) -> dict[str, Any]:
    """Write a folder with all that a round has decided.

    ``OUT/train`` and ``OUT/validation`` are sets of *pairs*, ``OUT/benchmark`` is a set of *videos* + ``pairs.csv``;
    each pair's JSON holds its votes. Only decided pairs are in them; unsafe and broken ones are counted in the data
    card (``card.md``, ``card.json``). ``votes.jsonl`` holds every vote that ever came: on all pairs, on repetitions, in
    training, and those that were taken back. ``decided.csv`` is for spreadsheets: an apostrophe precedes what they
    would take for a formula.

    Rankings become all pairs in them, and ``rankings.csv`` has the mean ranks. Scored videos become sets of *videos* +
    ``scores.csv``, or with a ``margin`` pairs as above. Videos are exported as people saw them, boxes over watermarks
    included; ``masks.csv`` in each set says where they are.

    Args:
        store: The file of votes.
        videos: The set that was rated.
        out: The folder to make.
        names: Whether to call people by their names, not by numbers.
        margin: In a round of single videos, the largest difference of mean scores that is a tie of a pair; None makes
            no pairs.
        spreadsheet_safe: Whether in all tables an apostrophe precedes what spreadsheets would take for a formula.
            :func:`.tables.read_table` takes it away again.

    Returns:
        The content of the data card.

    Raises:
        VideoAlignError: The set is not the one that was rated, nothing is decided yet, or a margin makes no sense.
    """
    shown, round_ = shown_by(store, videos), store.round()  # people may go on meanwhile
    pairs, scored = _decided(round_, margin, store.path)
    called = {person["name"]: person["name"] if names else f"person-{person['id']:03d}" for person in round_.people}
    cell = plain if spreadsheet_safe else exact
    writer = SetWriter(shown, called, cell)
    sets = _by_split(pairs or scored)
    card = card_of(round_, shown, pairs, {split: len(rows) for split, rows in sets.items()}, called, margin)
    with new_folder(out) as folder:
        for split, rows in sets.items():
            write = writer.write_benchmark if split == "benchmark" else writer.write_pairs
            (write if pairs else writer.write_scored)(folder / split, rows)
        _write_votes(folder / "votes.jsonl", round_, called)
        if pairs:
            _write_table(folder / "decided.csv", (_decided_row(pair, writer) for pair in pairs), plain)
        if scored:
            _write_table(folder / SCORES, writer.score_rows(scored), cell)
        if round_.protocol.kind == "ranking":
            _write_table(folder / RANKINGS, ranking_rows(round_), cell)
        for image in {*shown.images.values()}:
            (folder / "images").mkdir(exist_ok=True)
            shutil.copyfile(image, folder / "images" / image.name)
        write_json(folder / "card.json", card)
        (folder / "card.md").write_text(card_text(card, pairs), encoding="utf-8")
    return card


def _decided(round_: Round, margin: float | None, db: Path) -> tuple[list[RatedPair], list[ScoredVideo]]:
    """The decided pairs and the scored videos; refuses an export of nothing."""
    single = round_.protocol.kind == "single"
    if margin is not None and not (single and margin >= 0):
        raise VideoAlignError(
            f"--pairs-margin {margin} makes pairs of the scores of single videos; it must be at least 0, and the "
            f"round's kind single (it is {round_.protocol.kind})"
        )
    pairs, scored = rated_pairs(round_, margin), scored_videos(round_) if single else []
    if not pairs and (margin is not None or not scored):
        what = "no pair of scored videos" if scored else f"no {'video' if single else 'pair'}"
        raise VideoAlignError(f"{what} of {db} is decided yet, so there is nothing to export")
    return pairs, scored


def _by_split(rows: Sequence[Any]) -> dict[str, list[Any]]:
    """Rated pairs or scored videos by split."""
    found: dict[str, list[Any]] = {}
    for row in rows:
        found.setdefault(row.split if isinstance(row, RatedPair) else row.row.split, []).append(row)
    return found


def _write_votes(path: Path, round_: Round, called: Mapping[str, str]) -> None:
    by_id = {person["id"]: called[person["name"]] for person in round_.people}
    with open(path, "w", encoding="utf-8") as file:
        for vote in round_.history:
            file.write(json.dumps({**vote, "annotator": by_id[vote["annotator"]]}, ensure_ascii=False) + "\n")


def _write_table(path: Path, rows: Iterable[Mapping[str, Any]], cell: Any) -> None:
    """Write a table for people."""
    first, *others = rows
    with open(path, "w", newline="", encoding="utf-8-sig") as file:  # the mark tells spreadsheets that it is UTF-8
        writer = csv.DictWriter(file, list(first))
        writer.writeheader()
        for row in (first, *others):
            writer.writerow({column: cell(value) if isinstance(value, str) else value for column, value in row.items()})


def _decided_row(pair: RatedPair, writer: SetWriter) -> dict[str, Any]:
    """A row of ``decided.csv``."""
    measured = [vote for vote in pair.votes if vote.choices and vote.watched is not None and not vote.review]
    return {
        "split": pair.split,
        "pair": pair.id,
        "prompt": pair.prompt,
        "source_A": pair.sources[0],
        "source_B": pair.sources[1],
        "key_A": pair.keys[0],
        "key_B": pair.keys[1],
        **writer.image_cell(pair.keys[0]),
        **{column: pair.labels.get(column, "") for column in COLUMNS},
        "votes": pair.count,
        "fast_votes": sum(vote.is_fast for vote in measured) if measured else "",
    }
