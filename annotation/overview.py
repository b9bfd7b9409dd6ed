"""How far a round is: progress, agreement, people, sources, and what reviewers have to decide."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from .agreement import agreement, concordance, consistency, sources
from .answers import LETTERS
from .compared import in_pairs
from .pace import fast_share, seconds_left, votes_needed
from .protocol import Vote
from .rounds import Round

FINISHED = ("done", "unsafe", "broken")
"""States of pairs that need nothing more."""


def overview(round_: Round) -> dict[str, Any]:
    """Everything that the overview page and `videoalign annotate status` show."""
    columns, pairs, votes, decisions = round_.protocol.columns, round_.pairs, round_.votes, round_.decisions
    states = Counter(decision.state for decision in decisions.values())
    needed, compared = votes_needed(round_), in_pairs(round_)
    return {
        "pairs": len(pairs),
        "states": dict(states),
        "finished": sum(states[state] for state in FINISHED) / len(pairs) if pairs else 1.0,
        "votes_needed": needed,
        "seconds_left": seconds_left(round_.history, needed, time.time()),
        "votes": sum(map(len, votes.values())),
        "splits": dict(Counter(row.split for row in pairs)),
        "agreement": {column: _agreement(round_, compared, column) for column in columns},
        "people": _people(round_, compared),
        "sources": _sources(compared),
        "queue": [
            {
                "pair": row.id,
                "prompt": row.prompt,
                "votes": [_shown(vote, columns) for vote in votes.get(row.id, [])],
            }
            for row in pairs
            if decisions[row.id].state == "review"
        ],
        "protocol": round_.protocol.to_dict(),
    }


def dispute(round_: Round, pair: int) -> dict[str, Any] | None:
    """A pair with all of its votes, as the page shows it that the overview links to; None for an unknown number.

    Args:
        round_: The round.
        pair: The pair's number.
    """
    row = next((row for row in round_.pairs if row.id == pair), None)
    if row is None:
        return None
    columns, decision = round_.protocol.columns, round_.decisions[pair]
    every = [*round_.votes.get(pair, []), *round_.again.get(pair, [])]
    return {
        "pair": pair,
        "prompt": row.prompt,
        "split": row.split,
        "state": decision.state,
        "labels": decision.labels,
        "videos": [
            {"letter": letter, "key": key, "source": source}
            for letter, key, source in zip(LETTERS, row.keys, row.sources)
        ],
        "columns": columns,
        "votes": [
            _shown(vote, columns)
            | {
                "annotator": vote.annotator,
                "review": vote.review,
                "repetition": vote in round_.again.get(pair, []),
                "scores": vote.scores,
                "seconds": vote.seconds,
                "fast": vote.is_fast,
            }
            for vote in every
        ],
    }


def _agreement(round_: Round, compared: Round, column: str) -> dict[str, float]:
    """Agreement in a column; rankings are compared pair by pair, and also as wholes (``tau``)."""
    found = agreement(compared.votes, column, round_.protocol.answers.scale)
    if round_.protocol.kind == "ranking":
        found["tau"] = concordance(round_.votes, column)
    return found


def _sources(compared: Round) -> dict[str, Any]:
    """Win rates of sources in the decided pairs; empty in a round of single videos."""
    if compared.protocol.kind == "single":
        return {}
    decided = [row for row in compared.pairs if compared.decisions[row.id].state == "done"]
    labels = [(row.source_a, row.source_b, compared.decisions[row.id].labels) for row in decided]
    return sources(labels, compared.protocol.columns, [row.prompt for row in decided])


def _people(round_: Round, compared: Round) -> list[dict[str, Any]]:
    """People with their numbers of votes, pace, and agreement with others and with themselves."""
    columns = round_.protocol.columns
    own = consistency(compared.votes, compared.again, columns)
    people = []
    for person in round_.people:
        name = person["name"]
        mine = _votes_of(name, round_.votes)
        choices = [said for vote in _votes_of(name, compared.votes) if not vote.flags for said in vote.choices.values()]
        occasions = [vote["occasion"] for vote in round_.history if vote["annotator"] == person["id"]]
        measured = {
            "training": -min((occasion for occasion in occasions if occasion < 0), default=0),
            "votes": len(mine),
            "seconds": median(vote.seconds for vote in mine) if mine else None,
            "fast": fast_share(mine),
            "ties": choices.count("same") / len(choices) if choices and round_.protocol.kind != "single" else None,
            "flags": sum(bool(vote.flags) for vote in mine),
            "agrees": _agrees(compared.votes, name, columns),
            "consistency": own.get(name),
        }
        people.append(person | measured)
    return people


def _votes_of(name: str, votes: Mapping[Any, Sequence[Vote]]) -> list[Vote]:
    return [vote for of_pair in votes.values() for vote in of_pair if vote.annotator == name]


def _shown(vote: Vote, columns: Sequence[str]) -> dict[str, Any]:
    """A vote as the list of disputed pairs shows it, without the person."""
    return {**{column: vote.choices.get(column, "–") for column in columns}, "flags": list(vote.flags)}


def _agrees(votes: Mapping[Any, Sequence[Vote]], name: str, columns: Sequence[str]) -> float | None:
    """Share of a person's choices that equal another person's on the same pair, votes with flags aside."""
    equal, every = 0, 0
    for of_pair in votes.values():
        independent = [vote for vote in of_pair if not vote.review and not vote.flags]
        mine = [vote for vote in independent if vote.annotator == name]
        others = [vote for vote in independent if vote.annotator != name]
        for a in mine:
            for b in others:
                both = [c for c in columns if c in a.choices and c in b.choices]
                every += len(both)
                equal += sum(a.choices[c] == b.choices[c] for c in both)
    return equal / every if every else None
