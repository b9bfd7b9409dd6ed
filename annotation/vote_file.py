"""The SQLite file of a round: transactions that are on disk when they end, and errors in words.

Whoever is told that a vote is stored has it on disk (write-ahead log, synchronous). Two processes may use the file at
once; writers wait for each other.
"""

import json
import os
import secrets
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from sqlalchemy import URL, Engine, create_engine, event, inspect
from sqlalchemy.exc import DatabaseError, OperationalError
from sqlalchemy.orm import Session, sessionmaker

from .. import VideoAlignError
from .vote_tables import UPGRADES, VERSION, Base, Meta

X = TypeVar("X")
BUSY_MS = 10_000
"""Milliseconds that a writer waits for another one."""
GONE = "was deleted or replaced while it was in use; put it back, or start the server again with the file that is meant"
REASONS = {
    "database is locked": "another program holds it; close that, or try again",
    "database or disk is full": "the disk is full; nothing of this was stored, earlier votes are",
    "attempt to write a readonly database": "the file or its folder cannot be written to",
}
"""What SQLite's messages mean to a user."""


class StorageError(VideoAlignError):
    """The file cannot be read or written.

    Args:
        path: The file.
        reason: What is wrong with it, in words that do not name it.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.reason = reason


class VoteFile:
    """An existing file of votes.

    Args:
        path: The file; :func:`.store.new_round` makes one.

    Raises:
        VideoAlignError: The file is missing, is no file of votes, or has another version.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise VideoAlignError(f"--db {path}: there is no such file; `videoalign annotate begin` makes one")
        self.path = path
        self._identity = _identity(path)
        # writers take the file's lock at once, so that what they read stays true; readers wait for nobody
        self.engine, self._reading = (_open(path, begin) for begin in ("BEGIN IMMEDIATE", "BEGIN"))
        self._writers, self._readers = (sessionmaker(e, expire_on_commit=False) for e in (self.engine, self._reading))
        version = self.read(_version)
        if not version:
            raise VideoAlignError(f"--db {path} is no file of annotations; `videoalign annotate begin` makes one")
        if version.isdecimal() and int(version) in UPGRADES:
            version = self.write(_upgrade)
        if version != json.dumps(VERSION):
            raise VideoAlignError(f"--db {path} is of version {version}, this release reads {VERSION}")

    def write(self, work: Callable[[Session], X]) -> X:
        """Run a transaction that writes. When this returns, its changes are in the file that is at the path."""
        self._check_in_place()
        with _errors(self.path):
            with self._writers.begin() as session:
                log = session.connection().info["log"]
                result = work(session)
            self._check_in_place()
            if _identity(_log(self.path)) != log:
                raise StorageError(self.path, f"{_log(self.path).name} beside it {GONE}")
        return result

    def read(self, work: Callable[[Session], X]) -> X:
        """Run a transaction that only reads."""
        self._check_in_place()
        with _errors(self.path), self._readers.begin() as session:
            return work(session)

    def close(self) -> None:
        """Release the file; the log beside it is merged into it."""
        self.engine.dispose()
        self._reading.dispose()

    def _check_in_place(self) -> None:
        """Refuse to go on in a file that nobody will find again: SQLite writes on into one that was deleted."""
        if _identity(self.path) != self._identity:
            raise StorageError(self.path, f"the file of votes {GONE}")


def check_new(path: str | Path) -> None:
    """Refuse a path at which no new file of votes can be made."""
    path = Path(path)
    if not path.parent.is_dir():
        raise VideoAlignError(f"--db {path}: there is no folder {path.parent}")
    if path.exists():
        raise VideoAlignError(f"--db {path} exists already; name a new file")
    for log in (_log(path), path.with_name(f"{path.name}-shm")):
        if log.exists():  # SQLite would read the old round out of it into the new file
            raise VideoAlignError(
                f"--db {path}: {log.name} is left of a file of that name that was removed; remove it too, "
                "or name a new file"
            )


@contextmanager
def new_vote_file(path: Path, fill: Callable[[Session], None]) -> Iterator[Path]:
    """Make a file of votes; it appears at its path when the block has ended without an error.

    Args:
        path: The file to make.
        fill: Writes the first rows.

    Yields:
        The path of the unfinished file.

    Raises:
        VideoAlignError: There is a file at the path already, or one appears meanwhile.
    """
    check_new(path)
    unfinished = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        engine = _open(unfinished, "BEGIN IMMEDIATE", make=True)
        with _errors(unfinished), engine.begin() as connection, Session(connection) as session:
            Base.metadata.create_all(connection)
            fill(session)
            session.flush()
        engine.dispose()
        yield unfinished
        check_new(path)
        os.link(unfinished, path)  # unlike a renaming, it never takes the place of another file
    except FileExistsError:
        check_new(path)
        raise
    finally:
        for end in ("", "-wal", "-shm"):
            unfinished.with_name(unfinished.name + end).unlink(missing_ok=True)


def _version(session: Session) -> str | None:
    """The version that a file names, as JSON; None where it names none."""
    if not inspect(session.connection()).has_table(Meta.__tablename__):
        return None
    row = session.get(Meta, "version")
    return row.value if row else None


def _upgrade(session: Session) -> str:
    """Bring the tables of an earlier release to this one's; returns the version that the file then has, as JSON."""
    row = session.get_one(Meta, "version")  # read again: another process may have been faster
    for version in range(int(row.value), VERSION):
        for statement in UPGRADES[version]:
            session.connection().exec_driver_sql(statement)
    row.value = json.dumps(VERSION)
    return row.value


def _open(path: Path, begin: str, make: bool = False) -> Engine:
    """SQLAlchemy's engine of a file.

    Args:
        path: The file.
        begin: Statement that starts a transaction.
        make: Whether to make the file where there is none.
    """
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
    """The write-ahead log, where SQLite keeps what it has not yet written into the file itself."""
    return path.with_name(f"{path.name}-wal")


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of the file at a path; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    """Raise SQLite's errors as :class:`StorageError`."""
    try:
        yield
    except OperationalError as error:
        text = str(error.orig)
        raise StorageError(path, f"{text}: {REASONS[text]}" if text in REASONS else text) from None
    except DatabaseError as error:
        raise StorageError(path, str(error.orig)) from None
