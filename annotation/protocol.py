"""The rules of a round of annotation, and what votes decide (VideoAlign, section 3.1 and appendix G).

Three annotators vote on a pair independently. Where all agree, their choice is the label; where they differ, a
reviewer's choice is. Pairs that somebody flags as unsafe are dropped and counted.

Two other kinds of rounds follow the same rules as far as they fit (:mod:`.answers`). Single videos are scored, their
scores are averaged, and a reviewer sees only what was flagged. Rankings are read as the pairs in them: of each pair,
what more than half of the votes say is the label, and a reviewer decides where there is no such majority.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .. import VideoAlignError
from ..datamodules.ratings import COLUMNS
from ..models.dimensions import DIMENSIONS, OVERALL
from .answers import ANSWERS, OTHER, Answers

SEEN = 0.9
"""Share of one full play that somebody must have seen; less is a fast vote. Browsers leave out parts of a second."""


@dataclass(frozen=True, kw_only=True)
class RatingProtocol:
    """The settings of a round, which ``--protocol`` reads from YAML."""

    kind: str = "pairs"
    """What is rated at once: ``pairs``, ``single`` videos (scores from 1 to 5), or a ``ranking`` of several."""
    ranked: int = 4
    """Largest number of videos of a prompt in one ranking, from 2 to 6."""
    votes: int = 3
    """Independent votes per pair, video or ranking."""
    dimensions: bool = True
    """Whether to ask for each dimension; false leaves the overall choice alone."""
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
        if not isinstance(self.kind, str) or self.kind not in ANSWERS:
            raise VideoAlignError(f"protocol: kind {self.kind!r} is unknown; choose one of {', '.join(ANSWERS)}")
        if type(self.ranked) is not int or not 2 <= self.ranked <= ANSWERS["ranking"].most:
            raise VideoAlignError(f"protocol: ranked must be a whole number from 2 to {ANSWERS['ranking'].most}")
        whole = {name: getattr(self, name) for name in ("votes", "repeat_after", "unsafe_votes", "broken_votes")}
        flags = ("dimensions", "overall", "scores")
        if wrong := [name for name in flags if not isinstance(getattr(self, name), bool)]:
            raise VideoAlignError(f"protocol: {', '.join(wrong)} must be true or false")
        if low := [name for name, value in whole.items() if type(value) is not int or value < 1]:
            raise VideoAlignError(f"protocol: {', '.join(low)} must be whole numbers of at least 1")
        numbers = {name: getattr(self, name) for name in ("repeats", "training_pass", "hold_minutes")}
        if odd := [n for n, value in numbers.items() if isinstance(value, bool) or not isinstance(value, int | float)]:
            raise VideoAlignError(f"protocol: {', '.join(odd)} must be a number")
        if not 0 <= self.repeats < 1 or not 0 <= self.training_pass <= 1:
            raise VideoAlignError("protocol: repeats is a share in [0, 1), training_pass one in [0, 1]")
        if not (math.isfinite(self.hold_minutes) and self.hold_minutes > 0):
            raise VideoAlignError("protocol: hold_minutes must be positive")
        if not (self.dimensions or self.overall):
            raise VideoAlignError("protocol: dimensions: false leaves nothing to ask for; set overall: true with it")
        if self.scores and self.kind != "pairs":
            raise VideoAlignError(
                f"protocol: scores: true asks for scores beside the choice of a pair, and kind is {self.kind}; for "
                "scores of single videos, kind: single is all"
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of choices: the dimensions and overall, as far as the protocol asks for them."""
        asked = {OVERALL: self.overall, **dict.fromkeys(DIMENSIONS, self.dimensions)}
        return tuple(column for column in COLUMNS if asked[column])

    @property
    def answers(self) -> Answers:
        """What people may answer."""
        return ANSWERS[self.kind]

    @property
    def most(self) -> int:
        """Largest number of videos that are shown at once."""
        return self.ranked if self.kind == "ranking" else self.answers.most

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
    """One person's vote on a pair, in the pair's own A and B whatever the screen showed; also on a video or ranking.

    Attributes:
        annotator: Name of the person.
        choices: The answer in each column, see :mod:`.answers`.
        scores: Scores from 1 to 5 by side and dimension, as far as there are any.
        flags: Some of ``unsafe`` and ``broken``.
        review: Whether a reviewer voted.
        seconds: How long the pair was on the screen.
        created: When the vote was stored, in seconds since 1970.
        watched: Seconds of one full play that the person saw, of the video of which least was seen; None where unknown.
        full_play: Seconds that one full play of all videos takes; None where unknown.
    """

    annotator: str
    choices: dict[str, str]
    scores: dict[str, dict[str, int]]
    flags: tuple[str, ...]
    review: bool
    seconds: float
    created: float
    watched: float | None = None
    full_play: float | None = None

    @property
    def is_fast(self) -> bool:
        """Whether the vote came before one full play of all videos; flags may."""
        return not self.flags and too_fast(self.watched, self.full_play)


@dataclass(frozen=True)
class Decision:
    """What the votes on a pair decide.

    Attributes:
        state: ``open`` (votes are missing), ``review`` (they differ), ``done``, ``unsafe`` or ``broken``.
        labels: The label in each column where the state is ``done``; else empty. In rankings, there is one for each
            column and two videos, such as ``VQ AC``; single videos have none.
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
    said = [statements(vote, protocol) for vote in first if not vote.flags]
    final = statements(last, protocol) if last else {}
    labels = {}
    for name in dict.fromkeys(name for one in (*said, final) for name in one):
        if agreed := _agreed([one[name] for one in said if name in one], len(said), protocol):
            labels[name] = agreed
        elif name in final:
            labels[name] = final[name]
        else:
            return Decision("review", {})
    return Decision("done", labels)


def _agreed(said: Sequence[str], counted: int, protocol: RatingProtocol) -> str | None:
    """What votes agree on; None where they do not.

    Args:
        said: What they say of one pair in one column.
        counted: Number of votes without flags.
        protocol: Says how many votes there must be, and whether a majority is enough.
    """
    (choice, count), *others = Counter(said).most_common() or [("", 0)]
    if counted < protocol.votes or not count:
        return None
    return choice if not others or (protocol.answers.majority and 2 * count > counted) else None


def statements(vote: Vote, protocol: RatingProtocol) -> dict[str, str]:
    """What a vote says of every pair of videos, see :meth:`.answers.Answers.statements`."""
    asked = {column: text for column, text in vote.choices.items() if column in protocol.columns}
    return {
        name: choice
        for column, text in asked.items()
        for name, choice in protocol.answers.statements(column, text).items()
    }


def too_fast(watched: float | None, full_play: float | None) -> bool:
    """Whether less than one full play was seen; False where it is unknown.

    Args:
        watched: Seconds of one full play that were seen.
        full_play: Seconds that one full play takes.
    """
    return watched is not None and full_play is not None and watched < SEEN * full_play


def flipped(choices: dict[str, str]) -> dict[str, str]:
    """The same choices about a pair after its sides were exchanged."""
    return {column: OTHER[choice] for column, choice in choices.items()}
