"""The kinds of rounds, and what people answer in each: texts that are stored, compared and exported as they are.

- ``pairs``: ``A``, ``same`` or ``B`` says which of two videos is better.
- ``single``: ``1`` (bad) to ``5`` (good) is the score of one video.
- ``ranking``: ``B>A=C`` puts several videos in order, the best one first; ``=`` stands between equals.

Letters are the places of videos on a screen or in a row of the file of votes. The *order* of a screen says which is
which: its place ``i`` shows the row's own video ``order[i]``.
"""

import math
import re
from collections.abc import Sequence
from itertools import combinations

LETTERS = "ABCDEF"
CHOICES = ("A", "same", "B")
OTHER = {"A": "B", "B": "A", "same": "same"}
"""What a choice becomes when the sides are exchanged."""


class Answers:
    """What the kinds of rounds differ in.

    Attributes:
        words: The answers in a message.
        fewest: Least number of videos that are shown at once.
        most: Largest number of videos that are shown at once.
        scale: Answers from the worst to the best on which agreement is measured.
        majority: Whether more than half of the votes decide; otherwise all must agree.
    """

    words: str
    fewest: int
    most: int
    scale: tuple[str, ...] = ("B", "same", "A")
    majority = False

    def is_one(self, text: str, count: int) -> bool:
        """Whether a text is an answer about ``count`` videos."""
        raise NotImplementedError

    def turned(self, text: str, order: Sequence[int]) -> str:
        """An answer on a screen as one in the row's own places; see :func:`inverse` for the other way."""
        raise NotImplementedError

    def statements(self, column: str, text: str) -> dict[str, str]:
        """What an answer says of every pair of videos in it: ``A``, ``same`` or ``B``.

        Args:
            column: The column of the answer, which begins the name of each statement.
            text: The answer.
        """
        return {column: text}

    def right(self, said: str | None, reference: str) -> list[bool]:
        """Which parts of an answer in the training round are right."""
        return [said == reference]


class PairChoices(Answers):
    """Answers of rounds in which two videos are compared."""

    words, fewest, most = "A, same or B", 2, 2

    def is_one(self, text: str, count: int) -> bool:
        """Whether a text is A, same or B."""
        return text in CHOICES

    def turned(self, text: str, order: Sequence[int]) -> str:
        """The same choice, or the other one where the screen shows B on the left."""
        return OTHER[text] if order[0] else text


class Scores(Answers):
    """Answers of rounds in which each video is scored alone."""

    words, fewest, most = "a whole number from 1 to 5", 1, 1
    scale = ("1", "2", "3", "4", "5")

    def is_one(self, text: str, count: int) -> bool:
        """Whether a text is a score."""
        return text in self.scale

    def turned(self, text: str, order: Sequence[int]) -> str:
        """The score itself: one video has one place."""
        return text

    def statements(self, column: str, text: str) -> dict[str, str]:
        """A score says nothing of pairs; scores that differ are averaged and need no reviewer."""
        return {}

    def right(self, said: str | None, reference: str) -> list[bool]:
        """A score that differs by 1 at most is right."""
        return [said is not None and abs(int(said) - int(reference)) <= 1]


class Rankings(Answers):
    """Answers of rounds in which several videos are put in order."""

    words, fewest, most = "an order of all videos such as B>A=C", 2, len(LETTERS)
    majority = True

    def is_one(self, text: str, count: int) -> bool:
        """Whether a text names every video once, in the one form that :func:`ranked` writes."""
        if not re.fullmatch("[A-F](?:[>=][A-F])*", text) or sorted(re.findall("[A-F]", text)) != [*LETTERS[:count]]:
            return False
        return text == ranked(ranks(text))

    def turned(self, text: str, order: Sequence[int]) -> str:
        """The ranking with each letter of the screen replaced by the row's own."""
        return ranked({LETTERS[order[LETTERS.index(letter)]]: rank for letter, rank in ranks(text).items()})

    def statements(self, column: str, text: str) -> dict[str, str]:
        """One statement for each two videos, such as ``VQ AC``."""
        return {f"{column} {a}{b}": choice_of(text, a, b) for a, b in combinations(sorted(ranks(text)), 2)}

    def right(self, said: str | None, reference: str) -> list[bool]:
        """Each two videos that stand to each other as in the reference are right."""
        wanted = self.statements("", reference)
        found = self.statements("", said) if said else {}
        return [found.get(name) == choice for name, choice in wanted.items()]


ANSWERS: dict[str, Answers] = {"pairs": PairChoices(), "single": Scores(), "ranking": Rankings()}
"""Answers by kind of round."""


def ranks(text: str) -> dict[str, int]:
    """The rank of each video in a ranking, from 1; equals have the same rank, and the next one is 1 more."""
    return {letter: rank for rank, tied in enumerate(text.split(">"), 1) for letter in tied.split("=")}


def ranked(by_letter: dict[str, int]) -> str:
    """The ranking with these ranks, of which the lowest is the best; equals stand in the order of the alphabet."""
    tied = {rank: sorted(letter for letter, r in by_letter.items() if r == rank) for rank in by_letter.values()}
    return ">".join("=".join(tied[rank]) for rank in sorted(tied))


def choice_of(text: str, a: str, b: str) -> str:
    """What a ranking says of two videos: ``A`` where ``a`` is better, ``B`` where ``b`` is, or ``same``."""
    found = ranks(text)
    return "same" if found[a] == found[b] else "A" if found[a] < found[b] else "B"


def order_of(number: int, count: int) -> tuple[int, ...]:
    """An order of a screen by its number in the list of all; 0 is the row's own.

    Args:
        number: Number from 0 to ``count! - 1``. For two videos, 1 exchanges the sides.
        count: Number of videos.
    """
    left, order = list(range(count)), []
    for place in range(count, 0, -1):
        index, number = divmod(number, math.factorial(place - 1))
        order.append(left.pop(index))
    return tuple(order)


def inverse(order: Sequence[int]) -> tuple[int, ...]:
    """The order that takes answers in the row's own places to the screen's."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))
