"""Who takes part in a round: each person has a role, and a secret link of which the file keeps only the hash."""

import hashlib
import secrets
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from .. import VideoAlignError
from .vote_tables import AnnotatorRow, HoldRow

ROLES = ("annotator", "reviewer")


@dataclass(frozen=True)
class Annotator:
    """The person to whom a link belongs."""

    id: int
    name: str
    role: str


def invite(session: Session, name: str, role: str) -> str:
    """Add a person, or give one whose link was revoked a new link; returns the link's secret, which is not kept."""
    if role not in ROLES:
        raise VideoAlignError(f"role {role!r} is unknown; choose one of {', '.join(ROLES)}")
    if not name.strip() or not name.isprintable():
        raise VideoAlignError("an annotator needs a name, of characters that can be printed")
    token = secrets.token_urlsafe(24)
    known = session.scalar(select(AnnotatorRow).where(AnnotatorRow.name == name))
    if known is None:
        session.add(AnnotatorRow(name=name, role=role, token=_hash(token)))
    elif known.revoked and known.role == role:
        known.token, known.revoked = _hash(token), False
    else:
        raise VideoAlignError(f"there is a {name!r} already ({known.role}); revoke that link or take another name")
    return token


def revoke(session: Session, name: str) -> None:
    """Make a person's link worthless, and free the pair on the person's screen."""
    row = session.scalar(select(AnnotatorRow).where(AnnotatorRow.name == name))
    if row is None:
        raise VideoAlignError(f"there is no annotator {name!r}")
    row.revoked = True
    session.query(HoldRow).filter_by(annotator_id=row.id).delete()


def who(session: Session, token: str) -> Annotator | None:
    """The person to whom a link belongs; None for an unknown or revoked one."""
    row = session.scalar(select(AnnotatorRow).where(AnnotatorRow.token == _hash(token)))
    return Annotator(row.id, row.name, row.role) if row and not row.revoked else None


def everybody(session: Session) -> list[dict[str, Any]]:
    """All people of a round, as JSON."""
    return [
        {"id": row.id, "name": row.name, "role": row.role, "revoked": row.revoked}
        for row in session.scalars(select(AnnotatorRow))
    ]


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
