"""How far a person is: what is done of what is assigned to the person.

Training rounds are counted for themselves, one after the other. Hidden repetitions count as work, done and to come:
a count that did not move on one would give it away.
"""

import time
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from .assignment import next_training, open_to, own_votes, repetition_is_due, training_pairs
from .people import Annotator
from .protocol import RatingProtocol
from .vote_tables import PairRow, VoteRow, standing


def progress(session: Session, annotator: Annotator, protocol: RatingProtocol) -> dict[str, Any]:
    """How far a person and the round are; see :meth:`.store.Store.progress`."""
    mine = standing(VoteRow.created).where(VoteRow.annotator_id == annotator.id, VoteRow.occasion >= 0)
    created = session.scalars(mine).all()
    states = dict(session.execute(select(PairRow.state, func.count()).group_by(PairRow.state)).tuples().all())
    states.pop("training", None)
    now = time.time()
    return {
        **_own(session, annotator, protocol, len(created), states.get("review", 0)),
        "mine": len(created),
        "last_hour": sum(now - 3600 < when <= now for when in created),
        "pairs": sum(states.values()),
        "open": states.get("open", 0),
        "review": states.get("review", 0),
    }


def _own(session: Session, annotator: Annotator, protocol: RatingProtocol, mine: int, disputed: int) -> dict[str, Any]:
    """Kind of what is counted, number that is done, and number of all; in training, also that of the round."""
    if annotator.role == "reviewer":
        return {"kind": "review", "done": mine, "total": mine + disputed}
    own, training = own_votes(session, annotator), training_pairs(session)
    if found := next_training(own, training, protocol):
        occasion = found[1]
        done = sum(vote.occasion == occasion for vote in own)
        return {"kind": "training", "done": done, "total": len(training), "round": -occasion}
    left = session.scalar(select(func.count()).select_from(open_to(annotator).subquery()))
    rated = sum(vote.occasion == 0 for vote in own)
    return {"kind": "work", "done": mine, "total": mine + left + _repetitions(rated, mine - rated, left, protocol)}


def _repetitions(rated: int, repeated: int, left: int, protocol: RatingProtocol) -> int:
    """Number of hidden repetitions to come.

    Args:
        rated: Number of the person's first votes.
        repeated: Number of the person's votes on repetitions.
        left: Number of pairs that are left to rate.
        protocol: Says how many of the votes are repetitions.
    """
    count = 0
    while True:
        if rated - protocol.repeat_after > repeated and repetition_is_due(rated, repeated, protocol):
            repeated, count = repeated + 1, count + 1
        elif left:
            rated, left = rated + 1, left - 1
        else:
            return count
