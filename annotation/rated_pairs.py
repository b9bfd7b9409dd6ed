"""What a round has decided, as rated pairs: those of its votes, of its rankings, or of the scores of single videos."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from statistics import mean, stdev
from typing import Any

from ..models.dimensions import DIMENSIONS
from .answers import LETTERS, ranks
from .compared import in_pairs
from .protocol import Vote
from .rounds import Round
from .vote_tables import PairRow


@dataclass(frozen=True)
class RatedPair:
    """A pair with its labels.

    Attributes:
        id: What the pair is called in tables.
        key: Key of the pair in a set.
        prompt: The prompt of both videos.
        keys: Keys of A and B.
        sources: Sources of A and B.
        split: The split of the prompt.
        labels: The label in each column.
        count: Number of independent votes behind the labels.
        votes: The votes on the pair. Where labels come of scores, those on either video, with scores and no choices.
        scores: Mean scores of A and B by dimension, where there are any.
    """

    id: int | str
    key: str
    prompt: str
    keys: tuple[str, str]
    sources: tuple[str, str]
    split: str
    labels: Mapping[str, str]
    count: int
    votes: Sequence[Vote] = ()
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoredVideo:
    """A single video with its scores.

    Attributes:
        row: The video's row in the file of votes.
        votes: The votes that count.
        scores: What each rater said, by column.
    """

    row: PairRow
    votes: Sequence[Vote]
    scores: Mapping[str, Sequence[int]]

    def cells(self) -> dict[str, Any]:
        """Number of raters, and mean and standard deviation of each column (empty for a single rater)."""
        found: dict[str, Any] = {"raters": max(map(len, self.scores.values()), default=0)}
        for column, given in self.scores.items():
            found[column] = round(mean(given), 4)
            found[f"{column}_sd"] = round(stdev(given), 4) if len(given) > 1 else ""
        return found


def rated_pairs(round_: Round, margin: float | None = None) -> list[RatedPair]:
    """The decided pairs of a round, in the order of its file.

    Args:
        round_: The round.
        margin: In a round of single videos, the largest difference of mean scores that is a tie; None for no pairs.
    """
    if round_.protocol.kind == "single":
        return [] if margin is None else [*_of_scores(scored_videos(round_), round_.protocol.columns, margin)]
    found = in_pairs(round_)
    return [
        RatedPair(
            id=row.id,
            key=f"{row.id:07d}" if isinstance(row.id, int) else row.id,
            prompt=row.prompt,
            keys=(row.key_a, row.key_b),
            sources=(row.source_a, row.source_b),
            split=row.split,
            labels=found.decisions[row.id].labels,
            count=row.votes,
            votes=found.votes.get(row.id, []),
            scores=_mean_scores(found.votes.get(row.id, [])),
        )
        for row in found.pairs
        if found.decisions[row.id].state == "done"
    ]


def scored_videos(round_: Round) -> list[ScoredVideo]:
    """The finished videos of a round of single videos, with the scores of the independent raters without flags.

    Where only a reviewer is left of a video's raters, because all others flagged it, the reviewer's scores count.
    """
    found = []
    for row in round_.pairs:
        if round_.decisions[row.id].state == "done":
            every = [vote for vote in round_.votes.get(row.id, []) if not vote.flags]
            counted = [vote for vote in every if not vote.review] or every
            scores = {c: [int(vote.choices[c]) for vote in counted] for c in round_.protocol.columns}
            found.append(ScoredVideo(row, counted, scores))
    return found


def ranking_rows(round_: Round) -> Iterable[dict[str, Any]]:
    """Rows of ``rankings.csv``: the mean rank of each video of a ranking, by column, and what each rater said."""
    for row in round_.pairs:
        if round_.decisions[row.id].state != "done":
            continue
        counted = [vote for vote in round_.votes.get(row.id, []) if not vote.review and not vote.flags]
        for column in round_.protocol.columns:
            said = [ranks(vote.choices[column]) for vote in counted]
            for letter, key, source in zip(LETTERS, row.keys, row.sources):
                places = [one[letter] for one in said]
                yield {
                    "split": row.split,
                    "ranking": row.id,
                    "prompt": row.prompt,
                    "column": column,
                    "key": key,
                    "source": source,
                    "mean_rank": round(mean(places), 4) if places else "",
                    "raters": len(places),
                    "ranks": " ".join(map(str, places)),
                }


def _of_scores(videos: Sequence[ScoredVideo], columns: Sequence[str], margin: float) -> Iterable[RatedPair]:
    """All pairs of scored videos of one prompt; mean scores that differ by the margin at most are a tie."""
    of_prompt: dict[str, list[ScoredVideo]] = {}
    for video in videos:
        of_prompt.setdefault(video.row.prompt, []).append(video)
    for alike in of_prompt.values():
        for a, b in combinations(alike, 2):
            means = [{column: mean(video.scores[column]) for column in columns} for video in (a, b)]
            differences = {column: means[0][column] - means[1][column] for column in columns}
            labels = {c: "same" if abs(d) <= margin + 1e-9 else "A" if d > 0 else "B" for c, d in differences.items()}
            scores = {side: {d: round(m[d], 3) for d in DIMENSIONS if d in m} for side, m in zip("AB", means)}
            yield RatedPair(
                id=f"{a.row.id}-{b.row.id}",
                key=f"{a.row.id:07d}-{b.row.id:07d}",
                prompt=a.row.prompt,
                keys=(a.row.key_a, b.row.key_a),
                sources=(a.row.source_a, b.row.source_a),
                split=a.row.split,
                labels=labels,
                count=min(a.row.votes, b.row.votes),
                votes=[_as_scores(vote, side) for side, video in zip("AB", (a, b)) for vote in video.votes],
                scores=scores,
            )


def _as_scores(vote: Vote, side: str) -> Vote:
    """A vote on a single video, as a vote on a pair that the video is a side of; it counts whoever gave it."""
    scores = {d: int(vote.choices[d]) for d in DIMENSIONS if d in vote.choices}
    return replace(vote, choices={}, scores={side: scores}, review=False)


def _mean_scores(votes: Sequence[Vote]) -> dict[str, dict[str, float]]:
    """Mean over the independent annotators of the scores that were asked for beside the choices, by side."""
    counted = [vote.scores for vote in votes if not vote.review and not vote.flags]
    found = {}
    for side in "AB":
        rows = [scores.get(side, {}) for scores in counted]
        found[side] = {
            d: round(sum(given) / len(given), 3) for d in DIMENSIONS if (given := [row[d] for row in rows if d in row])
        }
    return found
