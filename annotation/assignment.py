"""Which pair a person rates next, and which one is on whose screen.

A pair on a screen is *held*: it counts as one of the votes that the pair needs until the vote comes, or until the
protocol's ``hold_minutes`` are over. Draws (which side is left, which pair comes again) are hashes of the person and
the pair, so that they are the same whichever process makes them.
"""

import hashlib
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Row, ScalarSelect, Select, func, select
from sqlalchemy.orm import Session

from .people import Annotator
from .protocol import RatingProtocol
from .vote_tables import HoldRow, PairRow, VoteRow, standing


@dataclass(frozen=True)
class Task:
    """A pair on a person's screen.

    Attributes:
        pair_id: The pair's number in the file.
        prompt: The prompt of both videos.
        left: Key of the video on the left.
        right: Key of the video on the right.
        ticket: Secret that a vote on this task must bear.
        kind: ``training``, ``work`` or ``review``.
    """

    pair_id: int
    prompt: str
    left: str
    right: str
    ticket: str
    kind: str


class ScreenClock:
    """How long pairs have been on screens, by a clock that nobody sets."""

    def __init__(self) -> None:
        self._shown: dict[int, tuple[str, float]] = {}

    def start(self, hold: HoldRow) -> None:
        """Start to count for a pair that appears on a screen."""
        self._shown[hold.annotator_id] = hold.ticket, time.monotonic()

    def stop(self, hold: HoldRow) -> float:
        """Seconds that a pair has been on a screen; the clock forgets it."""
        ticket, since = self._shown.pop(hold.annotator_id, ("", 0.0))
        # shown before this process began: by the clock of the wall
        return time.monotonic() - since if ticket == hold.ticket else max(0.0, time.time() - hold.since)


def shown(session: Session, annotator: Annotator) -> Task | None:
    """The task on a person's screen; None where there is none."""
    hold = session.get(HoldRow, annotator.id)
    return _task(session, hold, annotator) if hold else None


def assign(session: Session, annotator: Annotator, protocol: RatingProtocol, clock: ScreenClock) -> Task | None:
    """The task on a person's screen, or else the next one, which is held from now on; None where nothing is left."""
    if on_screen := shown(session, annotator):
        return on_screen
    chosen = _next(session, annotator, protocol)
    if chosen is None:
        return None
    pair_id, occasion = chosen
    hold = put_on_screen(session, clock, annotator, pair_id, occasion, _is_swapped(annotator.id, pair_id, occasion))
    return _task(session, hold, annotator)


def put_on_screen(
    session: Session, clock: ScreenClock, annotator: Annotator, pair_id: int, occasion: int, swapped: bool
) -> HoldRow:
    """Hold a pair for a person whose screen is free, with a new ticket."""
    hold = HoldRow(
        annotator_id=annotator.id,
        pair_id=pair_id,
        occasion=occasion,
        swapped=swapped,
        ticket=secrets.token_urlsafe(12),
        since=time.time(),
    )
    session.add(hold)
    clock.start(hold)
    return hold


def prioritise(session: Session, order: Sequence[int]) -> None:
    """Let pairs be rated in this order, and before all others.

    Args:
        session: Open session of the round's database.
        order: Numbers of the pairs, the first to be rated first.
    """
    first = session.scalar(select(func.min(PairRow.priority))) - len(order)
    for place, pair_id in enumerate(order, first):
        session.get_one(PairRow, pair_id).priority = place


def _task(session: Session, hold: HoldRow, annotator: Annotator) -> Task:
    row = session.get_one(PairRow, hold.pair_id)
    keys = (row.key_b, row.key_a) if hold.swapped else (row.key_a, row.key_b)
    kind = "training" if row.reference else "review" if annotator.role == "reviewer" else "work"
    return Task(row.id, row.prompt, *keys, hold.ticket, kind)


def _is_swapped(annotator: int, pair: int, occasion: int) -> bool:
    """Whether B is shown on the left: a draw for person and pair, and the other way round in a repetition."""
    drawn = bool(hashlib.sha256(f"{annotator} {pair} side".encode()).digest()[0] & 1)
    return drawn ^ (occasion % 2 == 1)


def _next(session: Session, annotator: Annotator, protocol: RatingProtocol) -> tuple[int, int] | None:
    """The next pair of a person and its occasion (see :class:`.vote_tables.VoteRow`); None where nothing is left."""
    columns = VoteRow.pair_id, VoteRow.occasion, VoteRow.choices, PairRow.state
    mine = standing(*columns).join(PairRow).where(VoteRow.annotator_id == annotator.id)
    own = session.execute(mine.order_by(VoteRow.id)).all()
    _release_old_holds(session, protocol)
    if annotator.role == "reviewer":
        return _first_of(session, select(PairRow.id).where(PairRow.state == "review", _holds() == 0))
    training = session.scalars(select(PairRow).where(PairRow.state == "training").order_by(PairRow.priority)).all()
    special = _training(own, training, protocol) or _repetition(own, annotator, protocol)
    return special or _first_of(session, _open_to(annotator, protocol).order_by(PairRow.votes.desc()))


def _first_of(session: Session, pairs: Select) -> tuple[int, int] | None:
    """The pair of a query with the lowest priority, for a first vote."""
    first = session.scalar(pairs.order_by(PairRow.priority).limit(1))
    return None if first is None else (first, 0)


def _open_to(annotator: Annotator, protocol: RatingProtocol) -> Select:
    """Query of the pairs that need votes, beside those of people who have them on the screen, and not this person's."""
    rated = standing(VoteRow.id).where(
        VoteRow.pair_id == PairRow.id, VoteRow.annotator_id == annotator.id, VoteRow.occasion == 0
    )
    needed = PairRow.votes + _holds() < protocol.votes
    return select(PairRow.id).where(PairRow.state == "open", needed, ~rated.exists())


def _holds() -> ScalarSelect:
    """Number of screens that a pair is on, repetitions aside."""
    return select(func.count()).where(HoldRow.pair_id == PairRow.id, HoldRow.occasion == 0).scalar_subquery()


def _release_old_holds(session: Session, protocol: RatingProtocol) -> None:
    now = time.time()
    # held from now on where the clock was set back since
    session.query(HoldRow).filter(HoldRow.since > now).update({"since": now})
    session.query(HoldRow).filter(HoldRow.since < now - 60 * protocol.hold_minutes).delete()


def _training(own: Sequence[Row], rows: Sequence[PairRow], protocol: RatingProtocol) -> tuple[int, int] | None:
    """The next training pair: rounds over all of them until one was passed.

    Args:
        own: The person's votes.
        rows: The training pairs.
        protocol: Says which share of right choices passes a round.

    Returns:
        The pair and its occasion, -1 in the first round, -2 in the second, and so on; None after a round was passed.
    """
    if not rows:
        return None
    round_ = -1
    while True:
        said = {vote.pair_id: json.loads(vote.choices) for vote in own if vote.occasion == round_}
        if left := [row for row in rows if row.id not in said]:
            return left[0].id, round_
        right = [said[row.id].get(c) == choice for row in rows for c, choice in json.loads(row.reference).items()]
        if sum(right) >= protocol.training_pass * len(right):
            return None
        round_ -= 1


def _repetition(own: Sequence[Row], annotator: Annotator, protocol: RatingProtocol) -> tuple[int, int] | None:
    """Now and then, a pair that the person rated a while ago."""
    done = [vote.pair_id for vote in own if vote.occasion == 0]
    repeated = {vote.pair_id for vote in own if vote.occasion == 1}
    dropped = {vote.pair_id for vote in own if vote.state in ("unsafe", "broken")}  # nobody sees those twice
    candidates = [pair for pair in done[: -protocol.repeat_after] if pair not in repeated | dropped]
    if not candidates or len(repeated) + 1 > protocol.repeats * (len(done) + len(repeated) + 1):
        return None
    drawn = hashlib.sha256(f"{annotator.id} {len(done)} again".encode()).digest()
    return candidates[int.from_bytes(drawn[:4]) % len(candidates)], 1
