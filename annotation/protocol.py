"""The rules of a round of annotation, and what votes decide (VideoAlign, section 3.1 and appendix G).

Three annotators vote on a pair independently. Where all agree, their choice is the label; where they differ, a
reviewer's choice is. Pairs that somebody flags as unsafe are dropped and counted.
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
"""What a choice becomes when the sides are exchanged."""


@dataclass(frozen=True, kw_only=True)
class RatingProtocol:
    """The settings of a round, which ``--protocol`` reads from YAML."""

    votes: int = 3
    """Independent votes per pair."""
    overall: bool = False
    """Whether to ask for an overall choice too, as VideoGen-RewardBench does."""
    scores: bool = False
    """Whether to ask for a score from 1 to 5 of each video in each dimension, to train regression on."""
    repeats: float = 0.05
    """Share of an annotator's votes on pairs seen before, with sides exchanged, which measure self-consistency."""
    repeat_after: int = 10
    """Least number of an annotator's votes between a pair and its repetition."""
    training_pass: float = 0.7
    """Share of right choices with which a training round is passed; below it the round is repeated."""
    unsafe_votes: int = 1
    """Number of people whose flags drop a pair as unsafe."""
    broken_votes: int = 1
    """Number of people whose flags drop a pair because a video does not play."""
    hold_minutes: float = 30.0
    """Minutes for which a pair is kept for the person who has it on the screen."""

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
        """The columns of choices: the dimensions, and overall where the protocol asks for it."""
        return COLUMNS if self.overall else DIMENSIONS

    @classmethod
    def of(cls, record: dict[str, Any]) -> "RatingProtocol":
        """Read settings from JSON.

        Raises:
            VideoAlignError: A setting is unknown or makes no sense.
        """
        try:
            return cls(**record)
        except TypeError as error:
            raise VideoAlignError(f"protocol: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Vote:
    """One person's vote on a pair, in the pair's own A and B whatever the screen showed.

    Attributes:
        annotator: Name of the person.
        choices: The choice in each column.
        scores: Scores from 1 to 5 by side and dimension, as far as there are any.
        flags: Some of ``unsafe`` and ``broken``.
        review: Whether a reviewer voted.
        seconds: How long the pair was on the screen.
        created: When the vote was stored, in seconds since 1970.
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
    """What the votes on a pair decide.

    Attributes:
        state: ``open`` (votes are missing), ``review`` (they differ), ``done``, ``unsafe`` or ``broken``.
        labels: The label in each column where the state is ``done``; else empty.
    """

    state: str
    labels: dict[str, str]


def decide(votes: Sequence[Vote], protocol: RatingProtocol, again: Sequence[Vote] = ()) -> Decision:
    """The labels of a pair, or what is missing.

    A column in which all agree has its label; in the others the reviewer's choice is final. Flags of enough people
    drop a pair, and a reviewer's flag does so alone; fewer flags bring it before the reviewer, as a disagreement does.

    Args:
        votes: First votes that were not taken back, in the order in which they came.
        protocol: The rules.
        again: Votes on hidden repetitions. Only their flags count, because nobody knows that it is a repetition.
    """
    first = [vote for vote in votes if not vote.review]
    last = next((vote for vote in reversed(votes) if vote.review), None)
    # the reviewer has already decided on flags that came before the review
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
    """The same choices after the sides were exchanged."""
    return {column: OTHER[choice] for column, choice in choices.items()}
