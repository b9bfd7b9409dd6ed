"""Votes: what a page sends is checked, stored once, and can be taken back.

In the same transaction, what the pair's votes now decide is written beside the pair.
"""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from .. import VideoAlignError
from ..models.dimensions import DIMENSIONS
from .answers import LETTERS, inverse, order_of
from .assignment import ScreenClock, put_on_screen
from .people import Annotator
from .protocol import RatingProtocol, Vote, decide, too_fast
from .vote_tables import AnnotatorRow, HoldRow, PairRow, UndoRow, VoteRow, standing

CollectedVote = tuple[str, dict[str, str], Sequence[str], float]
"""A vote that was collected elsewhere: name of the person, choices in the pair's own A and B, flags, seconds."""


class RefusedVote(VideoAlignError):
    """What was sent is no vote on the pair on the screen."""


@dataclass(frozen=True)
class Ballot:
    """What a page sends about the pair that it shows.

    Attributes:
        choices: The answer in each column of the protocol, see :mod:`.answers`; may be incomplete beside a flag.
        scores: Scores from 1 to 5 by side and dimension; may be incomplete.
        flags: Some of ``unsafe`` and ``broken``.
    """

    choices: dict[str, str]
    scores: dict[str, dict[str, int]]
    flags: Sequence[str]

    def check(self, protocol: RatingProtocol, count: int) -> None:
        """Refuse what no page of ours sends.

        Args:
            protocol: The round's rules.
            count: Number of videos on the screen.
        """
        if not set(self.flags) <= {"unsafe", "broken"}:
            raise RefusedVote(f"flags {sorted(self.flags)} are unknown; they are unsafe and broken")
        choices, columns = self.choices, protocol.columns
        known = isinstance(choices, dict) and choices.keys() <= {*columns}
        if not known or not all(
            isinstance(said, str) and protocol.answers.is_one(said, count) for said in choices.values()
        ):
            raise RefusedVote(f"choices must name {', '.join(columns)}, each {protocol.answers.words}")
        if not self.flags and choices.keys() != {*columns}:
            raise RefusedVote(f"choices in {', '.join(c for c in columns if c not in choices)} are missing")
        by_side = isinstance(self.scores, dict) and self.scores.keys() <= {"A", "B"}
        if not (by_side and all(map(_are_scores, self.scores.values()))):
            raise RefusedVote("scores must be whole numbers from 1 to 5, by video and dimension")

    def turned(self, protocol: RatingProtocol, order: Sequence[int]) -> "Ballot":
        """The same about the row's own videos, which the screen showed in this order."""
        choices = {column: protocol.answers.turned(said, order) for column, said in self.choices.items()}
        scores = {LETTERS[order[LETTERS.index(side)]]: row for side, row in self.scores.items()}
        return Ballot(choices, scores, self.flags)


@dataclass(frozen=True)
class Viewing:
    """How much of the videos on a screen was played, as the page says.

    Attributes:
        played: Seconds of each video that were played, from left to right; what is missing was not played.
        lengths: Length of each video in seconds.
        required: Whether a vote before one full play is refused.
    """

    played: Sequence[float]
    lengths: Sequence[float]
    required: bool = False

    @property
    def full_play(self) -> float:
        """Seconds that one full play of all videos takes: they play at the same time."""
        return max(self.lengths)

    def watched(self, on_screen: float) -> float:
        """Seconds of one full play that were seen, of the video of which least was seen.

        Args:
            on_screen: Seconds since the videos appeared on the screen; nobody can have seen more.
        """
        played = [*self.played, *[0.0] * len(self.lengths)]
        share = min(min(1.0, seen / length) for seen, length in zip(played, self.lengths))
        return max(0.0, min(share * self.full_play, on_screen))


class FastVote(RefusedVote):
    """A vote came before one full play of all videos, in a round where that is refused."""


def cast(
    session: Session,
    annotator: Annotator,
    ticket: str,
    sent: Ballot,
    viewing: Viewing | None,
    protocol: RatingProtocol,
    clock: ScreenClock,
) -> dict[str, str] | None:
    """Store a vote on the pair on a person's screen; see :meth:`.store.Store.vote`."""
    hold = session.get(HoldRow, annotator.id)
    if hold is None or hold.ticket != ticket:
        raise RefusedVote("this pair is not on your screen any more: it was rated already, or in another window")
    pair = session.get_one(PairRow, hold.pair_id)
    order = order_of(hold.order, len(pair.keys))
    sent.check(protocol, len(pair.keys))
    own, seconds = sent.turned(protocol, order), clock.seconds(hold)
    watched = max(hold.watched, viewing.watched(seconds)) if viewing else None
    if viewing and viewing.required and not own.flags and too_fast(watched, viewing.full_play):
        raise FastVote(
            f"this is a vote after {watched:.0f} of {viewing.full_play:.0f} seconds; watch the videos to their end "
            "once, then send it again (flags can be sent at any time)"
        )
    row = VoteRow(
        pair_id=pair.id,
        annotator_id=annotator.id,
        occasion=hold.occasion,
        attempt=_attempts(session, hold),
        review=annotator.role == "reviewer",
        choices=json.dumps(own.choices),
        scores=json.dumps(own.scores),
        flags=json.dumps(sorted({*own.flags})),
        order=hold.order,
        seconds=seconds,
        created=_now(session),
        watched=watched,
        full_play=viewing.full_play if viewing else None,
    )
    session.add(row)
    session.delete(hold)
    settle(session, [pair], protocol)
    if not pair.reference:
        return None
    reference = json.loads(pair.reference)
    return {column: protocol.answers.turned(right, inverse(order)) for column, right in reference.items()}


def take_back(session: Session, annotator: Annotator, protocol: RatingProtocol, clock: ScreenClock) -> bool:
    """Take back a person's last vote that counts, and show its pair again; see :meth:`.store.Store.undo`."""
    # not of the training round: that has shown its answer
    mine = standing(VoteRow).where(VoteRow.annotator_id == annotator.id, VoteRow.occasion >= 0)
    row = session.scalar(mine.order_by(VoteRow.id.desc()).limit(1))
    if row is None:
        return False
    independent = not row.review and row.occasion == 0
    if independent and any(vote.review for vote in votes_of(session, row.pair_id)):
        raise RefusedVote("a reviewer has decided on your last pair; it stays")
    session.add(UndoRow(vote_id=row.id, created=time.time()))
    settle(session, [session.get_one(PairRow, row.pair_id)], protocol)
    session.query(HoldRow).filter_by(annotator_id=annotator.id).delete()
    put_on_screen(session, clock, annotator, (row.pair_id, row.occasion), row.order, row.watched or 0.0)
    return True


def bring_in(session: Session, said: Mapping[int, Sequence[CollectedVote]], protocol: RatingProtocol) -> int:
    """Add votes that were collected elsewhere; see :meth:`.store.Store.bring_in`."""
    people = {row.name: row for row in session.scalars(select(AnnotatorRow))}
    count = 0
    for pair_id, votes in said.items():
        last: dict[str, VoteRow] = {}
        # a reviewer decides on what the others said, in whatever order the file has them
        for name, choices, flags, seconds in sorted(votes, key=lambda vote: people[vote[0]].role == "reviewer"):
            if name in last:
                session.add(UndoRow(vote_id=last[name].id, created=time.time()))
            row = VoteRow(
                pair_id=pair_id,
                annotator_id=people[name].id,
                occasion=0,
                attempt=last[name].attempt + 1 if name in last else 0,
                review=people[name].role == "reviewer",
                choices=json.dumps(choices),
                scores="{}",
                flags=json.dumps(sorted(flags)),
                order=0,
                seconds=seconds,
                created=_now(session),
            )
            session.add(row)
            session.flush()
            last[name] = row
            count += 1
    settle(session, [session.get_one(PairRow, pair_id) for pair_id in said], protocol)
    return count


def settle(session: Session, rows: Iterable[PairRow], protocol: RatingProtocol) -> None:
    """Write beside pairs what their votes decide; votes on a training pair decide nothing."""
    session.flush()
    for row in rows:
        if not row.reference:
            votes, again = (votes_of(session, row.id, occasion) for occasion in (0, 1))
            row.state, row.votes = decide(votes, protocol, again).state, sum(not vote.review for vote in votes)


def votes_of(session: Session, pair_id: int, occasion: int = 0) -> list[Vote]:
    """The votes on a pair that were not taken back, in the order in which they came.

    Args:
        session: An open transaction.
        pair_id: The pair's number.
        occasion: 0 for first votes, 1 for those on repetitions.
    """
    query = standing(VoteRow, AnnotatorRow.name).join(AnnotatorRow)
    query = query.where(VoteRow.occasion == occasion, VoteRow.pair_id == pair_id).order_by(VoteRow.id)
    return [_vote(row, name) for row, name in session.execute(query)]


def votes_by_pair(session: Session, occasion: int = 0) -> dict[int, list[Vote]]:
    """The same of all pairs on which there is a vote, by the pair's number."""
    found: dict[int, list[Vote]] = {}
    query = standing(VoteRow, AnnotatorRow.name).join(AnnotatorRow)
    for row, name in session.execute(query.where(VoteRow.occasion == occasion).order_by(VoteRow.id)):
        found.setdefault(row.pair_id, []).append(_vote(row, name))
    return found


def _are_scores(row: Any) -> bool:
    """Whether this is whole numbers from 1 to 5 by dimension."""
    if not (isinstance(row, dict) and row.keys() <= {*DIMENSIONS}):
        return False
    return all(type(value) is int and 1 <= value <= 5 for value in row.values())


def _attempts(session: Session, hold: HoldRow) -> int:
    """Number of votes that a person has given on the pair on the screen, on this occasion."""
    every = select(func.count()).select_from(VoteRow).where(VoteRow.pair_id == hold.pair_id)
    mine = every.where(VoteRow.annotator_id == hold.annotator_id, VoteRow.occasion == hold.occasion)
    return session.scalar(mine)


def _now(session: Session) -> float:
    """Seconds since 1970, but always later than the last vote: so times keep the order where the clock was set back."""
    last = session.scalar(select(VoteRow.created).order_by(VoteRow.id.desc()).limit(1))
    return max(time.time(), (last or 0.0) + 1e-6)


def _vote(row: VoteRow, name: str) -> Vote:
    return Vote(
        annotator=name,
        choices=json.loads(row.choices),
        scores=json.loads(row.scores),
        flags=tuple(json.loads(row.flags)),
        review=row.review,
        seconds=row.seconds,
        created=row.created,
        watched=row.watched,
        full_play=row.full_play,
    )
