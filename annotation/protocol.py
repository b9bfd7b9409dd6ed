"""The rules of a round of annotation, and what votes decide (VideoAlign, section 3.1 and appendix G).

Three annotators vote on a pair, each on its own. Where all agree, that is the label; where they differ, a reviewer's vote is. Pairs
that somebody calls unsafe are dropped and counted.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .. import VideoAlignError
from ..datamodules.ratings import COLUMNS
from ..models.dimensions import DIMENSIONS

CHOICES = ("A", "same", "B")
OTHER = {"A": "B", "B": "A", "same": "same"}
"""A choice when the sides are exchanged."""


@dataclass(frozen=True, kw_only=True)
class RatingProtocol:
    """All numbers of a round."""

    votes: int = 3
    """Independent votes per pair."""
    overall: bool = False
    """Ask for an overall choice too, as VideoGen-RewardBench does."""
    scores: bool = False
    """Ask for a 1-5 score of each video in each dimension, for regression."""
    repeats: float = 0.05
    """Share of an annotator's votes on pairs seen before, with sides exchanged: self-consistency."""
    repeat_after: int = 10
    """Votes between a pair and its repetition, at least."""
    training_pass: float = 0.7
    """Share of right choices in the training round with which real work begins; decided by the last round."""
    unsafe_votes: int = 1
    """Flags with which a pair is dropped as unsafe."""
    broken_votes: int = 1
    """Flags with which a pair is dropped because a video does not play."""
    hold_minutes: float = 30.0
    """How long a pair is kept for who has it on the screen."""

    def __post_init__(self) -> None:
        whole = {name: getattr(self, name) for name in ("votes", "repeat_after", "unsafe_votes", "broken_votes")}
        if wrong := [name for name in ("overall", "scores") if not isinstance(getattr(self, name), bool)]:
            raise VideoAlignError(f"protocol: {', '.join(wrong)} must be true or false")
        if low := [name for name, value in whole.items() if type(value) is not int or value < 1]:
            raise VideoAlignError(f"protocol: {', '.join(low)} must be whole numbers of at least 1")
        if not 0 <= self.repeats < 1 or not 0 <= self.training_pass <= 1:
            raise VideoAlignError("protocol: repeats is a share in [0, 1), training_pass one in [0, 1]")
        if not (math.isfinite(self.hold_minutes) and self.hold_minutes > 0):
            raise VideoAlignError("protocol: hold_minutes must be positive")

    @property
    def columns(self) -> tuple[str, ...]:
        """What is chosen in."""
        return COLUMNS if self.overall else DIMENSIONS

    @classmethod
    def of(cls, record: dict[str, Any]) -> "RatingProtocol":
        """From JSON."""
        try:
            return cls(**record)
        except TypeError as error:
            raise VideoAlignError(f"protocol: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Vote:
    """What one annotator said of a pair, in the pair's own A and B whatever the screen showed.

    Attributes:
        choices: by column. scores: by side and dimension, or nothing. flags: of ``unsafe`` and ``broken``.
        review: a reviewer's. seconds: from the pair's appearance on.
    """

    annotator: str
    choices: dict[str, str]
    scores: dict[str, dict[str, int]]
    flags: tuple[str, ...]
    review: bool
    seconds: float
    created: float


@dataclass(frozen=True)
class Decision:
    """What a pair's votes amount to.

    Attributes:
        state: ``open`` (votes are missing), ``review`` (they differ), ``done``, ``unsafe`` or ``broken``.
        labels: by column where done.
    """

    state: str
    labels: dict[str, str]


def decide(votes: Sequence[Vote], protocol: RatingProtocol, again: Sequence[Vote] = ()) -> Decision:
    """The labels of a pair, or what is missing. Unanimous columns stand; of the others the reviewer's choice is final.

    Enough people's flags drop a pair, a reviewer's at once; fewer bring it before the reviewer, as a disagreement does.

    Args:
        votes: standing ones. again: those on hidden repetitions. Their choices decide nothing, but who flags does not know that it
            is one.
    """
    first = [vote for vote in votes if not vote.review]
    last = next((vote for vote in reversed(votes) if vote.review), None)
    # what was flagged before a review, the reviewer has decided
    new = [vote for vote in (*first, *again) if last is None or vote.created > last.created]
    flags = Counter(flag for _, flag in {(vote.annotator, flag) for vote in new for flag in vote.flags})
    for flag, limit in (("unsafe", protocol.unsafe_votes), ("broken", protocol.broken_votes)):
        if (last and flag in last.flags) or flags[flag] >= limit:
            return Decision(flag, {})
    if len(first) < protocol.votes:
        return Decision("open", {})
    if flags and not last:
        return Decision("review", {})
    counted = [vote for vote in first if not vote.flags]
    labels, differ = {}, False
    for column in protocol.columns:
        said = {vote.choices[column] for vote in counted if column in vote.choices}
        if len(said) == 1 and len(counted) >= protocol.votes:
            labels[column] = said.pop()
        elif last and column in last.choices:
            labels[column] = last.choices[column]
        else:
            differ = True
    return Decision("review", {}) if differ else Decision("done", labels)


def flipped(choices: dict[str, str]) -> dict[str, str]:
    """Choices when the sides are exchanged."""
    return {column: OTHER[choice] for column, choice in choices.items()}
