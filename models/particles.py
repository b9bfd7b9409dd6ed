r"""Particles that a noisy reward weighs and resamples while they are sampled: Feynman-Kac steering.

Legend: K particles, the candidates of a video.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .. import VideoAlignError
from .candidates import Trajectories
from .flow import draw, draw_seed, expand
from .sde import SDE, FlowSDE
from .search import HUGE, Chosen, Reward, Search, check_shares, even, read_after


@dataclass(frozen=True, kw_only=True)
class Particles(Search):
    r"""Feynman-Kac steering, a sequential Monte Carlo (Singhal et al., 2025), by a reward on noisy latents.

    The particles aim at :math:`p(x_0) \exp(\lambda\, r(x_0))`. When the reward is read, each weight is multiplied by a
    potential; where the effective sample size is below a share of K, particles are drawn anew by their weights
    (systematic resampling), and all weights are equal again. Particles that are copies of one another would stay so
    along the flow: the step after it is stochastic, which keeps the flow's marginals.

    Whatever the potentials, their product along a path is :math:`\exp(\lambda\, r(x_0))`, because the last one,
    at t = 0, corrects the others. So the weighted particles are exact in the limit of many, as far as the reward at
    t = 0 is; rewards in between decide how many are needed. Beside Flow-NRG this holds no longer: its proposals are not
    corrected for.
    """

    candidates: int = 4
    """Number K of particles, at least 2; 4 in the authors' main setting."""
    weights: Mapping[str, float] = field(default_factory=even)
    """Weights of the dimensions VQ, MQ and TA in the scalar reward; those that are not given have weight 0."""
    at_once: int | None = None
    """Number of particles whose velocities are computed at once; null computes all. Fewer need less memory."""
    strength: float = 10.0
    """Strength lambda of the tilt, above 0, for rewards that are z-scored with held-out statistics; 10 in the authors'
    settings."""
    potential: Literal["difference", "maximum"] = "difference"
    """Potential when the reward is read: of the ``difference`` to the last reading, or of the ``maximum`` of all
    readings so far, which prefers particles that were good at any time."""
    at: Sequence[float] = (0.2, 0.4, 0.6, 0.8)
    """Shares of the steps, ascending, between 0 and 1, after which the reward is read; it is read at the end, too. The
    authors read after every fifth of the steps."""
    threshold: float = 0.5
    """Share of K, above 0, at most 1, below which the effective sample size leads to resampling."""
    sde: SDE = field(default_factory=FlowSDE)
    """Kind of the stochastic steps."""
    stochastic: Literal["resampled", "always"] = "resampled"
    """Which steps are stochastic: those after particles were ``resampled``, or ``always`` all but the last one."""
    choose: Literal["best", "draw"] = "best"
    """Which particle is the video: the ``best`` by its last reward, or a ``draw`` by the last weights, which alone
    samples the tilted distribution."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares("Particles", self.at)
        if not (0 < self.strength < math.inf):
            raise VideoAlignError(f"Particles.strength is {self.strength}, but must be finite and above 0")
        if not 0 < self.threshold <= 1:
            raise VideoAlignError(f"Particles.threshold is {self.threshold}, but must be above 0, at most 1")
        allowed = {"potential": ("difference", "maximum"), "stochastic": ("resampled", "always")}
        for name, values in (allowed | {"choose": ("best", "draw")}).items():
            if getattr(self, name) not in values:
                raise VideoAlignError(
                    f"Particles.{name} {getattr(self, name)!r} is unknown; choose {' or '.join(values)}"
                )

    def __call__(self, path: Trajectories, reward: Reward, seed: int) -> Chosen:
        weighed, left = self.weigh(path, reward, seed)
        if self.choose == "best":
            row = int(weighed.rewards.argmax())
        else:
            shares = weighed.logs.softmax(0).tolist()
            (row,) = random.Random(draw_seed(seed, "choice")).choices(range(len(shares)), shares)
        return Chosen(row, left, float(weighed.rewards[row]))

    def weigh(self, path: Trajectories, reward: Reward, seed: int) -> tuple["Weighed", list[int]]:
        """Move the particles to the end.

        Args:
            path: The particles, at their noise. They are moved.
            reward: Scalar reward of particles at a time.
            seed: Seed of the video, from which all else is drawn.

        Returns:
            Their weights, and the number of different ancestors after each reading.
        """
        steps, left, copied = len(path.times) - 1, [], False
        ending = steps - 1 - _is_remainder(path.times)  # number of the step that noise would be left by
        read, weighed = read_after(self.at, steps), Weighed.equal(path.x)
        for number in range(steps):
            last = number == steps - 1
            v = path.velocity(number)
            if number < ending and (copied or self.stochastic == "always"):
                path.jump(number, self._moved(path, number, v, seed))
            else:
                path.step(number, v)
            copied = False
            if last or number + 1 in read:
                weighed = weighed.after(reward(path.x, path.times[number + 1]), self, last)
                # after the last stochastic step, copies would stay copies
                if number < ending - 1 and weighed.effective() < self.threshold * len(path.x):
                    rows = systematic(weighed.logs.softmax(0), random.Random(draw_seed(seed, "rows", number)).random())
                    path.keep(rows)
                    weighed, copied = weighed.kept(rows), True
                    left.append(len(set(rows)))
                else:
                    left.append(len(path.x))
        return weighed, left

    def _moved(self, path: Trajectories, number: int, velocity: Tensor, seed: int) -> Tensor:
        """The particles after a stochastic step."""
        t, after = (torch.full((len(path.x),), time, device=path.x.device) for time in path.times[number : number + 2])
        mean, std = self.sde.moments(path.x, velocity, t, after, path.times[1])
        seeds = torch.tensor([draw_seed(seed, "step", number, k) for k in range(len(mean))])
        noise = draw(seeds, mean.shape[1:], mean.device)[1]
        return mean + expand(std, mean) * noise.to(mean.dtype)


@dataclass(frozen=True)
class Weighed:
    """Particles' weights, float64.

    Attributes:
        logs: Logarithms (K,) of the weights since particles were last resampled.
        spent: Sum (K,) of the logarithms of all potentials along each particle's path.
        highest: Highest (K,) strength times reward along it.
        rewards: Last rewards (K,).
    """

    logs: Tensor
    spent: Tensor
    highest: Tensor
    rewards: Tensor

    @classmethod
    def equal(cls, x: Tensor) -> "Weighed":
        """Equal weights of particles (K, ...)."""
        nothing = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        return cls(nothing, nothing, torch.full_like(nothing, -math.inf), nothing)

    def after(self, rewards: Tensor, particles: Particles, last: bool) -> "Weighed":
        """The weights after the reward was read.

        Args:
            rewards: Rewards (K,).
            particles: Strength and potential.
            last: Whether this is the last reading, at t = 0, whose potential corrects all others.
        """
        value = (particles.strength * rewards.double()).clamp(-HUGE, HUGE)
        highest = torch.maximum(self.highest, value)
        gain = highest if particles.potential == "maximum" and not last else value - self.spent
        return Weighed(self.logs + gain, self.spent + gain, highest, rewards)

    def effective(self) -> float:
        """The effective sample size, from 1 to K."""
        return 1 / float(self.logs.softmax(0).square().sum())

    def kept(self, rows: Sequence[int]) -> "Weighed":
        """The equal weights of resampled particles.

        Args:
            rows: Numbers of the particles that are kept, repeated for copies.
        """
        return Weighed(torch.zeros_like(self.logs), self.spent[rows], self.highest[rows], self.rewards[rows])


def _is_remainder(times: Sequence[float]) -> bool:
    """Whether the last step is a remainder, as that of diffusers' Euler scheduler from t = 0.001 to 0: it removes no
    noise that the step before it has left.
    """
    return len(times) > 2 and times[-2] < 0.5 * (times[-3] - times[-2])


def systematic(shares: Tensor, u: float) -> list[int]:
    """Systematic resampling: row k is drawn floor or ceil of K times its share.

    Args:
        shares: Probabilities (K,), with sum 1.
        u: Uniform variable in [0, 1).

    Returns:
        K numbers of rows, ascending.
    """
    count = len(shares)
    ends = shares.double().cumsum(0).cpu()
    ends = ends / ends[-1]  # so that rounding gives no row a place that has a share of 0
    places = (torch.arange(count, dtype=torch.float64) + u) / count
    return torch.searchsorted(ends, places, right=True).tolist()
