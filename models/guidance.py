r"""Flow-NRG: a reward on noisy latents steers sampling (VideoAlign, section 4.4, Eq. 11).

The sampler aims at :math:`p(x_0|y)\,\exp(w\,r)`. On the path :math:`x_t = (1-t) x_0 + t x_1` velocity and score are
related by :math:`v = a_t x + b_t \nabla \log p_t` with :math:`a_t = -1/(1-t)` and :math:`b_t = -t/(1-t)`. Tilting
:math:`p_t` by :math:`\exp(w\,r(x_t, y, t))` adds :math:`w \nabla r` to the score, hence

.. math:: \tilde v = v - w\, \frac{t}{1-t}\, \nabla_{x_t} r(x_t, y, t)

The second term is added once a step, after classifier-free guidance, and never at t = 1, where the factor has no bound.
With t from 1 to 0 the step is x <- x - dt v, so that the minus here moves x towards higher reward.

The result is exact only for the exact noisy reward :math:`\ln E[\exp(w\,r(x_0)) | x_t]`; Bradley-Terry rewards on
noised pairs approximate it. A reward that reads clean latents gives another approximation, :math:`r(\hat x_0)` at the
predicted end :math:`\hat x_0 = x_t - t v(x_t)` (FreeDoM, Yu et al., 2023), whose gradient goes through the generator
too.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import VideoAlignError
from .dimensions import DIMENSIONS
from .family import Condition
from .flow import expand
from .generator import Steer

Reward = Callable[[Tensor, Tensor], Tensor]
"""Function from latents (B, C, F, H, W) and times (B,) to rewards (B, D)."""


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """When and how strongly a reward steers sampling in Flow-NRG."""

    weights: Mapping[str, float] = field(default_factory=lambda: {"VQ": 1 / 3, "MQ": 1 / 3, "TA": 1 / 3})
    """Weights of the dimensions VQ, MQ and TA in the scalar reward. A dimension without a weight has weight 0; the
    weights need not sum to 1."""
    strength: float = 100.0
    """Guidance strength w, at least 0, for rewards that are z-scored with held-out statistics; 100 in the paper. With 0
    samples are those without guidance, bit for bit."""
    largest_factor: float = 20.0
    """Upper bound of the factor t / (1 - t), above 0. Without a bound it is 49 at t = 0.98 and infinite at t = 1."""
    begin: float = 1.0
    """Largest time t in [0, 1] at which guidance acts. The first step, from pure noise, is never guided."""
    end: float = 0.0
    """Smallest time t in [0, 1] at which guidance acts."""
    largest_share: float | None = None
    """Largest norm of the guidance term as a share of the velocity's norm, per sample; null sets no limit."""
    through: Literal["noisy", "predicted"] = "noisy"
    """Latents that the reward reads: ``noisy`` ones at their own time (Flow-NRG), or the ``predicted`` clean ones at
    time 0 (FreeDoM)."""
    every: int = 1
    """Number of steps from one guided step to the next, at least 1. The strength of a guided step stays the same."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.weights) - set(DIMENSIONS)):
            raise VideoAlignError(f"guidance weights {unknown} are unknown; they are {', '.join(DIMENSIONS)}")
        if not all(math.isfinite(value) for value in (self.strength, *self.weights.values())):
            raise VideoAlignError(f"guidance: strength and weights must be finite, got {self}")
        sizes = self.strength >= 0 and self.largest_factor > 0 and self.every >= 1
        if not (sizes and 0 <= self.end <= self.begin <= 1):
            raise VideoAlignError(
                "guidance: strength >= 0, largest_factor > 0, every >= 1 and 0 <= end <= begin <= 1 are needed, got "
                f"{self}"
            )
        if self.through not in ("noisy", "predicted"):
            raise VideoAlignError(f"guidance.through {self.through!r} is unknown; choose noisy or predicted")
        if self.largest_share is not None and not self.largest_share > 0:
            raise VideoAlignError(f"guidance.largest_share must be positive or null, got {self.largest_share}")

    def acts(self, t: float, step: int) -> bool:
        """Whether guidance changes the velocity of a step.

        Args:
            t: Time of the step, in [0, 1].
            step: Number of the step, counted from 0.
        """
        active = self.strength > 0 and any(self.weights.values())
        # the first step starts from pure noise, also where a scheduler rounds its time to 0.999
        return active and self.end <= t <= self.begin and t < 1 and step > 0 and step % self.every == 0

    def factor(self, t: Tensor) -> Tensor:
        """The factor t / (1 - t) at times (N,), at most :attr:`largest_factor`."""
        return (t / (1 - t).clamp(min=1e-12)).clamp(max=self.largest_factor)

    def __call__(self, reward: Reward, x: Tensor, t: Tensor, velocity: Tensor, clean_frames: int = 0) -> Tensor:
        """Compute the guided velocity (Eq. 11). Gradients are computed here, whatever mode the caller is in.

        Args:
            reward: Function that gives rewards (B, D) of latents.
            x: Noisy latents (B, C, F, H, W).
            t: Times (B,) in [0, 1].
            velocity: Velocity (B, C, F, H, W) after classifier-free guidance.
            clean_frames: Number of first frames that are an image's; they are not steered.

        Returns:
            The guided velocity, in the shape and dtype of ``velocity``.
        """
        weights = torch.tensor([self.weights.get(d, 0.0) for d in DIMENSIONS], dtype=x.dtype, device=x.device)
        # inference tensors cannot take part in a backward pass: clones of them can
        with torch.inference_mode(False), torch.enable_grad():
            x, t = x.detach().clone().requires_grad_(True), t.detach().clone()
            (gradient,) = torch.autograd.grad((reward(x, t) * weights.clone()).sum(), x)
        change = -self.strength * expand(self.factor(t), x) * gradient
        if clean_frames:
            change[:, :, :clean_frames] = 0
        if self.largest_share is not None:
            norms = [v[:, :, clean_frames:].flatten(1).norm(dim=1).clamp(min=1e-12) for v in (velocity, change)]
            change = change * expand((self.largest_share * norms[0] / norms[1]).clamp(max=1.0), x)
        return velocity + change.to(velocity.dtype)


def steering(reward: Any, guidance: Guidance, condition: Condition) -> Steer:
    """What changes the velocities of :meth:`.generator.Generator.sample`, so that a reward steers it.

    Args:
        reward: A :class:`~videoalign.models.noisy_reward.NoisyReward` for the generator.
        guidance: Settings of the guidance.
        condition: Prompts, and images, of the batch.
    """

    def steer(x: Tensor, time: float, v: Tensor, net: nn.Module, step: int) -> Tensor:
        if not guidance.acts(time, step):
            return v

        def view(x: Tensor, t: Tensor) -> Tensor:
            if guidance.through == "predicted":  # without classifier-free guidance: one pass of the generator
                x = x - expand(t, x) * reward.generator.velocity(x, t, condition, net)
                x, t = reward.generator.with_image(x, condition), torch.zeros_like(t)
            return reward.normalise(reward(x, t, condition))

        clean = reward.generator.clean_frames(condition)
        return guidance(view, x, torch.full((len(x),), time, device=x.device), v, clean)

    return steer


@contextlib.contextmanager
def guided(pipeline: Any, reward: Any, guidance: Guidance | None = None, **options: Any) -> Iterator[Any]:
    """Let an unmodified diffusers pipeline sample under guidance during a block.

    The pipeline's scheduler gets the guided velocity, once per step, after classifier-free guidance.

    ``with guided(pipe, reward, weights={"TA": 0.8, "MQ": 0.1, "VQ": 0.1}, strength=100): pipe(prompt)``

    Args:
        pipeline: Pipeline of diffusers that makes videos from prompts with one transformer (Wan or LTX). The samples of
            all others are steered by `videoalign generate`.
        reward: A :class:`~videoalign.models.noisy_reward.NoisyReward` for that pipeline.
        guidance: Settings of the guidance.
        options: Arguments of :class:`Guidance`, instead of ``guidance``.

    Yields:
        The pipeline.

    Raises:
        VideoAlignError: Where both ``guidance`` and ``options`` are given, or the pipeline takes an image or has two
            transformers.
    """
    if guidance is not None and options:
        raise VideoAlignError("guided() takes a Guidance or its arguments, not both")
    guidance = guidance or Guidance(**options)
    family, scheduler = reward.generator, pipeline.scheduler
    if not family.plain_pipeline:
        raise VideoAlignError(
            f"guided() steers pipelines that make videos from prompts with one transformer, and a {family.class_name} "
            "is another: sample with `videoalign generate --noisy-reward`"
        )
    step, encode = scheduler.step, pipeline.encode_prompt
    state: dict[str, Any] = {}

    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        found = encode(*args, **kwargs)
        state["steer"] = steering(reward, guidance, family.encoded(found))
        state["step"] = 0
        return found

    def guided_step(model_output: Tensor, timestep: Tensor, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        time = float(timestep) / scheduler.config.num_train_timesteps
        if guidance.acts(time, state["step"]):
            x, v = (family.unpacked(tensor, state["call"]).float() for tensor in (sample, model_output))
            v = state["steer"](x, time, v, pipeline.transformer, state["step"])
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
