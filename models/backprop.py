r"""Sampling as a chain whose last links have gradients, so that a reward's gradient reaches the transformer's weights.

The chain is Euler's, at the times :math:`1 \ge t_0 > \dots > t_n = 0` of the pipeline's own schedule:

.. math:: x_{i+1} = x_i + (t_{i+1} - t_i)\, v_\theta(x_i, t_i, y)

Gradients through all of its steps would hold the activations of all of them, and grow from step to step. So most steps
are taken without gradients, and a *route* says which ones are not, and which latents the reward reads:

- :class:`RandomStep`: one step, drawn for each sample; its end at its own noise (PRFL, Mi et al., 2025).
- :class:`LastSteps`: the last K steps; the finished video (DRaFT-K, Clark et al., 2024).
- :class:`PredictedEnd`: a late step, drawn for each sample; the end that it predicts (ReFL, Xu et al., 2023).

Legend: N samples; C, F, H, W channels, frames, height and width of latents; n steps.
"""

from abc import ABC, abstractmethod

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from .. import VideoAlignError
from .family import Condition, Step
from .flow import expand
from .generator import Generator
from .shifted_schedule import shifted


class Chain:
    """The steps of sampling for one batch.

    Args:
        generator: Generator whose transformer samples.
        condition: Prompts, and images, of the batch.
        noise: Noise (N, C, F, H, W) that sampling starts from, fp32.
        steps: Number n of steps.
        cfg_scale: Classifier-free guidance scale, at least 1; 1 turns it off.
        null: Condition of the empty prompt, with a batch size of 1; needed where the scale is above 1.
        shift: Shift of the time steps; the authors' own if not given.

    Attributes:
        times: Times (n + 1,) of the chain, from near 1 down to 0.
    """

    def __init__(
        self,
        generator: Generator,
        condition: Condition,
        noise: Tensor,
        steps: int,
        cfg_scale: float = 1.0,
        null: Condition | None = None,
        shift: float | None = None,
    ) -> None:
        self.generator, self.condition, self.noise, self.cfg_scale = generator, condition, noise, cfg_scale
        self.null = None
        if cfg_scale > 1:  # the image stays
            self.null = condition | {name: part.expand(len(noise), *part.shape[1:]) for name, part in null.items()}
        scheduler = generator.pipeline.scheduler
        self.times = chain_times(generator, scheduler if shift is None else shifted(scheduler, shift), steps, noise)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """Velocity (N, C, F, H, W) after classifier-free guidance.

        Args:
            x: Noisy latents (N, C, F, H, W).
            t: Times (N,), which may differ from sample to sample.
        """
        net = self.generator.require("transformer")
        step = Step(x, t, expand(t, x), self.condition, self.null, self.cfg_scale, net)
        return self.generator._step_velocity(step)

    def step(self, x: Tensor, numbers: Tensor) -> Tensor:
        """Latents (N, C, F, H, W) after one step.

        Args:
            x: Latents (N, C, F, H, W) before it.
            numbers: Number (N,) of each sample's step, from 0 to n - 1.
        """
        t, following = self.times[numbers], self.times[numbers + 1]
        x = x + expand(following - t, x) * self.velocity(x, t)
        return self.generator.with_image(x, self.condition)

    def walk(self, stops: Tensor, count: int | None = None) -> Tensor:
        """Latents (N, C, F, H, W) before the step of each sample that is the first to have a gradient.

        Args:
            stops: Number (N,) of that step.
            count: Number of steps that are computed, at least the largest of ``stops``, which it is if not given.
                Processes that share a sharded transformer must take equally many.
        """
        with torch.no_grad():
            x = found = self.generator.with_image(self.noise, self.condition)
            for number in range(int(stops.max()) if count is None else count):
                x = self.step(x, torch.full_like(stops, number))
                found = torch.where(expand(stops == number + 1, x), x, found)
        return found


def chain_times(generator: Generator, scheduler: SchedulerMixin, steps: int, x: Tensor) -> Tensor:
    """Times (n + 1,) of a scheduler's n steps, fp32, whose last step is no remainder.

    diffusers' Euler scheduler ends at t = 0.001, so that its last step, from there to 0, changes nothing, and would
    pass on a thousandth of the gradient. It is left out then, and the others are one more in its place.

    Args:
        generator: Generator, which sets the scheduler as its pipeline does.
        scheduler: The pipeline's scheduler, or one like it with another shift.
        steps: Number n of steps.
        x: Latents (N, C, F, H, W), on which the steps of some families depend.
    """
    generator.schedule(scheduler, steps, x)
    times = scheduler.sigmas
    # a schedule that is stretched to a last time of its own has a long last step
    stretched = scheduler.config.get("shift_terminal")
    if steps > 1 and not stretched and times[-2] < 0.5 * (times[-3] - times[-2]):
        generator.schedule(scheduler, steps + 1, x)
        times = torch.cat([scheduler.sigmas[:-2], scheduler.sigmas[-1:]])
    return times.to(x.device, torch.float32)


class Route(ABC):
    """Steps of sampling that have gradients, and the latents that the reward reads. YAML may name other subclasses."""

    clean = True
    """Whether the latents are free of noise, so that they can be decoded."""

    def __repr__(self) -> str:
        """Class and settings."""
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

    @abstractmethod
    def check(self, steps: int) -> None:
        """Refuse a number of sampling steps that the route does not fit.

        Args:
            steps: Number n of steps.

        Raises:
            VideoAlignError: Where it asks for steps that there are not.
        """

    @abstractmethod
    def stops(self, uniform: Tensor, times: Tensor, lowest: float = 0.0) -> Tensor:
        """Number (N,) of the first step of each sample that has a gradient.

        Args:
            uniform: Uniform variables (N,) in [0, 1), one of each sample.
            times: Times (n + 1,) of the chain.
            lowest: Smallest time at which the transformer works: 0, or that of an expert.
        """

    @abstractmethod
    def __call__(self, chain: Chain, x: Tensor, stops: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (N, C, F, H, W) that the reward reads, with gradients, and their times (N,).

        Args:
            chain: Steps of sampling.
            x: Latents (N, C, F, H, W) before the steps ``stops``.
            stops: Number (N,) of the first step that has a gradient.
        """


def _drawn(uniform: Tensor, first: int, last: int) -> Tensor:
    """Whole numbers (N,) from ``first`` to ``last``, both included, by uniform variables (N,) in [0, 1)."""
    return (first + (uniform.double() * (last + 1 - first)).long()).clamp(max=last)


class RandomStep(Route):
    """One step, drawn for each sample; the reward reads the latents behind it, at their own time (PRFL).

    It needs a reward on noisy latents, and neither the rest of sampling nor the autoencoder.

    Args:
        first: Number of the first step that can be drawn, counted from 0.
        last: Number of the last step that can be drawn; the last but one of all if not given, as in PRFL.
    """

    clean = False

    def __init__(self, first: int = 0, last: int | None = None) -> None:
        self.first, self.last = first, last

    def _last(self, steps: int) -> int:
        return steps - 2 if self.last is None else self.last

    def check(self, steps: int) -> None:
        """Refuse steps that are not among those of sampling."""
        if not 0 <= self.first <= self._last(steps) < steps:
            raise VideoAlignError(
                f"model.route: steps {self.first} to {self._last(steps)} are not among the {steps} of model.steps, "
                f"which count from 0 to {steps - 1}; change first and last, or model.steps"
            )

    def stops(self, uniform: Tensor, times: Tensor, lowest: float = 0.0) -> Tensor:
        """Draw the step of each sample among those whose time is the transformer's."""
        last = min(self._last(len(times) - 1), int((times[:-1] >= lowest).sum()) - 1)
        if last < self.first:
            raise VideoAlignError(
                f"model.route: step {self.first} and those behind it begin below t = {lowest:g}, where the other "
                "expert works; lower model.route's first, or raise model.steps"
            )
        return _drawn(uniform, self.first, last)

    def __call__(self, chain: Chain, x: Tensor, stops: Tensor) -> tuple[Tensor, Tensor]:
        """The latents behind the step, and their times."""
        return chain.step(x, stops), chain.times[stops + 1]


class LastSteps(Route):
    """The last K steps of sampling; the reward reads the finished video (DRaFT-K).

    Args:
        count: Number K of steps, at least 1. Each holds its activations until the backward pass.
    """

    def __init__(self, count: int = 1) -> None:
        self.count = count

    def check(self, steps: int) -> None:
        """Refuse more steps than there are."""
        if not 1 <= self.count <= steps:
            raise VideoAlignError(f"model.route.count is {self.count}, but sampling has {steps} steps (model.steps)")

    def stops(self, uniform: Tensor, times: Tensor, lowest: float = 0.0) -> Tensor:
        """Number of the first of the last K steps, for all samples."""
        return torch.full_like(uniform, len(times) - 1 - self.count, dtype=torch.long)

    def __call__(self, chain: Chain, x: Tensor, stops: Tensor) -> tuple[Tensor, Tensor]:
        """The finished latents, at time 0."""
        for ahead in range(self.count):
            x = chain.step(x, stops + ahead)
        return x, chain.times[stops + self.count]


class PredictedEnd(Route):
    """A late step, drawn for each sample; the reward reads the video whose latents it predicts (ReFL).

    Args:
        count: Number of last steps of which one is drawn, at least 1; all of them where there are fewer. ReFL draws
            among the last 10 of 40.
    """

    def __init__(self, count: int = 10) -> None:
        self.count = count

    def check(self, steps: int) -> None:
        """Refuse a count that names no step."""
        if self.count < 1:
            raise VideoAlignError(f"model.route.count must be at least 1, got {self.count}")

    def stops(self, uniform: Tensor, times: Tensor, lowest: float = 0.0) -> Tensor:
        """Draw a step of each sample among the last ones."""
        steps = len(times) - 1
        return _drawn(uniform, max(0, steps - self.count), steps - 1)

    def __call__(self, chain: Chain, x: Tensor, stops: Tensor) -> tuple[Tensor, Tensor]:
        """The predicted latents x - t v, at time 0."""
        t = chain.times[stops]
        end = chain.generator.with_image(x - expand(t, x) * chain.velocity(x, t), chain.condition)
        return end, torch.zeros_like(t)
