"""The tables of a file of votes.

Votes are only ever added: taking one back is another row. What a pair's votes decide stands beside the pair, so that
nobody has to read all votes to know what is left.
"""

import json
from typing import Any

from sqlalchemy import ForeignKey, Index, Select, UniqueConstraint, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

VERSION = 2
"""Version of the tables, which the file names in its ``meta``."""
UPGRADES = {
    1: (
        "ALTER TABLE pairs ADD COLUMN further TEXT DEFAULT '[]' NOT NULL",
        "ALTER TABLE votes ADD COLUMN watched FLOAT",
        "ALTER TABLE votes ADD COLUMN full_play FLOAT",
        "ALTER TABLE holds ADD COLUMN watched FLOAT DEFAULT 0 NOT NULL",
    )
}
"""Statements that bring a file of this version to the next one."""


class Base(DeclarativeBase):
    """What SQLAlchemy collects the tables in."""


class Meta(Base):
    """Facts about the round, by name, as JSON."""

    __tablename__ = "meta"
    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]


class PairRow(Base):
    """A pair to rate; in other kinds of rounds, a single video or several videos to rank.

    Attributes:
        key_b: Key of the second video; empty for a single one.
        further: Key and source of each video after the second, as JSON.
        priority: Place in the order of rating; the lowest comes first.
        reference: The right choices of a training pair, as JSON; None for all others.
        state: ``training``, or the state of the :class:`.protocol.Decision` on the pair's votes. It follows from the
            votes, see :func:`.voting.settle`.
        votes: Number of independent votes that were not taken back. It follows from the votes too.
    """

    __tablename__ = "pairs"
    id: Mapped[int] = mapped_column(primary_key=True)
    prompt: Mapped[str]
    key_a: Mapped[str]
    key_b: Mapped[str]
    source_a: Mapped[str]
    source_b: Mapped[str]
    split: Mapped[str]
    priority: Mapped[int]
    reference: Mapped[str | None]
    state: Mapped[str]
    votes: Mapped[int] = mapped_column(default=0)
    further: Mapped[str] = mapped_column(default="[]")
    __table_args__ = (Index("whats_next", "state", votes.desc(), "priority"),)

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of all videos, in the row's own order."""
        return tuple(key for key, _ in self._videos())

    @property
    def sources(self) -> tuple[str, ...]:
        """Sources of all videos, in the row's own order."""
        return tuple(source for _, source in self._videos())

    def _videos(self) -> list[tuple[str, str]]:
        first = [(self.key_a, self.source_a), (self.key_b, self.source_b)]
        return [*first[: 1 + bool(self.key_b)], *json.loads(self.further)]


class AnnotatorRow(Base):
    """A person with a secret link, of which only the hash is kept."""

    __tablename__ = "annotators"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    role: Mapped[str]
    token: Mapped[str] = mapped_column(unique=True)
    revoked: Mapped[bool] = mapped_column(default=False)


class VoteRow(Base):
    """One vote, in the pair's own A and B whatever the screen showed.

    Attributes:
        occasion: 0 for the first vote of a person on a pair, 1 for the repetition, -1 and below for the rounds of
            training.
        attempt: Number of the person's earlier votes on the same pair and occasion, all taken back. With it, the
            constraint leaves each person at most one vote that counts.
        order: Number of the order in which the screen showed the videos, see :func:`.answers.order_of`; for a pair, 1
            where B was on the left.
        watched: Seconds of one full play that the person saw; None where nobody measured it.
        full_play: Seconds that one full play of all videos takes; None where nobody measured it.
    """

    __tablename__ = "votes"
    __table_args__ = (UniqueConstraint("pair_id", "annotator_id", "occasion", "attempt"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    pair_id: Mapped[int] = mapped_column(ForeignKey("pairs.id"), index=True)
    annotator_id: Mapped[int] = mapped_column(ForeignKey("annotators.id"), index=True)
    occasion: Mapped[int]
    attempt: Mapped[int]
    review: Mapped[bool]
    choices: Mapped[str]
    scores: Mapped[str]
    flags: Mapped[str]
    order: Mapped[int] = mapped_column("swapped")
    seconds: Mapped[float]
    created: Mapped[float]
    watched: Mapped[float | None]
    full_play: Mapped[float | None]


class UndoRow(Base):
    """A vote that was taken back."""

    __tablename__ = "undone"
    vote_id: Mapped[int] = mapped_column(ForeignKey("votes.id"), primary_key=True)
    created: Mapped[float]


class HoldRow(Base):
    """The pair on an annotator's screen: while it is there, it counts as one of the votes that the pair needs.

    Attributes:
        watched: Seconds of one full play that the person saw before a vote on it was taken back.
    """

    __tablename__ = "holds"
    annotator_id: Mapped[int] = mapped_column(ForeignKey("annotators.id"), primary_key=True)
    pair_id: Mapped[int] = mapped_column(ForeignKey("pairs.id"))
    occasion: Mapped[int]
    order: Mapped[int] = mapped_column("swapped")
    ticket: Mapped[str]
    since: Mapped[float]
    watched: Mapped[float] = mapped_column(default=0.0)


def standing(*columns: Any) -> Select:
    """Query of the votes that were not taken back.

    Args:
        columns: What the query selects, of votes or of tables that are joined to it.
    """
    return select(*columns).select_from(VoteRow).outerjoin(UndoRow).where(UndoRow.vote_id.is_(None))
