"""How far a round is: progress, agreement, people, sources, and what reviewers have to decide."""

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from .agreement import agreement, consistency, sources
from .protocol import Vote
from .rounds import Round


def overview(round_: Round) -> dict[str, Any]:
    """Everything that the overview page and `videoalign annotate status` show."""
    columns, pairs, votes, decisions = round_.protocol.columns, round_.pairs, round_.votes, round_.decisions
    decided = [row for row in pairs if decisions[row.id].state == "done"]
    labels = [(row.source_a, row.source_b, decisions[row.id].labels) for row in decided]
    return {
        "pairs": len(pairs),
        "states": dict(Counter(decision.state for decision in decisions.values())),
        "votes": sum(map(len, votes.values())),
        "splits": dict(Counter(row.split for row in pairs)),
        "agreement": {column: agreement(votes, column) for column in columns},
        "people": _people(round_),
        "sources": sources(labels, columns, [row.prompt for row in decided]),
        "queue": [
            {"prompt": row.prompt, "votes": [_shown(vote, columns) for vote in votes.get(row.id, [])]}
            for row in pairs
            if decisions[row.id].state == "review"
        ],
        "protocol": round_.protocol.to_dict(),
    }


def _people(round_: Round) -> list[dict[str, Any]]:
    """People with their numbers of votes, pace, and agreement with others and with themselves."""
    columns, votes = round_.protocol.columns, round_.votes
    own = consistency(votes, round_.again, columns)
    people = []
    for person in round_.people:
        name = person["name"]
        mine = [vote for of_pair in votes.values() for vote in of_pair if vote.annotator == name]
        choices = [choice for vote in mine if not vote.flags for choice in vote.choices.values()]
        occasions = [vote["occasion"] for vote in round_.history if vote["annotator"] == person["id"]]
        measured = {
            "training": -min((occasion for occasion in occasions if occasion < 0), default=0),
            "votes": len(mine),
            "seconds": median(vote.seconds for vote in mine) if mine else None,
            "ties": choices.count("same") / len(choices) if choices else None,
            "flags": sum(bool(vote.flags) for vote in mine),
            "agrees": _agrees(votes, name, columns),
            "consistency": own.get(name),
        }
        people.append(person | measured)
    return people


def _shown(vote: Vote, columns: Sequence[str]) -> dict[str, Any]:
    """A vote as the list of disputed pairs shows it, without the person."""
    return {**{column: vote.choices.get(column, "–") for column in columns}, "flags": list(vote.flags)}


def _agrees(votes: Mapping[int, Sequence[Vote]], name: str, columns: Sequence[str]) -> float | None:
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
