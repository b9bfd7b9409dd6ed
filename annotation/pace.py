"""How long a round will take at the present pace."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from .protocol import Vote
from .rounds import Round

ACTIVE = 600.0
"""Seconds since the last vote after which a person counts as gone."""
RECENT = 20
"""Number of a person's latest votes that tell the pace."""


def votes_needed(round_: Round) -> int:
    """Number of independent votes that open pairs still need; what reviewers decide is not among them."""
    return sum(
        max(0, round_.protocol.votes - sum(not vote.review for vote in round_.votes.get(row.id, [])))
        for row in round_.pairs
        if round_.decisions[row.id].state == "open"
    )


def seconds_left(history: Sequence[Mapping[str, Any]], needed: int, now: float) -> float | None:
    """Seconds until the needed votes have come, at the pace of those who vote now; None where nobody does.

    A person's pace is the median time between two of the latest votes, which no pause and no hurried minute changes
    much. People vote at the same time, so their paces add up.

    Args:
        history: Every vote that came, with ``annotator``, ``created`` (in seconds since 1970), ``occasion``,
            ``review`` and ``watched``, in the order in which they came. Those without ``watched`` came from elsewhere,
            such as an import, and have no pace.
        needed: Number of votes.
        now: The time, in seconds since 1970.
    """
    if not needed:
        return 0.0
    times: dict[Any, list[float]] = {}
    for vote in history:
        if not vote["review"] and vote["occasion"] >= 0 and vote["watched"] is not None:
            times.setdefault(vote["annotator"], []).append(vote["created"])
    votes_per_second = 0.0
    for created in times.values():
        latest = created[-RECENT:]
        gaps = [b - a for a, b in pairwise(latest)]
        if len(gaps) >= 2 and now - latest[-1] <= ACTIVE and (gap := median(gaps)) > 0:
            votes_per_second += 1 / gap
    return needed / votes_per_second if votes_per_second else None


def fast_share(votes: Sequence[Vote]) -> float | None:
    """Share of votes that came before one full play; None where nobody measured it.

    Args:
        votes: Votes of a person; those with flags are left out.
    """
    measured = [vote for vote in votes if vote.watched is not None and not vote.flags]
    return sum(vote.is_fast for vote in measured) / len(measured) if measured else None
