"""A round of annotation: how it begins, and all of it as it stands at one moment."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from .answers import LETTERS, order_of
from .pairing import Pair
from .people import everybody
from .protocol import Decision, RatingProtocol, Vote, decide, too_fast
from .vote_tables import VERSION, Meta, PairRow, UndoRow, VoteRow
from .voting import votes_by_pair


@dataclass(frozen=True)
class Round:
    """A round of annotation at one moment.

    Attributes:
        protocol: The round's rules.
        pairs: All pairs but those of the training round.
        people: The people of the round with their roles, as JSON.
        votes: First votes that were not taken back, by the pair's number.
        again: Votes on repetitions that were not taken back, by the pair's number.
        decisions: What the votes on each pair decide, by the pair's number.
        history: Every vote that ever came, also in training and those that were taken back, as JSON.
    """

    protocol: RatingProtocol
    pairs: list[PairRow]
    people: list[dict[str, Any]]
    votes: dict[int, list[Vote]]
    again: dict[int, list[Vote]]
    decisions: dict[int, Decision]
    history: list[dict[str, Any]]


def fill(
    session: Session,
    pairs: Sequence[Pair],
    protocol: RatingProtocol,
    data: str,
    references: Sequence[tuple[Pair, dict[str, str]]],
    shown: str | None = None,
) -> None:
    """Write the facts and pairs of a new round; see :func:`.store.new_round`."""
    facts = {"version": VERSION, "protocol": protocol.to_dict(), "data": data, "shown": shown}
    for name, value in facts.items():
        session.add(Meta(name=name, value=json.dumps(value)))
    for place, (pair, reference) in enumerate([*references, *((pair, None) for pair in pairs)]):
        (key_a, source_a), (key_b, source_b), *further = [*zip(pair.keys, pair.sources), ("", "")][
            : max(2, len(pair.keys))
        ]
        row = PairRow(
            prompt=pair.prompt,
            key_a=key_a,
            key_b=key_b,
            source_a=source_a,
            source_b=source_b,
            further=json.dumps(further),
            split="training round" if reference else pair.split,
            priority=place,
            state="training" if reference else "open",
            reference=json.dumps(reference) if reference else None,
        )
        session.add(row)


def snapshot(session: Session, protocol: RatingProtocol) -> Round:
    """Everything about a round, as it stands at one moment."""
    pairs = [row for row in all_pairs(session) if row.reference is None]
    votes, again = votes_by_pair(session), votes_by_pair(session, occasion=1)
    decisions = {row.id: decide(votes.get(row.id, []), protocol, again.get(row.id, [])) for row in pairs}
    return Round(protocol, pairs, everybody(session), votes, again, decisions, _history(session))


def all_pairs(session: Session) -> list[PairRow]:
    """All pairs in the order of their numbers, those of the training round too."""
    return list(session.scalars(select(PairRow).order_by(PairRow.id)))


def _history(session: Session) -> list[dict[str, Any]]:
    query = select(VoteRow, PairRow, UndoRow.created).join(PairRow).outerjoin(UndoRow).order_by(VoteRow.id)
    return [
        {
            "pair": row.pair_id,
            "keys": dict(zip(LETTERS, pair.keys)),
            "split": pair.split,
            "annotator": row.annotator_id,
            "occasion": row.occasion,
            "review": row.review,
            "choices": json.loads(row.choices),
            "scores": json.loads(row.scores),
            "flags": json.loads(row.flags),
            "swapped": bool(row.order),
            "screen": "".join(LETTERS[place] for place in order_of(row.order, len(pair.keys))),
            "seconds": round(row.seconds, 2),
            "watched": row.watched,
            "full_play": row.full_play,
            "fast": "[]" == row.flags and too_fast(row.watched, row.full_play),
            "created": row.created,
            "taken_back": undone,
        }
        for row, pair, undone in session.execute(query)
    ]
