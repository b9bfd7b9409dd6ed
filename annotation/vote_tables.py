"""The tables of a file of votes.

Votes are only ever added: taking one back is another row. What a pair's votes decide stands beside the pair, so that
nobody has to read all votes to know what is left.
"""

from typing import Any

from sqlalchemy import ForeignKey, Index, Select, UniqueConstraint, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

VERSION = 1
"""Version of the tables, which the file names in its ``meta``."""


class Base(DeclarativeBase):
    """What SQLAlchemy collects the tables in."""


class Meta(Base):
    """Facts about the round, by name, as JSON."""

    __tablename__ = "meta"
    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]


class PairRow(Base):
    """A pair to rate.

    Attributes:
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
    __table_args__ = (Index("whats_next", "state", votes.desc(), "priority"),)


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
        swapped: Whether the screen showed B on the left.
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
    swapped: Mapped[bool]
    seconds: Mapped[float]
    created: Mapped[float]


class UndoRow(Base):
    """A vote that was taken back."""

    __tablename__ = "undone"
    vote_id: Mapped[int] = mapped_column(ForeignKey("votes.id"), primary_key=True)
    created: Mapped[float]


class HoldRow(Base):
    """The pair on an annotator's screen: while it is there, it counts as one of the votes that the pair needs."""

    __tablename__ = "holds"
    annotator_id: Mapped[int] = mapped_column(ForeignKey("annotators.id"), primary_key=True)
    pair_id: Mapped[int] = mapped_column(ForeignKey("pairs.id"))
    occasion: Mapped[int]
    swapped: Mapped[bool]
    ticket: Mapped[str]
    since: Mapped[float]


def standing(*columns: Any) -> Select:
    """Query of the votes that were not taken back.

    Args:
        columns: What the query selects, of votes or of tables that are joined to it.
    """
    return select(*columns).select_from(VoteRow).outerjoin(UndoRow).where(UndoRow.vote_id.is_(None))
