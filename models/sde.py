r"""Stochastic steps of a rectified flow, which keep its marginals, and the steps of a sampling that are stochastic.

Where velocity and score are related as in :mod:`.guidance`, every diffusion coefficient :math:`s(t)` keeps the
marginals of the flow (Flow-GRPO, Liu et al., 2025, Eq. 8). With :math:`dt = t' - t < 0` and the noise
:math:`\hat\epsilon = x + (1 - t) v` that the velocity predicts, a step is normal with

.. math:: \mu = x + v\,dt + \frac{s^2}{2t}\,\hat\epsilon\,dt, \qquad \sigma = s \sqrt{-dt}

Euler's step of the flow is the case s = 0. Legend: N samples.
"""

import math
import random
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import VideoAlignError
from .flow import draw_seed, expand
from .number_checks import at_least


class SDE(ABC):
    """A stochastic step from a time to a smaller one: normal, with a mean and a standard deviation of every element."""

    @abstractmethod
    def moments(self, x: Tensor, velocity: Tensor, t: Tensor, t_next: Tensor, first: float) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of a step, in fp32 (float64 where x is float64).

        Args:
            x: Noisy latents (N, ...).
            velocity: Velocity (N, ...) at x.
            t: Times (N,) of x, in (0, 1].
            t_next: Times (N,) that the step leads to, below ``t``.
            first: Second time of the schedule, in [0, 1): the one that follows the first step.

        Returns:
            Mean (N, ...), and standard deviation (N,) of each element.
        """

    def log_prob(self, sample: Tensor, mean: Tensor, std: Tensor, clean_frames: int = 0) -> Tensor:
        """Mean (N,) of the elements' log-densities at samples of a step.

        The mean, not the sum: with 2 million elements a sum would put every ratio of two policies outside of any clip.

        Args:
            sample: Samples (N, ...). Rounded to the dtype that they are stored in *before* this call, or ratios differ.
            mean: Mean (N, ...) of the step.
            std: Standard deviation (N,) of each element.
            clean_frames: Number of first frames of latents (N, C, F, H, W) that are an image's; they are left out.
        """
        squares = _mean_square(sample, mean, clean_frames)
        return -squares / (2 * std**2) - std.log() - math.log(2 * math.pi) / 2


class Diffusion(SDE):
    """A step of the stochastic equation that has the flow's marginals, with a diffusion coefficient s over time."""

    @abstractmethod
    def coefficient(self, t: Tensor, first: float) -> Tensor:
        """The diffusion coefficient s (N,).

        Args:
            t: Times (N,) in (0, 1], float64.
            first: Second time of the schedule, in [0, 1): the one that follows the first step.
        """

    def moments(self, x: Tensor, velocity: Tensor, t: Tensor, t_next: Tensor, first: float) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of a step (Euler and Maruyama); see :meth:`SDE.moments`."""
        x, velocity, t, t_next = _precise(x, velocity, t, t_next)
        s, dt = self.coefficient(t, first), t_next - t
        mean = _scaled(1 + s**2 / (2 * t) * dt, x) + _scaled((1 + s**2 * (1 - t) / (2 * t)) * dt, velocity)
        return mean, (s * (-dt).sqrt()).to(x.dtype)


def _precise(x: Tensor, velocity: Tensor, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents and velocity in fp32 or better, and times in float64: differences of near times lose digits."""
    kind = torch.promote_types(x.dtype, torch.float32)
    return x.to(kind), velocity.to(kind), t.double(), t_next.double()


def _mean_square(sample: Tensor, mean: Tensor, clean_frames: int) -> Tensor:
    apart = sample.to(mean.dtype) - mean
    return (apart[:, :, clean_frames:] if clean_frames else apart).square().flatten(1).mean(1)


def _scaled(factor: Tensor, x: Tensor) -> Tensor:
    return expand(factor, x).to(x.dtype) * x


def _positive(name: str, level: float, most: float = math.inf) -> None:
    """Refuse a level that is not a number above 0, and at most ``most``.

    Raises:
        VideoAlignError: Names the class and the bound.
    """
    if not (0 < level <= most and math.isfinite(level)):
        bound = "above 0" if most == math.inf else f"above 0, at most {most:g}"
        raise VideoAlignError(f"{name}.level is {level}, but the level of its noise must be finite and {bound}")


@dataclass(frozen=True, kw_only=True)
class FlowSDE(Diffusion):
    r"""Flow-GRPO's step (Liu et al., 2025): :math:`s = a \sqrt{t / (1 - t)}`.

    At t = 1, where s has no bound, the 1 in the denominator's t is replaced by the schedule's second time, as the
    authors' code does; the same holds for a first time that a scheduler rounds to just below 1.
    """

    level: float = 0.7
    """Level a of the noise, above 0; 0.7 to 0.9 in the authors' settings."""

    def __post_init__(self) -> None:
        _positive("FlowSDE", self.level)

    def coefficient(self, t: Tensor, first: float) -> Tensor:
        return self.level * (t / (1 - t.clamp(max=first))).sqrt()


@dataclass(frozen=True, kw_only=True)
class DanceSDE(Diffusion):
    r"""DanceGRPO's step (Xue et al., 2025): a constant :math:`s = \eta`."""

    level: float = 0.3
    r"""Level :math:`\eta` of the noise, above 0."""

    def __post_init__(self) -> None:
        _positive("DanceSDE", self.level)

    def coefficient(self, t: Tensor, first: float) -> Tensor:
        return torch.full_like(t, self.level)


@dataclass(frozen=True, kw_only=True)
class LinearSDE(Diffusion):
    r"""The step of Flow-GRPO's code for Wan: :math:`s = t_1\, t`, where :math:`t_1` is the schedule's second time.

    The code's s goes linearly from the schedule's last time, 0, to its second one, and has no level.
    """

    def coefficient(self, t: Tensor, first: float) -> Tensor:
        return first * t


@dataclass(frozen=True, kw_only=True)
class CoefficientPreserving(SDE):
    r"""Coefficient-preserving sampling (CPS; Wang and Yu, 2025): the mixture of data and noise keeps its coefficients.

    .. math:: \sigma = t' \sin(a \pi / 2), \qquad \mu = (1 - t')\, \hat x_0 + \sqrt{t'^2 - \sigma^2}\ \hat\epsilon

    with :math:`\hat x_0 = x - t v`. Samples have less spread than the flow's, however many steps there are: use it in
    short windows, and evaluate by the ODE.
    """

    level: float = 0.8
    """Level a of the noise, above 0 and at most 1."""

    def __post_init__(self) -> None:
        _positive("CoefficientPreserving", self.level, 1.0)

    def moments(self, x: Tensor, velocity: Tensor, t: Tensor, t_next: Tensor, first: float) -> tuple[Tensor, Tensor]:
        x, velocity, t, t_next = _precise(x, velocity, t, t_next)
        angle = self.level * math.pi / 2
        data, noise = x - _scaled(t, velocity), x + _scaled(1 - t, velocity)
        mean = _scaled(1 - t_next, data) + _scaled(t_next * math.cos(angle), noise)
        return mean, (t_next * math.sin(angle)).to(x.dtype)

    def log_prob(self, sample: Tensor, mean: Tensor, std: Tensor, clean_frames: int = 0) -> Tensor:
        """Minus the mean squared distance (N,) from the step's mean: the authors leave out deviation and constants.

        Args:
            sample: Samples (N, ...).
            mean: Mean (N, ...) of the step.
            std: Standard deviation (N,), which is not used.
            clean_frames: Number of first frames of latents (N, C, F, H, W) that are an image's; they are left out.
        """
        return -_mean_square(sample, mean, clean_frames)


# --- which steps are stochastic -----------------------------------------------------------------------------------


class Window(ABC):
    """Which steps of a sampling are stochastic; the others are the flow's own."""

    @abstractmethod
    def steps(self, number_of_steps: int, iteration: int, seed: int) -> list[int]:
        """Numbers of the stochastic steps, ascending, counted from 0.

        Args:
            number_of_steps: Number of steps of the sampling.
            iteration: Number of the iteration of rollouts and updates, counted from 0.
            seed: Seed of what is drawn.

        Raises:
            VideoAlignError: Where the window is larger than the steps that it may lie in.
        """

    def check(self, number_of_steps: int) -> "Window":
        """This window, or a refusal where it does not fit a number of steps.

        Args:
            number_of_steps: Number of steps of the sampling.
        """
        self.steps(number_of_steps, 0, 0)
        return self


def _fits(window: Window, size: int, among: int, which: str) -> None:
    if size > among:
        raise VideoAlignError(
            f"{window} is a window of {size} steps, but there are {among} {which}: make it smaller, or take more steps"
        )


@dataclass(frozen=True, kw_only=True)
class AllSteps(Window):
    """All steps are stochastic, as in Flow-GRPO and DanceGRPO."""

    skip_last: bool = True
    """Whether the last step, whose noise would stay in the video, is the flow's own."""

    def steps(self, number_of_steps: int, iteration: int, seed: int) -> list[int]:
        _fits(self, 1, number_of_steps - self.skip_last, "steps" + " before the last" * self.skip_last)
        return list(range(number_of_steps - self.skip_last))


@dataclass(frozen=True, kw_only=True)
class MovingWindow(Window):
    """A window that moves from the noise to the data and begins again (MixGRPO, Li et al., 2025).

    It never holds the last step, whose noise would stay in the video.
    """

    size: int = 4
    """Number of stochastic steps, at least 1."""
    every: int = 25
    """Number of iterations after which the window moves, at least 1."""
    stride: int = 1
    """Number of steps that it moves by, at least 1."""

    def __post_init__(self) -> None:
        at_least(1, f"{type(self).__name__}.", size=self.size, every=self.every, stride=self.stride)

    def steps(self, number_of_steps: int, iteration: int, seed: int) -> list[int]:
        _fits(self, self.size, number_of_steps - 1, "steps before the last")
        last = number_of_steps - 1 - self.size
        places = [*range(0, last, self.stride), last]  # whatever the stride, no step is left out for ever
        begin = places[iteration // self.every % len(places)]
        return list(range(begin, begin + self.size))


@dataclass(frozen=True, kw_only=True)
class EarlySteps(Window):
    """Some steps in a row, drawn anew for each seed and iteration among the first ones (Flow-GRPO-Fast).

    It never holds the last step, whose noise would stay in the video.
    """

    size: int = 1
    """Number of stochastic steps, at least 1; 1 to 3 in the authors' settings."""
    share: float = 0.5
    """Share of the steps, from the noise on, that the window lies in; above 0, at most 1."""

    def __post_init__(self) -> None:
        at_least(1, f"{type(self).__name__}.", size=self.size)
        if not 0 < self.share <= 1:
            raise VideoAlignError(f"EarlySteps.share is {self.share}, but must be above 0 and at most 1")

    def steps(self, number_of_steps: int, iteration: int, seed: int) -> list[int]:
        among = min(int(self.share * number_of_steps), number_of_steps - 1)
        _fits(self, self.size, among, f"early ones among {number_of_steps} (share {self.share:g})")
        drawn = random.Random(draw_seed("early steps", seed, iteration))
        begin = drawn.randrange(among - self.size + 1)
        return list(range(begin, begin + self.size))
