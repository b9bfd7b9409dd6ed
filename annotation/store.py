"""A round's file of votes, as the server and the commands use it.

:class:`Store` opens the file and :func:`new_round` makes one. Each method of the store is one transaction, whose work
is a function of the file that has the subject:

- :mod:`.people`: invitations and links
- :mod:`.assignment`: which pair is on whose screen
- :mod:`.voting`: votes, and what they decide
- :mod:`.rounds`: the whole round at one moment
- :mod:`.own_progress`: how far a person is
- :mod:`.vote_file` and :mod:`.vote_tables`: transactions and tables
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from . import assignment, own_progress, people, rounds, voting
from .assignment import ScreenClock, Task
from .pairing import Pair
from .people import Annotator
from .protocol import Decision, RatingProtocol, Vote
from .rounds import Round
from .vote_file import VoteFile, new_vote_file
from .vote_tables import Meta, PairRow
from .voting import Ballot, CollectedVote, Viewing


class Store:
    """An existing file of votes.

    Args:
        path: The file; :func:`new_round` makes one.

    Raises:
        VideoAlignError: The file is missing, is no file of votes, or has another version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.file = VoteFile(self.path)
        self._clock = ScreenClock()

    def close(self) -> None:
        """Release the file."""
        self.file.close()

    # --- the round ------------------------------------------------------------------------------------------------

    def fact(self, name: str) -> Any:
        """A fact about the round.

        Args:
            name: ``version``, ``protocol``, ``data`` (sha256 of the index of the videos) or ``shown`` (of the record of
                :mod:`.shown`; None where people see nothing but the videos of the set).
        """
        row = self.file.read(lambda session: session.get(Meta, name))
        return json.loads(row.value) if row else None

    @cached_property
    def protocol(self) -> RatingProtocol:
        """The round's rules."""
        return RatingProtocol.of(self.fact("protocol"))

    def prioritise(self, order: Sequence[int]) -> None:
        """Let pairs be rated in this order, and before all others.

        Args:
            order: Numbers of the pairs.
        """
        self.file.write(lambda session: assignment.prioritise(session, order))

    def pairs(self) -> list[PairRow]:
        """All pairs, those of the training round too."""
        return self.file.read(rounds.all_pairs)

    def votes(self, occasion: int = 0) -> dict[int, list[Vote]]:
        """The votes that were not taken back, by the pair's number.

        Args:
            occasion: 0 for first votes, 1 for those on repetitions.
        """
        return self.file.read(lambda session: voting.votes_by_pair(session, occasion))

    def decisions(self) -> dict[int, Decision]:
        """What the votes on each pair decide, by the pair's number; training pairs are left out."""
        return self.round().decisions

    def round(self) -> Round:
        """Everything, as it stands at one moment."""
        protocol = self.protocol
        return self.file.read(lambda session: rounds.snapshot(session, protocol))

    # --- people ---------------------------------------------------------------------------------------------------

    def invite(self, name: str, role: str = "annotator") -> str:
        """Add a person, or give one whose link was revoked a new link.

        Args:
            name: The person's name, which nobody else in the round has.
            role: ``annotator`` or ``reviewer``.

        Returns:
            The secret of the link; only its hash is kept.
        """
        return self.file.write(lambda session: people.invite(session, name, role))

    def revoke(self, name: str) -> None:
        """Make a person's link worthless; the person's votes stay."""
        self.file.write(lambda session: people.revoke(session, name))

    def who(self, token: str) -> Annotator | None:
        """The person to whom a link belongs; None for an unknown or revoked one."""
        return self.file.read(lambda session: people.who(session, token))

    # --- rating ---------------------------------------------------------------------------------------------------

    def task(self, annotator: Annotator) -> Task | None:
        """The pair on a person's screen, or else the next one; None where nothing is left."""
        protocol = self.protocol
        # reading waits for nobody; another window may be faster, so writing looks again
        return self.shown(annotator) or self.file.write(
            lambda session: assignment.assign(session, annotator, protocol, self._clock)
        )

    def shown(self, annotator: Annotator) -> Task | None:
        """The pair on a person's screen; None where there is none."""
        return self.file.read(lambda session: assignment.shown(session, annotator))

    def vote(
        self,
        annotator: Annotator,
        ticket: str,
        choices: dict[str, str],
        scores: dict[str, dict[str, int]] | None = None,
        flags: Sequence[str] = (),
        viewing: Viewing | None = None,
    ) -> dict[str, str] | None:
        """Store a vote on the pair on a person's screen, whose left video is A here.

        Args:
            annotator: The person.
            ticket: The ticket of the task.
            choices: The answer in each column, see :mod:`.answers`; may be incomplete beside a flag.
            scores: Scores from 1 to 5 by side and dimension; may be incomplete.
            flags: Some of ``unsafe`` and ``broken``.
            viewing: How much of the videos was played; None where nobody measures it.

        Returns:
            In the training round the right choices, with A on the left too; otherwise None.

        Raises:
            RefusedVote: What was sent is no vote on the pair on the screen.
            FastVote: It came before one full play, and ``viewing`` requires one.
        """
        sent, protocol = Ballot(choices, scores or {}, flags), self.protocol
        return self.file.write(
            lambda session: voting.cast(session, annotator, ticket, sent, viewing, protocol, self._clock)
        )

    def undo(self, annotator: Annotator) -> bool:
        """Take back a person's last vote that counts, and show its pair again; returns whether there was one.

        Raises:
            RefusedVote: A reviewer has decided that pair since, which is final.
        """
        protocol = self.protocol
        return self.file.write(lambda session: voting.take_back(session, annotator, protocol, self._clock))

    def bring_in(self, said: Mapping[int, Sequence[CollectedVote]]) -> int:
        """Add votes that were collected elsewhere, all or none; returns how many.

        Args:
            said: The votes on each pair, by the pair's number. A person's second vote on a pair takes the place of the
                first, as after an undo.
        """
        protocol = self.protocol
        return self.file.write(lambda session: voting.bring_in(session, said, protocol))

    def progress(self, annotator: Annotator) -> dict[str, Any]:
        """How far the round is.

        Returns:
            ``kind``: ``work``, ``training`` or ``review``. ``done`` and ``total``: how much the person has done of it,
            and all of it. ``round``: number of the training round. ``mine``: the person's votes. ``last_hour``: those
            of the last hour. ``pairs``: all pairs to rate, of which ``open`` need votes and ``review`` a reviewer.
        """
        protocol = self.protocol
        return self.file.read(lambda session: own_progress.progress(session, annotator, protocol))


@contextmanager
def new_round(
    path: str | Path,
    pairs: Sequence[Pair],
    protocol: RatingProtocol,
    data: str,
    references: Sequence[tuple[Pair, dict[str, str]]] = (),
    shown: str | None = None,
) -> Iterator[Store]:
    """A round in a new file, which appears at its path when the block has ended without an error.

    Args:
        path: The file to make.
        pairs: Pairs to rate, the first ones first.
        protocol: The round's rules.
        data: Checksum (sha256) of the index of the videos.
        references: Pairs of the training round with their right choices.
        shown: Checksum (sha256) of the record of what people see beside the set, see :mod:`.shown`; None for nothing.

    Raises:
        VideoAlignError: If there is a file already.
    """
    write = partial(rounds.fill, pairs=pairs, protocol=protocol, data=data, references=references, shown=shown)
    with new_vote_file(Path(path), write) as unfinished:
        store = Store(unfinished)
        yield store
        store.close()
