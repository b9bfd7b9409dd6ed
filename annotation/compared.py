"""A round of rankings as the pairs in it: what is measured, shown and exported of pairs holds for rankings too."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from .answers import LETTERS, choice_of
from .protocol import Decision, Vote
from .rounds import Round
from .vote_tables import PairRow


@dataclass(frozen=True)
class ComparedPair:
    """Two videos of a ranking, with the attributes of a :class:`.vote_tables.PairRow`.

    Attributes:
        id: Number of the ranking with the letters of the two videos.
        prompt: The prompt of both.
        key_a: Key of A.
        key_b: Key of B.
        source_a: Source of A.
        source_b: Source of B.
        split: The split of the prompt.
        votes: Number of independent votes.
    """

    id: str
    prompt: str
    key_a: str
    key_b: str
    source_a: str
    source_b: str
    split: str
    votes: int


def in_pairs(round_: Round) -> Round:
    """The same round with pairs in the place of rankings; a round of pairs is itself."""
    if round_.protocol.kind != "ranking":
        return round_
    pairs, votes, again, decisions = [], {}, {}, {}
    for row in round_.pairs:
        for a, b in combinations(range(len(row.keys)), 2):
            pair = _pair(row, a, b)
            letters = LETTERS[a], LETTERS[b]
            pairs.append(pair)
            for found, given in ((votes, round_.votes), (again, round_.again)):
                if row.id in given:
                    found[pair.id] = [_of_two(vote, *letters) for vote in given[row.id]]
            decisions[pair.id] = _decision(round_.decisions[row.id], round_.protocol.columns, *letters)
    return replace(round_, pairs=pairs, votes=votes, again=again, decisions=decisions)


def _pair(row: PairRow, a: int, b: int) -> ComparedPair:
    name = f"{row.id:07d}-{LETTERS[a]}{LETTERS[b]}"
    keys, sources = row.keys, row.sources
    return ComparedPair(name, row.prompt, keys[a], keys[b], sources[a], sources[b], row.split, row.votes)


def _of_two(vote: Vote, a: str, b: str) -> Vote:
    """What a ranking says of two of its videos, as a vote on a pair."""
    choices: Mapping[str, str] = {column: choice_of(text, a, b) for column, text in vote.choices.items()}
    return replace(vote, choices=choices)


def _decision(decision: Decision, columns: Sequence[str], a: str, b: str) -> Decision:
    named = {column: f"{column} {a}{b}" for column in columns}
    return Decision(decision.state, {c: decision.labels[name] for c, name in named.items() if name in decision.labels})
