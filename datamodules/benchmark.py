"""A benchmark on disk: a *videos* set, each video once, and the table of rated pairs that refers to it."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from .. import VideoAlignError
from .ratings import COLUMNS, LABELS, prompt_of
from .shards import ShardSet

if TYPE_CHECKING:
    from torch import Tensor

PAIRS = "pairs.csv"


@dataclass
class Benchmark:
    """Rated pairs of a set's videos.

    Args:
        path: Folder or address of the set.

    Attributes:
        shards: The set of videos.
        keys: Keys of the videos that occur in pairs.
        numbers: Place of each key in ``keys``.
        ends: Numbers (N, 2) of the videos A and B of each pair.
        labels: Labels (N, 4) in the order of ``COLUMNS``; NaN where there is none.
        rows: Rows of the table of pairs.
    """

    path: str | Path

    def __post_init__(self) -> None:
        self.shards = ShardSet(self.path, "videos")
        self.rows = self.shards.table(PAIRS)
        if not self.rows or not {"key_A", "key_B"} <= self.rows[0].keys():
            raise VideoAlignError(f"{self.shards.name}/{PAIRS} needs the columns key_A and key_B and at least one row")
        for number, row in enumerate(self.rows, 2):
            if unknown := {c: row[c] for c in COLUMNS if row.get(c, "") not in LABELS}:
                raise VideoAlignError(
                    f"{self.shards.name}/{PAIRS}, line {number}: unknown labels {unknown}; they are A, B, same, invalid"
                )
        seen: dict[frozenset[str], int] = {}
        for number, row in enumerate(self.rows, 2):
            ends = frozenset((row["key_A"], row["key_B"]))
            where = f"{self.shards.name}/{PAIRS}, line {number}"
            if len(ends) < 2:
                raise VideoAlignError(f"{where}: compares the video {row['key_A']} with itself")
            if seen.setdefault(ends, number) != number:
                raise VideoAlignError(f"{where}: rates the pair of line {seen[ends]} again; leave one of them")
        self.keys = list(dict.fromkeys(row[end] for row in self.rows for end in ("key_A", "key_B")))
        self.numbers = {key: number for number, key in enumerate(self.keys)}

    @cached_property
    def ends(self) -> "Tensor":
        """Numbers (N, 2) of the videos A and B of each pair."""
        import torch  # here, because what only describes a set does without

        return torch.tensor([[self.numbers[row["key_A"]], self.numbers[row["key_B"]]] for row in self.rows])

    @cached_property
    def labels(self) -> "Tensor":
        """Labels (N, 4) in the order of ``COLUMNS``."""
        import torch

        return torch.tensor([[LABELS[row.get(c, "")] for c in COLUMNS] for row in self.rows])

    @cached_property
    def prompts(self) -> list[str]:
        """The prompt of each pair, from the table or else from the videos' records."""
        if all(row.get("prompt") for row in self.rows):
            return [row["prompt"] for row in self.rows]
        of_video = {content.key: prompt_of(content.record, content.name) for content in self.shards.contents()}
        return [of_video.get(row["key_A"], row["key_A"]) for row in self.rows]

    def margins(self, rewards: "Tensor", name: str = "benchmark") -> "tuple[Tensor, Tensor]":
        """Reward A minus reward B of every pair.

        Args:
            rewards: Rewards (videos, D) in the order of :attr:`keys`; NaN where a video was not scored.
            name: What to call the benchmark in messages.

        Returns:
            Margins (N, D), and a mask (N,) of the pairs whose videos were both scored.

        Raises:
            VideoAlignError: If a reward is infinite, or NaN in some dimensions only.
        """
        scored = ~rewards.isnan().all(1)
        if broken := [k for k, row, seen in zip(self.keys, rewards, scored) if seen and not row.isfinite().all()]:
            some = f"{len(broken)} videos are not finite (such as {broken[:3]})"
            raise VideoAlignError(f"{name}: the rewards of {some}; the model is broken")
        return rewards[self.ends[:, 0]] - rewards[self.ends[:, 1]], scored[self.ends].all(1)
