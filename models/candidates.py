"""Candidates of one video that are sampled side by side: each has its own solver, so that any of them can be dropped,
copied, or moved by a stochastic step, whatever scheduler the pipeline has.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .family import Condition, Step
from .flow import TIMES
from .generator import Generator, Steer
from .shifted_schedule import shifted


class Trajectories(Protocol):
    """What a search moves along the flow: K candidates at the same time.

    Attributes:
        x: Candidates (K, ...).
        times: Times of the steps, descending, and after them the time 0 of the data.
    """

    x: Tensor
    times: Sequence[float]

    def velocity(self, number: int) -> Tensor:
        """Velocity (K, ...) of the candidates.

        Args:
            number: Number of the step, counted from 0.
        """

    def step(self, number: int, velocity: Tensor) -> None:
        """Move the candidates along the flow.

        Args:
            number: Number of the step, counted from 0.
            velocity: Velocity (K, ...) at the candidates.
        """

    def jump(self, number: int, x: Tensor) -> None:
        """Put the candidates where a stochastic step has led them.

        Args:
            number: Number of the step, counted from 0.
            x: Candidates (K, ...) after it.
        """

    def keep(self, rows: Sequence[int]) -> None:
        """Leave some candidates only, or several copies of one.

        Args:
            rows: Numbers of the candidates that are kept, repeated for copies.
        """


class Candidates:
    """Candidates of one video, moved by a generator and copies of its pipeline's scheduler.

    Args:
        generator: The generator.
        condition: Prompt, and image, of the video, with a batch size of 1.
        noise: Noise (K, C, F, H, W) that the candidates begin with.
        steps: Number of scheduler steps.
        cfg_scale: Classifier-free guidance scale; 1 turns it off.
        cfg_scale_2: Scale of the ``low`` expert; ``cfg_scale`` if not given.
        null: Condition of the empty prompt, with a batch size of 1; needed where a scale is above 1.
        shift: Shift of the time steps; the authors' own if not given.
        steer: Makes, of a batch's condition, what changes velocities after classifier-free guidance.
        at_once: Number of candidates whose velocities are computed at once; all of them if not given.

    Attributes:
        x: Candidates (K, C, F, H, W), fp32.
        times: Times of the steps as the scheduler has them, and after them 0.
    """

    def __init__(
        self,
        generator: Generator,
        condition: Condition,
        noise: Tensor,
        steps: int,
        cfg_scale: float = 1.0,
        cfg_scale_2: float | None = None,
        null: Condition | None = None,
        shift: float | None = None,
        steer: Callable[[Condition], Steer] | None = None,
        at_once: int | None = None,
    ) -> None:
        self.generator, self.condition, self.null, self.steer = generator, condition, null, steer
        self.scales = (cfg_scale, cfg_scale if cfg_scale_2 is None else cfg_scale_2)
        self.at_once = at_once or len(noise)
        self.x = self._with_image(noise.float())
        scheduler = generator.pipeline.scheduler
        scheduler = scheduler if shift is None else shifted(scheduler, shift)
        generator.schedule(scheduler, steps, self.x)
        scheduler.set_begin_index(0)
        self._fresh, self.timesteps = copy.deepcopy(scheduler), scheduler.timesteps
        self.times = [*map(float, scheduler.sigmas[: len(self.timesteps)]), 0.0]
        self.solvers = [copy.deepcopy(self._fresh) for _ in noise]

    def rows(self, count: int) -> Condition:
        """The condition of a number of candidates."""
        return _repeated(self.condition, count)

    def _with_image(self, x: Tensor) -> Tensor:
        return self.generator.with_image(x, self.rows(len(x)))

    @torch.no_grad()
    def velocity(self, number: int) -> Tensor:
        """Velocity (K, C, F, H, W) of the candidates, after guidance.

        Args:
            number: Number of the step, counted from 0.
        """
        return torch.cat([self._velocity(number, x) for x in self.x.split(self.at_once)])

    def _velocity(self, number: int, x: Tensor) -> Tensor:
        timestep, boundary = self.timesteps[number], self.generator.boundary
        t = float(timestep) / TIMES
        net, scale = self.generator.expert_at(t), self.scales[bool(boundary and t < boundary)]
        condition = self.rows(len(x))
        null = condition | _repeated(self.null, len(x)) if scale > 1 else None
        times = (timestep.double() / TIMES).expand(len(x))
        sigma = self._fresh.sigmas[number]
        v = self.generator._step_velocity(Step(x, times, sigma, condition, null, scale, net))
        return self.steer(condition)(x, t, v, net, number) if self.steer else v

    def step(self, number: int, velocity: Tensor) -> None:
        """Move each candidate by its own solver.

        Args:
            number: Number of the step, counted from 0.
            velocity: Velocity (K, C, F, H, W) at the candidates.
        """
        moved = [
            solver.step(v, self.timesteps[number], x, return_dict=False)[0]
            for solver, v, x in zip(self.solvers, velocity.split(1), self.x.split(1), strict=True)
        ]
        self.x = self._with_image(torch.cat(moved))

    def jump(self, number: int, x: Tensor) -> None:
        """Put the candidates elsewhere. Their solvers begin anew: what they remember leads to other places.

        Args:
            number: Number of the step that led there, counted from 0.
            x: Candidates (K, C, F, H, W) after the step.
        """
        self.x = self._with_image(x)
        self.solvers = [copy.deepcopy(self._fresh) for _ in x]
        for solver in self.solvers:
            solver.set_begin_index(number + 1)

    def keep(self, rows: Sequence[int]) -> None:
        """Leave some candidates only, or several copies of one.

        Args:
            rows: Numbers of the candidates that are kept, repeated for copies.
        """
        self.x = self.x[list(rows)]
        self.solvers = [copy.deepcopy(self.solvers[row]) for row in rows]


def _repeated(condition: Condition, count: int) -> Condition:
    """A condition with a batch size of 1, for a number of candidates; no memory is copied."""
    return {name: part.expand(count, *part.shape[1:]) for name, part in condition.items()}
