"""Which pair a person rates next, and which one is on whose screen; a ranking or a single video counts as a pair here.

A pair on a screen is *held*: it counts as one of the votes that the pair needs until the vote comes, or until the
protocol's ``hold_minutes`` are over. Draws (which side is left, which pair comes again) are hashes of the person and
the pair, so that they are the same whichever process makes them.
"""

import hashlib
import json
import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Row, ScalarSelect, Select, func, select
from sqlalchemy.orm import Session

from .answers import order_of
from .people import Annotator
from .protocol import RatingProtocol
from .vote_tables import HoldRow, PairRow, VoteRow, standing


@dataclass(frozen=True)
class Task:
    """A pair on a person's screen.

    Attributes:
        pair_id: The pair's number in the file.
        prompt: The prompt of all videos.
        keys: Keys of the videos, as the screen shows them from left to right.
        ticket: Secret that a vote on this task must bear.
        kind: ``training``, ``work`` or ``review``.
    """

    pair_id: int
    prompt: str
    keys: tuple[str, ...]
    ticket: str
    kind: str

    @property
    def left(self) -> str:
        """Key of the video on the left."""
        return self.keys[0]

    @property
    def right(self) -> str:
        """Key of the video on the right."""
        return self.keys[-1]


class ScreenClock:
    """How long pairs have been on screens, by a clock that nobody sets."""

    def __init__(self) -> None:
        self._shown: dict[int, tuple[str, float]] = {}

    def start(self, hold: HoldRow) -> None:
        """Start to count for a pair that appears on a screen."""
        self._shown[hold.annotator_id] = hold.ticket, time.monotonic()

    def seconds(self, hold: HoldRow) -> float:
        """Seconds that a pair has been on a screen."""
        ticket, since = self._shown.get(hold.annotator_id, ("", 0.0))
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
    count = len(session.get_one(PairRow, pair_id).keys)
    hold = put_on_screen(session, clock, annotator, chosen, _order(annotator.id, pair_id, occasion, count))
    return _task(session, hold, annotator)


def put_on_screen(
    session: Session,
    clock: ScreenClock,
    annotator: Annotator,
    chosen: tuple[int, int],
    order: int,
    watched: float = 0.0,
) -> HoldRow:
    """Hold a pair for a person whose screen is free, with a new ticket.

    Args:
        session: An open transaction that writes.
        clock: Measures how long the pair is on the screen.
        annotator: The person.
        chosen: The pair's number, and the occasion.
        order: Number of the order of its videos on the screen.
        watched: Seconds of one full play that the person has seen of it before.
    """
    hold = HoldRow(
        annotator_id=annotator.id,
        pair_id=chosen[0],
        occasion=chosen[1],
        order=order,
        ticket=secrets.token_urlsafe(12),
        since=time.time(),
        watched=watched,
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
    own = row.keys
    keys = tuple(own[place] for place in order_of(hold.order, len(own)))
    kind = "training" if row.reference else "review" if annotator.role == "reviewer" else "work"
    return Task(row.id, row.prompt, keys, hold.ticket, kind)


def _order(annotator: int, pair: int, occasion: int, count: int) -> int:
    """Number of the order in which videos are shown: a draw for person and pair, and another one in a repetition."""
    orders = math.factorial(count)
    drawn = int.from_bytes(hashlib.sha256(f"{annotator} {pair} side".encode()).digest()[:8], "little")
    return (drawn + occasion % 2 * (orders // 2)) % orders


def _next(session: Session, annotator: Annotator, protocol: RatingProtocol) -> tuple[int, int] | None:
    """The next pair of a person and its occasion (see :class:`.vote_tables.VoteRow`); None where nothing is left."""
    own = own_votes(session, annotator)
    _release_old_holds(session, protocol)
    if annotator.role == "reviewer":
        return _first_of(session, select(PairRow.id).where(PairRow.state == "review", _holds() == 0))
    training = training_pairs(session)
    special = next_training(own, training, protocol) or _repetition(own, annotator, protocol)
    free = PairRow.votes + _holds() < protocol.votes
    return special or _first_of(session, open_to(annotator).where(free).order_by(PairRow.votes.desc()))


def _first_of(session: Session, pairs: Select) -> tuple[int, int] | None:
    """The pair of a query with the lowest priority, for a first vote."""
    first = session.scalar(pairs.order_by(PairRow.priority).limit(1))
    return None if first is None else (first, 0)


def own_votes(session: Session, annotator: Annotator) -> Sequence[Row]:
    """Pair, occasion and choices of a person's votes that were not taken back, with the state of the pair."""
    columns = VoteRow.pair_id, VoteRow.occasion, VoteRow.choices, PairRow.state
    mine = standing(*columns).join(PairRow).where(VoteRow.annotator_id == annotator.id)
    return session.execute(mine.order_by(VoteRow.id)).all()


def training_pairs(session: Session) -> Sequence[PairRow]:
    """The pairs of the training round, in its order."""
    return session.scalars(select(PairRow).where(PairRow.state == "training").order_by(PairRow.priority)).all()


def open_to(annotator: Annotator) -> Select:
    """Query of the pairs that need votes, and on which this person has not voted."""
    rated = standing(VoteRow.id).where(
        VoteRow.pair_id == PairRow.id, VoteRow.annotator_id == annotator.id, VoteRow.occasion == 0
    )
    return select(PairRow.id).where(PairRow.state == "open", ~rated.exists())


def _holds() -> ScalarSelect:
    """Number of screens that a pair is on, repetitions aside."""
    return select(func.count()).where(HoldRow.pair_id == PairRow.id, HoldRow.occasion == 0).scalar_subquery()


def _release_old_holds(session: Session, protocol: RatingProtocol) -> None:
    now = time.time()
    # held from now on where the clock was set back since
    session.query(HoldRow).filter(HoldRow.since > now).update({"since": now})
    session.query(HoldRow).filter(HoldRow.since < now - 60 * protocol.hold_minutes).delete()


def next_training(own: Sequence[Row], rows: Sequence[PairRow], protocol: RatingProtocol) -> tuple[int, int] | None:
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
        right = [
            part
            for row in rows
            for column, reference in json.loads(row.reference).items()
            for part in protocol.answers.right(said[row.id].get(column), reference)
        ]
        if sum(right) >= protocol.training_pass * len(right):
            return None
        round_ -= 1


def _repetition(own: Sequence[Row], annotator: Annotator, protocol: RatingProtocol) -> tuple[int, int] | None:
    """Now and then, a pair that the person rated a while ago."""
    done = [vote.pair_id for vote in own if vote.occasion == 0]
    repeated = {vote.pair_id for vote in own if vote.occasion == 1}
    dropped = {vote.pair_id for vote in own if vote.state in ("unsafe", "broken")}  # nobody sees those twice
    candidates = [pair for pair in done[: -protocol.repeat_after] if pair not in repeated | dropped]
    if not candidates or not repetition_is_due(len(done), len(repeated), protocol):
        return None
    drawn = hashlib.sha256(f"{annotator.id} {len(done)} again".encode()).digest()
    return candidates[int.from_bytes(drawn[:4]) % len(candidates)], 1


def repetition_is_due(done: int, repeated: int, protocol: RatingProtocol) -> bool:
    """Whether a hidden repetition comes next, if some pair was rated long enough ago.

    Args:
        done: Number of a person's first votes.
        repeated: Number of the person's votes on repetitions.
        protocol: Says how many of the votes are repetitions.
    """
    return repeated + 1 <= protocol.repeats * (done + repeated + 1)
