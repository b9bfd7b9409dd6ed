"""Everything that annotators said, in one SQLite file: votes are only ever added, each in a transaction of its own.

Whoever gets an answer to a vote has it on disk (write-ahead log, synchronous). No vote is changed or removed: taking one back is
another row. What follows from a pair's votes is written beside the pair in the same transaction, so that nobody has to read all votes
to know what is left. Two processes may use the file at once; writers wait for each other.
"""

import hashlib
import json
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from sqlalchemy import URL, Engine, ForeignKey, Index, UniqueConstraint, create_engine, event, func, inspect, select
from sqlalchemy.exc import DatabaseError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from .. import VideoAlignError
from ..models.dimensions import DIMENSIONS
from .pairing import Pair
from .protocol import CHOICES, OTHER, Decision, RatingProtocol, Vote, decide, flipped

X = TypeVar("X")
VERSION, BUSY_MS = 1, 10_000
"""Of the file; and milliseconds that a writer waits for another one."""
ROLES = ("annotator", "reviewer")
GONE = "was deleted or replaced while it was in use; put it back, or start the server again with the file that is meant"


class _Base(DeclarativeBase):
    pass


class Meta(_Base):
    """Facts about the round, by name, as JSON."""

    __tablename__ = "meta"
    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]


class PairRow(_Base):
    """A pair to rate.

    ``priority``: lowest first. ``reference``: the right choices of a training pair, as JSON. ``state``: of the :class:`Decision` on its
    votes, or ``training``; ``votes``: how many independent ones stand. Both follow from the votes (:func:`_settle`).
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


class AnnotatorRow(_Base):
    """A person with a secret link, of which only the hash is kept."""

    __tablename__ = "annotators"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    role: Mapped[str]
    token: Mapped[str] = mapped_column(unique=True)
    revoked: Mapped[bool] = mapped_column(default=False)


class VoteRow(_Base):
    """One vote, in the pair's own A and B. ``occasion``: 0 the first time, 1 for a repetition, -1 and below in training.

    ``attempt`` counts the votes that were taken back before: so one person has at most one standing vote on a pair.
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


class UndoRow(_Base):
    """A vote that was taken back."""

    __tablename__ = "undone"
    vote_id: Mapped[int] = mapped_column(ForeignKey("votes.id"), primary_key=True)
    created: Mapped[float]


class HoldRow(_Base):
    """The pair that an annotator has on the screen: nobody else gets it beyond the votes that are wanted."""

    __tablename__ = "holds"
    annotator_id: Mapped[int] = mapped_column(ForeignKey("annotators.id"), primary_key=True)
    pair_id: Mapped[int] = mapped_column(ForeignKey("pairs.id"))
    occasion: Mapped[int]
    swapped: Mapped[bool]
    ticket: Mapped[str]
    since: Mapped[float]


@dataclass(frozen=True)
class Annotator:
    """Who is at the page."""

    id: int
    name: str
    role: str


@dataclass(frozen=True)
class Task:
    """A pair on somebody's screen.

    Attributes:
        left, right: keys of the videos as they are shown. ticket: what a vote on it must bring along.
        kind: ``training``, ``work`` or ``review``.
    """

    pair_id: int
    prompt: str
    left: str
    right: str
    ticket: str
    kind: str


def _open(path: Path, begin: str, make: bool = False) -> Engine:
    """A way into a file, with the statement that starts a transaction; ``make``: a file that is not there."""
    # SQLite would make a file in the place of one that was removed while the server ran
    mode = {"mode": "rwc" if make else "rw", "uri": "true"}
    engine = create_engine(URL.create("sqlite", database=f"file:{quote(str(path.absolute()))}", query=mode))

    def prepare(connection: sqlite3.Connection, record: Any) -> None:
        connection.isolation_level = None  # the "begin" below says when
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", f"busy_timeout={BUSY_MS}"):
            connection.execute(f"PRAGMA {pragma}")
        connection.execute("SELECT count(*) FROM sqlite_master")  # opens the log
        record.info["log"] = _identity(_log(path))

    event.listen(engine, "connect", prepare)
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(begin))
    return engine


def _log(path: Path) -> Path:
    """Where SQLite keeps what it has not yet written into the file itself."""
    return path.with_name(f"{path.name}-wal")


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file is at a place; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    """SQLite's errors as ours."""
    try:
        yield
    except OperationalError as error:
        text = str(error.orig)
        why = {
            "database is locked": "another program holds it; close that, or try again",
            "database or disk is full": "the disk is full; nothing of this was stored, earlier votes are",
            "attempt to write a readonly database": "the file or its folder cannot be written to",
        }.get(text, "")
        raise StorageError(path, text + (f": {why}" if why else "")) from None
    except DatabaseError as error:
        raise StorageError(path, str(error.orig)) from None


class Store:
    """The file.

    Args:
        path: of it; :func:`new_round` makes one.

    Raises:
        VideoAlignError: where it is no such file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise VideoAlignError(f"--db {path}: there is no such file; `videoalign annotate begin` makes one")
        self._identity = _identity(self.path)
        # by annotator: the ticket on the screen, and since when by a clock that nobody sets
        self._shown: dict[int, tuple[str, float]] = {}
        # writers take the file's lock at once, so that what they read stays true; readers wait for nobody
        self.engine, self._reading = (_open(self.path, how) for how in ("BEGIN IMMEDIATE", "BEGIN"))
        self._writers, self._readers = (sessionmaker(e, expire_on_commit=False) for e in (self.engine, self._reading))
        known = self._see(
            lambda session: (
                inspect(session.connection()).has_table(Meta.__tablename__)
                and (row := session.get(Meta, "version"))
                and row.value
            )
        )
        if not known:
            raise VideoAlignError(f"--db {path} is no file of annotations; `videoalign annotate begin` makes one")
        if known != json.dumps(VERSION):
            raise VideoAlignError(f"--db {path} is of version {known}, this release reads {VERSION}")

    def close(self) -> None:
        """Let go of the file; what is in the log beside it joins it."""
        self.engine.dispose()
        self._reading.dispose()

    def _do(self, work: Callable[[Session], X]) -> X:
        """One transaction that writes; what it returns is in the file that is at its place."""
        self._in_place()
        with _errors(self.path):
            with self._writers.begin() as session:
                log = session.connection().info["log"]
                found = work(session)
            self._in_place()
            if _identity(_log(self.path)) != log:
                raise StorageError(self.path, f"{_log(self.path).name} beside it {GONE}")
        return found

    def _see(self, work: Callable[[Session], X]) -> X:
        """One that reads."""
        self._in_place()
        with _errors(self.path), self._readers.begin() as session:
            return work(session)

    def _in_place(self) -> None:
        """Refuse to go on in a file that nobody will find again: SQLite writes on into one that was deleted."""
        if _identity(self.path) != self._identity:
            raise StorageError(self.path, f"the file of votes {GONE}")

    def _seconds(self, hold: "HoldRow") -> float:
        """How long a pair has been on a screen, whatever was done to the clock."""
        ticket, since = self._shown.pop(hold.annotator_id, ("", 0.0))
        # shown before this process began: by the clock of the wall
        return time.monotonic() - since if ticket == hold.ticket else max(0.0, time.time() - hold.since)

    # --- the round ------------------------------------------------------------------------------------------------

    def fact(self, name: str) -> Any:
        """A fact about the round."""
        return json.loads(self._see(lambda session: session.get_one(Meta, name).value))

    @cached_property
    def protocol(self) -> RatingProtocol:
        """The round's rules."""
        return RatingProtocol.of(self.fact("protocol"))

    def prioritise(self, order: Sequence[int]) -> None:
        """Show these pairs, by id, in this order and before all others."""

        def work(session: Session) -> None:
            first = session.scalar(select(func.min(PairRow.priority))) - len(order)
            for place, pair_id in enumerate(order, first):
                session.get_one(PairRow, pair_id).priority = place

        self._do(work)

    # --- people ---------------------------------------------------------------------------------------------------

    def invite(self, name: str, role: str = "annotator") -> str:
        """Add a person, or give somebody whose link was revoked a new one; returns the secret of the link, which is not kept."""
        if role not in ROLES:
            raise VideoAlignError(f"role {role!r} is unknown; choose one of {', '.join(ROLES)}")
        if not name.strip():
            raise VideoAlignError("an annotator needs a name")
        token = secrets.token_urlsafe(24)

        def work(session: Session) -> None:
            known = session.scalar(select(AnnotatorRow).where(AnnotatorRow.name == name))
            if known is None:
                session.add(AnnotatorRow(name=name, role=role, token=_hash(token)))
            elif known.revoked and known.role == role:
                known.token, known.revoked = _hash(token), False
            else:
                raise VideoAlignError(
                    f"there is a {name!r} already ({known.role}); revoke that link or take another name"
                )

        self._do(work)
        return token

    def revoke(self, name: str) -> None:
        """Make a person's link worthless; what the person said stays."""

        def work(session: Session) -> None:
            row = session.scalar(select(AnnotatorRow).where(AnnotatorRow.name == name))
            if row is None:
                raise VideoAlignError(f"there is no annotator {name!r}")
            row.revoked = True
            session.query(HoldRow).filter_by(annotator_id=row.id).delete()

        self._do(work)

    def who(self, token: str) -> Annotator | None:
        """Whose link this is; None for an unknown or revoked one."""

        def work(session: Session) -> Annotator | None:
            row = session.scalar(select(AnnotatorRow).where(AnnotatorRow.token == _hash(token)))
            return Annotator(row.id, row.name, row.role) if row and not row.revoked else None

        return self._see(work)

    # --- rating ---------------------------------------------------------------------------------------------------

    def task(self, annotator: Annotator) -> Task | None:
        """The pair that this person sees now: the one on the screen, or the next one; None where there is nothing to do."""
        if on_screen := self.shown(annotator):
            return on_screen
        protocol = self.protocol

        def work(session: Session) -> Task | None:
            hold = session.get(HoldRow, annotator.id)  # another window may have been faster
            if hold is None:
                chosen = _next(session, annotator, protocol)
                if chosen is None:
                    return None
                pair_id, occasion = chosen
                hold = HoldRow(
                    annotator_id=annotator.id,
                    pair_id=pair_id,
                    occasion=occasion,
                    ticket=secrets.token_urlsafe(12),
                    swapped=_swapped(annotator.id, pair_id, occasion),
                    since=time.time(),
                )
                session.add(hold)
                self._shown[annotator.id] = hold.ticket, time.monotonic()
            return _task(session, hold, annotator)

        return self._do(work)

    def shown(self, annotator: Annotator) -> Task | None:
        """The pair on this person's screen, if there is one."""

        def work(session: Session) -> Task | None:
            hold = session.get(HoldRow, annotator.id)
            return _task(session, hold, annotator) if hold else None

        return self._see(work)

    def vote(
        self,
        annotator: Annotator,
        ticket: str,
        choices: dict[str, str],
        scores: dict[str, dict[str, int]] | None = None,
        flags: Sequence[str] = (),
    ) -> dict[str, str] | None:
        """Store a vote on the pair on the person's screen.

        Args:
            ticket: of the task. choices, scores: as the screen shows it, its left video being A.
            flags: of ``unsafe`` and ``broken``; with one of them choices may be missing.

        Returns:
            In the training round the right choices, as the screen shows it; otherwise None.

        Raises:
            RefusedVote: where it is no vote on that pair.
        """
        protocol = self.protocol
        _check(choices, scores or {}, flags, protocol)

        def work(session: Session) -> dict[str, str] | None:
            hold = session.get(HoldRow, annotator.id)
            if hold is None or hold.ticket != ticket:
                raise RefusedVote(
                    "this pair is not on your screen any more: it was rated already, or in another window"
                )
            row = session.get_one(PairRow, hold.pair_id)
            said, rated = (flipped(choices), _flipped_scores(scores or {})) if hold.swapped else (choices, scores or {})
            attempt = session.scalar(
                select(func.count())
                .select_from(VoteRow)
                .where(
                    VoteRow.pair_id == row.id, VoteRow.annotator_id == annotator.id, VoteRow.occasion == hold.occasion
                )
            )
            session.add(
                VoteRow(
                    pair_id=row.id,
                    annotator_id=annotator.id,
                    occasion=hold.occasion,
                    attempt=attempt,
                    review=annotator.role == "reviewer",
                    choices=json.dumps(said),
                    scores=json.dumps(rated),
                    flags=json.dumps(sorted({*flags})),
                    swapped=hold.swapped,
                    seconds=self._seconds(hold),
                    created=_now(session),
                )
            )
            session.delete(hold)
            _settle(session, [row], protocol)
            if row.reference:
                reference = json.loads(row.reference)
                return flipped(reference) if hold.swapped else reference
            return None

        return self._do(work)

    def bring_in(self, votes: dict[int, Sequence[tuple[str, dict[str, str], Sequence[str], float]]]) -> int:
        """Add votes that were collected elsewhere, all or none; returns how many.

        Args:
            votes: by pair, of (name, choices in the pair's own sides, flags, seconds). A person's second vote on a pair takes the
                place of the first, as after an undo.
        """

        def work(session: Session) -> int:
            people = {row.name: row for row in session.scalars(select(AnnotatorRow))}
            count = 0
            for pair_id, said in votes.items():
                last: dict[str, VoteRow] = {}
                # a reviewer decides on what the others said, in whatever order the file has them
                for name, choices, flags, seconds in sorted(said, key=lambda one: people[one[0]].role == "reviewer"):
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
                        swapped=False,
                        seconds=seconds,
                        created=_now(session),
                    )
                    session.add(row)
                    session.flush()
                    last[name] = row
                    count += 1
            _settle(session, [session.get_one(PairRow, pair_id) for pair_id in votes], self.protocol)
            return count

        return self._do(work)

    def undo(self, annotator: Annotator) -> bool:
        """Take the person's last standing vote back, and show its pair again; whether there was one.

        Raises:
            RefusedVote: where a reviewer has decided that pair since: that vote is final.
        """

        def work(session: Session) -> bool:
            row = session.scalar(
                select(VoteRow)
                .outerjoin(UndoRow)
                .where(
                    VoteRow.annotator_id == annotator.id, UndoRow.vote_id.is_(None), VoteRow.occasion >= 0
                )  # training showed its answer
                .order_by(VoteRow.id.desc())
                .limit(1)
            )
            if row is None:
                return False
            if (
                not row.review
                and row.occasion == 0
                and any(vote.review for vote in _standing(session, 0, row.pair_id).get(row.pair_id, []))
            ):
                raise RefusedVote("a reviewer has decided on your last pair; it stays")
            session.add(UndoRow(vote_id=row.id, created=time.time()))
            _settle(session, [session.get_one(PairRow, row.pair_id)], self.protocol)
            session.query(HoldRow).filter_by(annotator_id=annotator.id).delete()
            hold = HoldRow(
                annotator_id=annotator.id,
                pair_id=row.pair_id,
                occasion=row.occasion,
                swapped=row.swapped,
                ticket=secrets.token_urlsafe(12),
                since=time.time(),
            )
            session.add(hold)
            self._shown[annotator.id] = hold.ticket, time.monotonic()
            return True

        return self._do(work)

    def progress(self, annotator: Annotator) -> dict[str, Any]:
        """Standing votes of a person, those of the last hour, and what is left for everybody."""

        def work(session: Session) -> dict[str, Any]:
            mine = session.scalars(
                select(VoteRow.created)
                .outerjoin(UndoRow)
                .where(VoteRow.annotator_id == annotator.id, UndoRow.vote_id.is_(None), VoteRow.occasion >= 0)
            ).all()
            states = dict(session.execute(select(PairRow.state, func.count()).group_by(PairRow.state)).tuples().all())
            states.pop("training", None)
            now = time.time()
            return {
                "mine": len(mine),
                "last_hour": sum(now - 3600 < c <= now for c in mine),
                "pairs": sum(states.values()),
                "open": states.get("open", 0),
                "review": states.get("review", 0),
            }

        return self._see(work)

    # --- what is known --------------------------------------------------------------------------------------------

    def pairs(self) -> list[PairRow]:
        """All pairs, training ones too."""
        return self._see(_pairs)

    def votes(self, occasion: int = 0) -> dict[int, list[Vote]]:
        """Standing votes by pair."""
        return self._see(lambda session: _standing(session, occasion))

    def decisions(self) -> dict[int, Decision]:
        """What stands of each pair of real work."""
        return self.round().decisions

    def round(self) -> "Round":
        """Everything, as it stands at one moment."""

        def work(session: Session) -> Round:
            pairs = [row for row in _pairs(session) if row.reference is None]
            votes, again = _standing(session, 0), _standing(session, 1)
            decisions = {row.id: decide(votes.get(row.id, []), self.protocol, again.get(row.id, [])) for row in pairs}
            return Round(self.protocol, pairs, _people(session), votes, again, decisions, _history(session))

        return self._see(work)


@dataclass(frozen=True)
class Round:
    """A round of annotation at one moment.

    Attributes:
        pairs: of real work. people: with roles. votes, again: standing ones by pair, and those on repetitions. decisions: by pair.
        history: every vote that ever came, in training and taken back too, as JSON.
    """

    protocol: RatingProtocol
    pairs: list[PairRow]
    people: list[dict[str, Any]]
    votes: dict[int, list[Vote]]
    again: dict[int, list[Vote]]
    decisions: dict[int, Decision]
    history: list[dict[str, Any]]


class StorageError(VideoAlignError):
    """The file cannot be read or written.

    Args:
        path: of the file. reason: what the matter is, without it.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.reason = reason


class RefusedVote(VideoAlignError):
    """What was sent is no vote on the pair on the screen."""


def check_new(path: str | Path) -> None:
    """Refuse a place at which no round can begin."""
    path = Path(path)
    if not path.parent.is_dir():
        raise VideoAlignError(f"--db {path}: there is no folder {path.parent}")
    if path.exists():
        raise VideoAlignError(f"--db {path} exists already; name a new file")
    for log in (path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")):
        if log.exists():  # SQLite would read the old round out of it into the new file
            raise VideoAlignError(
                f"--db {path}: {log.name} is left of a file of that name that was removed; remove it too, or name a new file"
            )


@contextmanager
def new_round(
    path: str | Path,
    pairs: Sequence[Pair],
    protocol: RatingProtocol,
    data: str,
    references: Sequence[tuple[Pair, dict[str, str]]] = (),
) -> Iterator[Store]:
    """A round in a new file, which is at its place when the block has ended without an error.

    Args:
        pairs: to rate, the first ones first. data: sha256 of the index of the videos. references: training pairs with their right
            choices.

    Raises:
        VideoAlignError: where there is a file already.
    """
    path = Path(path)
    check_new(path)
    half = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        _fill(half, pairs, protocol, data, references)
        store = Store(half)
        yield store
        store.close()
        check_new(path)
        os.link(half, path)  # unlike a renaming, it never takes the place of another file
    except FileExistsError:
        check_new(path)
        raise
    finally:
        for end in ("", "-wal", "-shm"):
            half.with_name(half.name + end).unlink(missing_ok=True)


def _fill(
    path: Path,
    pairs: Sequence[Pair],
    protocol: RatingProtocol,
    data: str,
    references: Sequence[tuple[Pair, dict[str, str]]],
) -> None:
    """A file with nothing voted on."""
    engine = _open(path, "BEGIN IMMEDIATE", make=True)
    with _errors(path), engine.begin() as connection, Session(connection) as session:
        _Base.metadata.create_all(connection)
        for name, value in {"version": VERSION, "protocol": protocol.to_dict(), "data": data}.items():
            session.add(Meta(name=name, value=json.dumps(value)))
        for place, (pair, reference) in enumerate([*references, *((pair, None) for pair in pairs)]):
            session.add(
                PairRow(
                    prompt=pair.prompt,
                    key_a=pair.keys[0],
                    key_b=pair.keys[1],
                    source_a=pair.sources[0],
                    source_b=pair.sources[1],
                    split="training round" if reference else pair.split,
                    priority=place,
                    state="training" if reference else "open",
                    reference=json.dumps(reference) if reference else None,
                )
            )
        session.flush()
    engine.dispose()


def _check(choices: Any, scores: Any, flags: Any, protocol: RatingProtocol) -> None:
    """Refuse what no page of ours sends."""
    if not set(flags) <= {"unsafe", "broken"}:
        raise RefusedVote(f"flags {sorted(flags)} are unknown; they are unsafe and broken")
    if (
        not isinstance(choices, dict)
        or not choices.keys() <= {*protocol.columns}
        or not {*choices.values()} <= {*CHOICES}
    ):
        raise RefusedVote(f"choices must name {', '.join(protocol.columns)}, each A, same or B")
    if not flags and choices.keys() != {*protocol.columns}:
        raise RefusedVote(f"choices in {', '.join(c for c in protocol.columns if c not in choices)} are missing")
    rows = scores.values() if isinstance(scores, dict) else [None]
    good = all(
        isinstance(row, dict)
        and row.keys() <= {*DIMENSIONS}
        and all(type(v) is int and 1 <= v <= 5 for v in row.values())
        for row in rows
    )
    if not good or not set(scores) <= {"A", "B"}:
        raise RefusedVote("scores must be whole numbers from 1 to 5, by video and dimension")


def _pairs(session: Session) -> list[PairRow]:
    return list(session.scalars(select(PairRow).order_by(PairRow.id)))


def _people(session: Session) -> list[dict[str, Any]]:
    return [
        {"id": r.id, "name": r.name, "role": r.role, "revoked": r.revoked}
        for r in session.scalars(select(AnnotatorRow))
    ]


def _history(session: Session) -> list[dict[str, Any]]:
    query = select(VoteRow, PairRow, UndoRow.created).join(PairRow).outerjoin(UndoRow).order_by(VoteRow.id)
    return [
        {
            "pair": row.pair_id,
            "keys": {"A": pair.key_a, "B": pair.key_b},
            "split": pair.split,
            "annotator": row.annotator_id,
            "occasion": row.occasion,
            "review": row.review,
            "choices": json.loads(row.choices),
            "scores": json.loads(row.scores),
            "flags": json.loads(row.flags),
            "swapped": row.swapped,
            "seconds": round(row.seconds, 2),
            "created": row.created,
            "taken_back": undone,
        }
        for row, pair, undone in session.execute(query)
    ]


def _task(session: Session, hold: HoldRow, annotator: Annotator) -> Task:
    row = session.get_one(PairRow, hold.pair_id)
    keys = (row.key_b, row.key_a) if hold.swapped else (row.key_a, row.key_b)
    kind = "training" if row.reference else "review" if annotator.role == "reviewer" else "work"
    return Task(row.id, row.prompt, *keys, hold.ticket, kind)


def _flipped_scores(scores: dict[str, Any]) -> dict[str, Any]:
    return {OTHER[side]: row for side, row in scores.items()}


def _swapped(annotator: int, pair: int, occasion: int) -> bool:
    """Whether B is shown on the left: by a draw for person and pair, and the other way round in a repetition."""
    drawn = bool(hashlib.sha256(f"{annotator} {pair} side".encode()).digest()[0] & 1)
    return drawn ^ (occasion % 2 == 1)


def _settle(session: Session, rows: Iterable[PairRow], protocol: RatingProtocol) -> None:
    """Write beside pairs what their votes decide; training decides nothing."""
    session.flush()
    for row in rows:
        if not row.reference:
            votes, again = (_standing(session, occasion, row.id).get(row.id, []) for occasion in (0, 1))
            row.state, row.votes = decide(votes, protocol, again).state, sum(not vote.review for vote in votes)


def _next(session: Session, annotator: Annotator, protocol: RatingProtocol) -> tuple[int, int] | None:
    """The next pair of a person and its occasion."""
    own = session.execute(
        select(VoteRow.pair_id, VoteRow.occasion, VoteRow.choices, PairRow.state)
        .join(PairRow)
        .outerjoin(UndoRow)
        .where(VoteRow.annotator_id == annotator.id, UndoRow.vote_id.is_(None))
        .order_by(VoteRow.id)
    ).all()
    now = time.time()
    session.query(HoldRow).filter(HoldRow.since > now).update({"since": now})  # the clock was set back: they count anew
    session.query(HoldRow).filter(HoldRow.since < now - 60 * protocol.hold_minutes).delete()
    held = select(func.count()).where(HoldRow.pair_id == PairRow.id, HoldRow.occasion == 0).scalar_subquery()
    if annotator.role == "reviewer":
        waiting = select(PairRow.id).where(PairRow.state == "review", held == 0)
        first = session.scalar(waiting.order_by(PairRow.priority).limit(1))
        return None if first is None else (first, 0)
    training = session.scalars(select(PairRow).where(PairRow.state == "training").order_by(PairRow.priority)).all()
    if found := _training(own, training, protocol) or _repetition(own, annotator, protocol):
        return found
    mine = (
        select(VoteRow.id)
        .outerjoin(UndoRow)
        .where(
            VoteRow.pair_id == PairRow.id,
            VoteRow.annotator_id == annotator.id,
            VoteRow.occasion == 0,
            UndoRow.vote_id.is_(None),
        )
    )
    wanted = select(PairRow.id).where(PairRow.state == "open", PairRow.votes + held < protocol.votes, ~mine.exists())
    first = session.scalar(
        wanted.order_by(PairRow.votes.desc(), PairRow.priority).limit(1)
    )  # what others began is finished first
    return None if first is None else (first, 0)


def _training(own: Sequence[Any], rows: Sequence[PairRow], protocol: RatingProtocol) -> tuple[int, int] | None:
    """The next training pair: rounds over all of them until one was passed. Occasions -1, -2, ... number the rounds."""
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


def _repetition(own: Sequence[Any], annotator: Annotator, protocol: RatingProtocol) -> tuple[int, int] | None:
    """Now and then a pair that the person rated a while ago."""
    done = [vote.pair_id for vote in own if vote.occasion == 0]
    repeated = {vote.pair_id for vote in own if vote.occasion == 1}
    dropped = {vote.pair_id for vote in own if vote.state in ("unsafe", "broken")}  # nobody sees those twice
    candidates = [pair for pair in done[: -protocol.repeat_after] if pair not in repeated | dropped]
    if not candidates or len(repeated) + 1 > protocol.repeats * (len(done) + len(repeated) + 1):
        return None
    drawn = hashlib.sha256(f"{annotator.id} {len(done)} again".encode()).digest()
    return candidates[int.from_bytes(drawn[:4]) % len(candidates)], 1


def _now(session: Session) -> float:
    """Seconds since 1970, later than those of the last vote: their order is that of the votes, also where the clock was set back."""
    last = session.scalar(select(VoteRow.created).order_by(VoteRow.id.desc()).limit(1))
    return max(time.time(), (last or 0.0) + 1e-6)


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _standing(session: Session, occasion: int, pair_id: int | None = None) -> dict[int, list[Vote]]:
    """Votes that were not taken back, of one pair or by pair, in the order in which they came."""
    found: dict[int, list[Vote]] = {}
    query = (
        select(VoteRow, AnnotatorRow.name)
        .join(AnnotatorRow)
        .outerjoin(UndoRow)
        .where(VoteRow.occasion == occasion, UndoRow.vote_id.is_(None))
        .order_by(VoteRow.id)
    )
    if pair_id is not None:
        query = query.where(VoteRow.pair_id == pair_id)
    for row, name in session.execute(query):
        found.setdefault(row.pair_id, []).append(_vote(row, name))
    return found


def _vote(row: VoteRow, name: str) -> Vote:
    return Vote(
        name,
        json.loads(row.choices),
        json.loads(row.scores),
        tuple(json.loads(row.flags)),
        row.review,
        row.seconds,
        row.created,
    )
