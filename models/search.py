r"""Search at sampling time: of several candidates of a video, a reward says which are kept.

Three ways: :class:`BestOfN` reads finished latents; :class:`Pruning` (after LatSearch) and, in :mod:`.particles`,
Feynman-Kac steering read noisy ones, at their own times. Each candidate of a video has seeds of its own, so that
neither batches nor ranks change what is drawn; candidate 0 begins with the video's own noise.

Legend: K candidates.
"""

import json
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import VideoAlignError
from .candidates import Trajectories
from .dimensions import DIMENSIONS
from .flow import draw, draw_seed

Reward = Callable[[Tensor, float], Tensor]
"""Function from candidates (K, ...) and their time to scalar rewards (K,)."""


HUGE = 1e100
"""Bound of scaled rewards, whose sums stay finite: beyond it one candidate has all of the probability anyway."""


class Chosen(NamedTuple):
    """What a search has found.

    Attributes:
        row: Number of the chosen candidate among those that are left.
        left: Number of different candidates that are left, each time that the reward was read.
        reward: Last reward of the chosen candidate.
    """

    row: int
    left: list[int]
    reward: float


class Search(ABC):
    """A way to search among candidates of a video; YAML names a subclass.

    Attributes:
        candidates: Number of candidates.
        weights: Weights of the dimensions in the scalar reward.
        at_once: Number of candidates whose velocities are computed at once.
    """

    candidates: int
    weights: Mapping[str, float]
    at_once: int | None

    def __post_init__(self) -> None:
        who = type(self).__name__
        if self.candidates < 2:
            raise VideoAlignError(
                f"{who}.candidates is {self.candidates}, but a search needs at least 2: one is a plain sample, for "
                "which search is left out"
            )
        if self.at_once is not None and self.at_once < 1:
            raise VideoAlignError(f"{who}.at_once is {self.at_once}, but must be at least 1, or null for all")
        if unknown := sorted(set(self.weights) - set(DIMENSIONS)):
            raise VideoAlignError(f"{who}.weights {unknown} are unknown; they are {', '.join(DIMENSIONS)}")
        if not all(map(math.isfinite, self.weights.values())) or not any(self.weights.values()):
            raise VideoAlignError(f"{who}.weights must be finite, and one of them not 0, got {dict(self.weights)}")

    def check(self, steps: int) -> None:
        """Refuse a number of steps that this search cannot work with.

        Args:
            steps: Number of scheduler steps.

        Raises:
            VideoAlignError: Where there are too few.
        """
        if steps < 2:
            who = type(self).__name__
            raise VideoAlignError(f"{who} reads the reward between steps: steps must be at least 2, got {steps}")

    def scalar(self, rewards: Tensor) -> Tensor:
        """Weighted sums (K,), float64, of rewards (K, D)."""
        weights = [self.weights.get(dimension, 0.0) for dimension in DIMENSIONS]
        return rewards.double() @ torch.tensor(weights, dtype=torch.float64, device=rewards.device)

    def noises(self, seed: int, shape: Sequence[int], device: torch.device) -> Tensor:
        """Noise (K, *shape) that the candidates begin with.

        Args:
            seed: Seed of the video; candidate 0 has its noise.
            shape: Shape of one sample's noise.
            device: Device to draw on.
        """
        seeds = [seed, *(draw_seed(seed, "candidate", k) for k in range(1, self.candidates))]
        return draw(torch.tensor(seeds), torch.Size(shape), device)[1]

    @abstractmethod
    def __call__(self, path: Trajectories, reward: Reward, seed: int) -> Chosen:
        """Sample the candidates to the end, and choose one.

        Args:
            path: The candidates, at their noise. They are moved.
            reward: Scalar reward of candidates at a time.
            seed: Seed of the video, from which all else is drawn.
        """

    def settings(self) -> dict[str, Any]:
        """The kind of search and its settings, as plain values; without those that change nothing but memory."""
        found = {"kind": type(self).__name__, **plain(self)}
        return {name: value for name, value in found.items() if name != "at_once"}


def plain(settings: Any) -> dict[str, Any]:
    """Fields or attributes as JSON reads them; of a dataclass inside also its kind, without which they say nothing."""
    found = {name: getattr(settings, name) for name in (asdict(settings) if is_dataclass(settings) else vars(settings))}
    inner = {n: {"kind": type(v).__name__, **asdict(v)} for n, v in found.items() if is_dataclass(v)}
    return json.loads(json.dumps(found | inner, default=str))


def even() -> dict[str, float]:
    """A third for each dimension."""
    return dict.fromkeys(DIMENSIONS, 1 / 3)


def read_after(at: Sequence[float], steps: int) -> list[int]:
    """Numbers of finished steps after which the reward is read: at least 1, and before the last step.

    Args:
        at: Shares of the steps.
        steps: Number of steps.
    """
    return sorted({min(steps - 1, max(1, round(share * steps))) for share in at})


def check_shares(who: str, at: Sequence[float]) -> None:
    """Refuse shares of the steps that do not ascend, or are not between 0 and 1.

    Args:
        who: Name of the class, for the message.
        at: Shares of the steps.

    Raises:
        VideoAlignError: Names the shares.
    """
    ascending = all(a < b for a, b in pairwise(at))
    if not at or not ascending or not all(0 < share < 1 for share in at):
        raise VideoAlignError(f"{who}.at {list(at)}: shares of the steps must ascend, and lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class BestOfN(Search):
    """The candidate whose finished latents have the highest reward: the rival that every other way must beat."""

    candidates: int = 4
    """Number N of candidates, at least 2; each costs a whole sampling."""
    weights: Mapping[str, float] = field(default_factory=even)
    """Weights of the dimensions VQ, MQ and TA in the scalar reward; those that are not given have weight 0."""
    at_once: int | None = None
    """Number of candidates whose velocities are computed at once; null computes all. Fewer need less memory."""

    def check(self, steps: int) -> None:
        """Any number of steps will do: the reward is read at their end."""

    def __call__(self, path: Trajectories, reward: Reward, seed: int) -> Chosen:
        for number in range(len(path.times) - 1):
            path.step(number, path.velocity(number))
        rewards = reward(path.x, 0.0)
        best = int(rewards.argmax())
        return Chosen(best, [len(rewards)], float(rewards[best]))


@dataclass(frozen=True, kw_only=True)
class Pruning(Search):
    r"""Candidates around one noise, of which a noisy reward leaves fewer and fewer (LatSearch, Zhao et al., 2026).

    All begin at :math:`\sqrt{1 - b^2}\, z + b\, \epsilon_k` around the noise z of candidate 0. After some steps as many
    are drawn, with replacement, as there are, with probabilities softmax(reward / temperature), and repeated ones are
    dropped. After the last of these steps the one with the largest sum of its probabilities goes on alone.
    """

    candidates: int = 6
    """Number of candidates at the start, at least 2; 6 in the authors' settings."""
    weights: Mapping[str, float] = field(default_factory=even)
    """Weights of the dimensions VQ, MQ and TA in the scalar reward; those that are not given have weight 0."""
    at_once: int | None = None
    """Number of candidates whose velocities are computed at once; null computes all. Fewer need less memory."""
    spread: float = 0.1
    """Distance b of the candidates from the first one's noise, above 0, at most 1; at 1 they are independent."""
    temperature: float = 1.0
    """Divisor of the reward, above 0; smaller values keep fewer candidates."""
    at: Sequence[float] = (0.2, 0.3, 0.4)
    """Shares of the steps, ascending, between 0 and 1, after which the reward is read. The authors read after 10, 15
    and 20 of 50 steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares("Pruning", self.at)
        if not 0 < self.spread <= 1:
            raise VideoAlignError(f"Pruning.spread is {self.spread}, but must be above 0, at most 1")
        if not (0 < self.temperature < math.inf):
            raise VideoAlignError(f"Pruning.temperature is {self.temperature}, but must be finite and above 0")

    def noises(self, seed: int, shape: Sequence[int], device: torch.device) -> Tensor:
        noises = super().noises(seed, shape, device)
        noises[1:] = math.sqrt(1 - self.spread**2) * noises[:1] + self.spread * noises[1:]
        return noises

    def __call__(self, path: Trajectories, reward: Reward, seed: int) -> Chosen:
        steps = len(path.times) - 1
        read, left = read_after(self.at, steps), []
        total = torch.zeros(self.candidates, dtype=torch.float64, device=path.x.device)
        for number in range(steps):
            path.step(number, path.velocity(number))
            if number + 1 in read:
                rewards = reward(path.x, path.times[number + 1])
                shares = (rewards.double() / self.temperature).clamp(-HUGE, HUGE).softmax(0)
                total = total + shares
                last = number + 1 == read[-1]
                rows = [int(total.argmax())] if last else self._drawn(shares, draw_seed(seed, "pruning", number))
                path.keep(rows)
                total, value = total[rows], rewards[rows]
                left.append(len(rows))
        return Chosen(0, left, float(value[0]))

    @staticmethod
    def _drawn(shares: Tensor, seed: int) -> list[int]:
        """Numbers of the candidates that are drawn at least once, ascending."""
        return sorted(set(random.Random(seed).choices(range(len(shares)), shares.tolist(), k=len(shares))))
