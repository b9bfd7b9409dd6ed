"""Where a round stands: progress, agreement, people, sources, and what reviewers have to decide."""

from collections import Counter
from statistics import median
from typing import Any

from .agreement import agreement, consistency, sources
from .store import Round


def overview(round_: Round) -> dict[str, Any]:
    """Everything that the overview page and `videoalign annotate status` show."""
    protocol, pairs, votes, decisions = round_.protocol, round_.pairs, round_.votes, round_.decisions
    states = Counter(decision.state for decision in decisions.values())
    decided = [row for row in pairs if decisions[row.id].state == "done"]
    done = [(row.source_a, row.source_b, decisions[row.id].labels) for row in decided]
    own = consistency(votes, round_.again, protocol.columns)
    people = []
    for person in round_.people:
        mine = [vote for of_pair in votes.values() for vote in of_pair if vote.annotator == person["name"]]
        choices = [choice for vote in mine if not vote.flags for choice in vote.choices.values()]
        trained = [
            vote["occasion"] for vote in round_.history if vote["annotator"] == person["id"] and vote["occasion"] < 0
        ]
        people.append(
            {
                **person,
                "training": -min(trained, default=0),
                "votes": len(mine),
                "seconds": median(vote.seconds for vote in mine) if mine else None,
                "ties": choices.count("same") / len(choices) if choices else None,
                "flags": sum(bool(vote.flags) for vote in mine),
                "agrees": _with_others(votes, person["name"], protocol.columns),
                "consistency": own.get(person["name"]),
            }
        )
    return {
        "pairs": len(pairs),
        "states": dict(states),
        "votes": sum(map(len, votes.values())),
        "splits": dict(Counter(row.split for row in pairs)),
        "agreement": {column: agreement(votes, column) for column in protocol.columns},
        "people": people,
        "sources": sources(done, protocol.columns, [row.prompt for row in decided]),
        "queue": [
            {
                "prompt": row.prompt,
                "votes": [
                    {**{c: vote.choices.get(c, "–") for c in protocol.columns}, "flags": list(vote.flags)}
                    for vote in votes.get(row.id, [])
                ],
            }
            for row in pairs
            if decisions[row.id].state == "review"
        ],
        "protocol": protocol.to_dict(),
    }


def _with_others(votes: dict, name: str, columns: tuple[str, ...]) -> float | None:
    """Share of a person's choices that equal another person's on the same pair, flagged pairs aside."""
    equal, every = 0, 0
    for of_pair in votes.values():
        own = [vote for vote in of_pair if not vote.review and not vote.flags]
        mine = [vote for vote in own if vote.annotator == name]
        others = [vote for vote in own if vote.annotator != name]
        for a in mine:
            for b in others:
                both = [c for c in columns if c in a.choices and c in b.choices]
                every += len(both)
                equal += sum(a.choices[c] == b.choices[c] for c in both)
    return equal / every if every else None
