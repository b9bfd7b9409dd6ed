r"""Flow-NRG: a reward on noisy latents steers sampling (VideoAlign, section 4.4, Eq. 11).

The sampler aims at :math:`p(x_0|y)\,\exp(w\,r)`. On the path :math:`x_t = (1-t) x_0 + t x_1` velocity and score are
related by :math:`v = a_t x + b_t \nabla \log p_t` with :math:`a_t = -1/(1-t)` and :math:`b_t = -t/(1-t)`. Tilting
:math:`p_t` by :math:`\exp(w\,r(x_t, y, t))` adds :math:`w \nabla r` to the score, hence

.. math:: \tilde v = v - w\, \frac{t}{1-t}\, \nabla_{x_t} r(x_t, y, t)

added once a step, after classifier-free guidance, and never at t = 1, where the factor has no bound. With t from 1 to
0 the step is x <- x - dt v, so that the minus here moves x towards higher reward. Exact only for the exact noisy reward
:math:`\ln E[\exp(w\,r(x_0)) | x_t]`; Bradley-Terry rewards on noised pairs are a stand-in. Another one, for a reward that
reads clean latents, is :math:`r(\hat x_0)` of the predicted end :math:`\hat x_0 = x_t - t v(x_t)` (FreeDoM, Yu et al., 2023),
whose gradient goes through the generator too.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from .. import VideoAlignError
from .dimensions import DIMENSIONS
from .flow import expand

Reward = Callable[[Tensor, Tensor], Tensor]
"""Latents (B, C, F, H, W) and times (B,) -> rewards (B, D)."""


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """When and how strongly a reward steers."""

    weights: Mapping[str, float] = field(default_factory=lambda: {"VQ": 1 / 3, "MQ": 1 / 3, "TA": 1 / 3})
    """Of the dimensions in the scalar reward; those not named are 0. They need not sum to 1."""
    strength: float = 100.0
    """w, in units of the held-out rewards' deviation; 100 in the paper. 0 leaves samples as they are, bit for bit."""
    largest_factor: float = 20.0
    """Upper bound of t / (1 - t), which is 49 at t = 0.98 and has no bound at 1."""
    begin: float = 1.0
    """Largest t at which it acts. The first step, from pure noise, is always left out."""
    end: float = 0.0
    """Smallest t at which it acts."""
    largest_share: float | None = None
    """Largest norm of the guidance as a share of the velocity's, per sample; null for none."""
    through: Literal["noisy", "predicted"] = "noisy"
    """What the reward reads: the noisy latents at their time (Flow-NRG), or the predicted clean ones at time 0 (FreeDoM)."""
    every: int = 1
    """Acts in every n-th step, with the same strength each time."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.weights) - set(DIMENSIONS)):
            raise VideoAlignError(f"guidance weights {unknown} are unknown; they are {', '.join(DIMENSIONS)}")
        if not all(math.isfinite(value) for value in (self.strength, *self.weights.values())):
            raise VideoAlignError(f"guidance: strength and weights must be finite, got {self}")
        if (
            not self.strength >= 0
            or not self.largest_factor > 0
            or self.every < 1
            or not 0 <= self.end <= self.begin <= 1
        ):
            raise VideoAlignError(
                f"guidance: strength >= 0, largest_factor > 0, every >= 1 and 0 <= end <= begin <= 1 are needed, got {self}"
            )
        if self.through not in ("noisy", "predicted"):
            raise VideoAlignError(f"guidance.through {self.through!r} is unknown; choose noisy or predicted")
        if self.largest_share is not None and not self.largest_share > 0:
            raise VideoAlignError(f"guidance.largest_share must be positive or null, got {self.largest_share}")

    def acts(self, t: float, step: int) -> bool:
        """Whether it changes the velocity of step number ``step`` (from 0) at time t."""
        active = self.strength > 0 and any(self.weights.values())
        # the first step starts from pure noise, also where a scheduler rounds its time to 0.999
        return active and self.end <= t <= self.begin and t < 1 and step > 0 and step % self.every == 0

    def factor(self, t: Tensor) -> Tensor:
        """t / (1 - t), bounded."""
        return (t / (1 - t).clamp(min=1e-12)).clamp(max=self.largest_factor)

    def __call__(self, reward: Reward, x: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
        """The guided velocity; gradients are computed here whatever mode the caller is in.

        Args:
            reward: of noisy latents. x: (B, C, F, H, W). t: (B,). velocity: of x's shape, after classifier-free guidance.
        """
        weights = torch.tensor([self.weights.get(d, 0.0) for d in DIMENSIONS], dtype=x.dtype, device=x.device)
        # inference tensors cannot take part in a backward pass: clones of them can
        with torch.inference_mode(False), torch.enable_grad():
            x, t = x.detach().clone().requires_grad_(True), t.detach().clone()
            (gradient,) = torch.autograd.grad((reward(x, t) * weights.clone()).sum(), x)
        change = -self.strength * expand(self.factor(t), x) * gradient
        if self.largest_share is not None:
            norms = [v.flatten(1).norm(dim=1).clamp(min=1e-12) for v in (velocity, change)]
            change = change * expand((self.largest_share * norms[0] / norms[1]).clamp(max=1.0), x)
        return velocity + change.to(velocity.dtype)


@contextlib.contextmanager
def guided(pipeline: Any, reward: Any, guidance: Guidance | None = None, **options: Any) -> Iterator[Any]:
    """Within the block, an unmodified diffusers pipeline samples under guidance: its scheduler's ``step`` is given the
    guided velocity, once per step, after classifier-free guidance.

    ``with guided(pipe, reward, weights={"TA": 0.8, "MQ": 0.1, "VQ": 0.1}, strength=100): pipe(prompt)``

    Args:
        pipeline: a Wan or LTX pipeline. reward: a :class:`~videoalign.models.noisy_reward.NoisyReward` of it.
        guidance: when and how strongly; or its arguments as ``options``.
    """
    if guidance is not None and options:
        raise VideoAlignError("guided() takes a Guidance or its arguments, not both")
    guidance = guidance or Guidance(**options)
    family, scheduler = reward.generator, pipeline.scheduler
    step, encode = scheduler.step, pipeline.encode_prompt
    state: dict[str, Any] = {}

    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        found = encode(*args, **kwargs)
        state["condition"] = family.encoded(found)
        state["step"] = 0
        return found

    def view(x: Tensor, t: Tensor) -> Tensor:
        if guidance.through == "predicted":  # without classifier-free guidance: one pass of the generator
            x = x - expand(t, x) * family.velocity(x, t, state["condition"], pipeline.transformer)
            t = torch.zeros_like(t)
        return reward.normalise(reward(x, t, state["condition"]))

    def guided_step(model_output: Tensor, timestep: Tensor, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        time = float(timestep) / scheduler.config.num_train_timesteps
        if guidance.acts(time, state["step"]):
            x, v = (family.unpacked(tensor, state["call"]).float() for tensor in (sample, model_output))
            t = torch.full((len(x),), time, device=x.device)
            v = guidance(view, x, t, v)
            model_output = family.packed(v).to(model_output.dtype)
        state["step"] += 1
        return step(model_output, timestep, sample, *args, **kwargs)

    def look(transformer: Any, args: tuple, kwargs: dict) -> None:
        state["call"] = kwargs

    hook = pipeline.transformer.register_forward_pre_hook(look, with_kwargs=True)
    scheduler.step, pipeline.encode_prompt = guided_step, encode_prompt
    try:
        yield pipeline
    finally:
        hook.remove()
        del scheduler.step, pipeline.encode_prompt  # the classes' own come back
