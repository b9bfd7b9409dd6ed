"""`videoalign annotate rehearse`: simulated people rate a round of the miniature world, before real people come.

They vote through the same file as real ones, so that a protocol, the overview and an export can be tried in a minute.
What they see of a video is its true quality, which the miniature world writes into its record, with an error of their
own (:mod:`~videoalign.miniature.world.annotators`). Rewards get Gumbel noise, and two that differ by less than the
logarithm of theta are equal: of two videos that is Bradley-Terry with ties, of several a Plackett-Luce order.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .. import VideoAlignError
from ..bars import Bar
from ..datamodules.shards import ShardSet
from ..miniature.world.annotators import PERCEPTION, SCALE, SCORE_NOISE, THETA
from ..models.dimensions import DIMENSIONS
from .answers import LETTERS, choice_of, ranked
from .assignment import Task
from .people import Annotator
from .protocol import RatingProtocol
from .store import Store

PATIENCE = 5
"""Number of training rounds after which a person who never passes gives up."""


@dataclass
class SimulatedPerson:
    """Somebody who votes by a video's true quality.

    Attributes:
        quality: True qualities (3,) of VQ, MQ and TA in [0, 1], by key.
        rng: Draws what the person sees and says.
        error: Standard deviation of the person's perception of a quality.
    """

    quality: Mapping[str, np.ndarray]
    rng: np.random.Generator
    error: float = PERCEPTION

    def answer(self, task: Task, protocol: RatingProtocol) -> tuple[dict[str, str], dict[str, dict[str, int]]]:
        """Choices and scores about the videos on a screen.

        Args:
            task: What is on the screen.
            protocol: What is asked for.

        Returns:
            The answer in each column, and scores by side and dimension where the protocol asks for them too.
        """
        true = np.stack([self.quality[key] for key in task.keys])
        seen = true + self.rng.normal(0, self.error, true.shape)  # (videos, 3)
        columns = np.column_stack([seen, seen.mean(1)])
        points = np.clip(np.rint(1 + 4 * columns + self.rng.normal(0, SCORE_NOISE, columns.shape)), 1, 5).astype(int)
        places = {column: place for place, column in enumerate((*DIMENSIONS, "Overall"))}
        if protocol.kind == "single":
            return {column: str(points[0, places[column]]) for column in protocol.columns}, {}
        rewards = SCALE * columns + self.rng.gumbel(size=columns.shape)
        orders = {column: _order(rewards[:, places[column]]) for column in protocol.columns}
        if protocol.kind == "ranking":
            return orders, {}
        scores = {side: dict(zip(DIMENSIONS, map(int, row))) for side, row in zip("AB", points)}
        return {c: choice_of(order, "A", "B") for c, order in orders.items()}, scores if protocol.scores else {}


def _order(rewards: np.ndarray) -> str:
    """A ranking by rewards (videos,), in which those are equal that differ little from the best of them."""
    tiers: dict[str, int] = {}
    best, rank = math.inf, 0
    for place in (-rewards).argsort():
        if best - rewards[place] > math.log(THETA):
            best, rank = rewards[place], rank + 1
        tiers[LETTERS[place]] = rank
    return ranked(tiers)


def rehearse(store: Store, videos: ShardSet, people: int = 3, seed: int = 0) -> dict[str, int]:
    """Let simulated people rate all that is left of a round, and a simulated reviewer what they dispute.

    Args:
        store: The file of votes.
        videos: The set that is rated, of the miniature world.
        people: Number of people beside the reviewer.
        seed: Seed of what they see and say.

    Returns:
        Number of ``votes``, and of pairs (videos, rankings) in each state.

    Raises:
        VideoAlignError: The records do not say the true quality, or there are too few people.
    """
    protocol = store.protocol
    if people < protocol.votes:
        raise VideoAlignError(
            f"--people {people}: the protocol asks for {protocol.votes} votes on each; let as many come"
        )
    quality = {}
    for content in videos.contents():
        found = content.record.get("quality")
        if not isinstance(found, list) or len(found) != len(DIMENSIONS):
            raise VideoAlignError(
                f"{content.name}: the record has no quality; only videos of the miniature world "
                "(`videoalign sprites`) say how good they are"
            )
        quality[content.key] = np.array(found, float)
    team = [(_invited(store, f"simulated {number}"), number) for number in range(1, people + 1)]
    reviewer = (_invited(store, "simulated reviewer", "reviewer"), 0)
    count = 0
    total = store.progress(team[0][0])["pairs"] * protocol.votes
    with Bar("votes", total) as bar:
        for group in (team, [reviewer]):
            simulated = [(who, SimulatedPerson(quality, np.random.default_rng([seed, n]))) for who, n in group]
            count += _work(store, protocol, simulated, bar)
    states: dict[str, int] = {}
    for decision in store.decisions().values():
        states[decision.state] = states.get(decision.state, 0) + 1
    return {"votes": count, **states}


def _invited(store: Store, name: str, role: str = "annotator") -> Annotator:
    annotator = store.who(store.invite(name, role))
    assert annotator is not None
    return annotator


def _work(store: Store, protocol: RatingProtocol, people: Sequence[tuple[Annotator, SimulatedPerson]], bar: Bar) -> int:
    """Let people vote in turn until nothing is left for them; returns the number of votes."""
    count, at_work = 0, [*people]
    while at_work:
        for one in [*at_work]:
            who, person = one
            task = store.task(who)
            if task is None or store.progress(who).get("round", 0) > PATIENCE:
                at_work.remove(one)
                continue
            store.vote(who, task.ticket, *person.answer(task, protocol))
            count += 1
            bar.total = max(bar.total, bar.n + 1)  # repetitions and reviews come on top
            bar.update()
    return count
