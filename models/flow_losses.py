r"""Objectives of generator alignment, as functions of velocity errors.

Legend: S sides of a pair (preferred, other); N pairs. An *error* is the mean squared error of a velocity
(:func:`.flow.squared_error`) of the policy or of the reference, at the same x_t, t and noise. The implicit reward of a
video is how much better the policy fits it than the reference does:

.. math:: r = -\tfrac{\beta}{2}\,(e - e^\text{ref})

so that Flow-DPO is Bradley-Terry on implicit rewards (VideoAlign, section 4.2 and Eq. 8).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import VideoAlignError


class BetaSchedule:
    """Strength of the tie to the reference over time; a subclass of your own may be named in YAML.

    Args:
        beta: its scale, for errors that are means over elements.
    """

    def __init__(self, beta: float = 500.0) -> None:
        if not (math.isfinite(beta) and beta > 0):
            raise VideoAlignError(f"beta is {beta}, but it must be positive: it ties the policy to its reference")
        self.beta = beta

    def __call__(self, t: Tensor) -> Tensor:
        """(N,) from times (N,)."""
        raise NotImplementedError


class ConstantBeta(BetaSchedule):
    """The same at all times: what the paper trains with (section 4.2; beta 500)."""

    def __call__(self, t: Tensor) -> Tensor:
        """beta."""
        return torch.full_like(t, self.beta)


class QuadraticBeta(BetaSchedule):
    r""":math:`\beta (1 - t)^2`: what the derivation gives (Eq. 7). The paper found that it lets noisy times drift."""

    def __call__(self, t: Tensor) -> Tensor:
        """beta (1 - t)^2."""
        return self.beta * (1 - t) ** 2


def implicit_rewards(errors: Tensor, reference: Tensor, beta: Tensor) -> Tensor:
    """(S, N) implicit rewards of errors (S, N), in fp32. ``beta``: (N,)."""
    return -0.5 * beta.float() * (errors.float() - reference.float())


def dpo_losses(rewards: Tensor) -> Tensor:
    """(N,) -ln sigmoid of the margin of implicit rewards (2, N): ln 2 where policy and reference are equal."""
    return -F.logsigmoid(rewards[0] - rewards[1])


def ipo_losses(rewards: Tensor, margin: float = 1.0) -> Tensor:
    """(N,) squared distance of the margin of implicit rewards (2, N) from a finite one.

    The identity-preference loss (Azar et al., 2023, Eq. 17): unlike DPO's, it does not push decided pairs apart for ever.
    Azar et al. write (h - 1 / (2 tau))^2 for the margin h at beta 1: here margin is beta / (2 tau).
    """
    return (rewards[0] - rewards[1] - margin) ** 2


@dataclass(frozen=True, kw_only=True)
class RewardWeights:
    """Weights of Flow-RWR: exp(r / temperature), made safe (VideoAlign, section 4.2 gives exp(r) and no more)."""

    temperature: float = 1.0
    """In units of the (normalised) reward: the paper's exp(r) at 1."""
    normalise: bool = True
    """z-score rewards among all samples of the same prompt first (prompts with fewer than four: among all samples)."""
    clip: float | None = 10.0
    """Largest weight before they are scaled to mean 1; null for none."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise VideoAlignError(f"rewards.temperature must be positive, got {self.temperature}")
        if self.clip is not None and not self.clip > 0:
            raise VideoAlignError(f"rewards.clip must be positive or null, got {self.clip}")

    def raw(self, scores: Tensor) -> Tensor:
        """Weights of z-scored or raw rewards, before scaling."""
        weights = torch.exp((scores / self.temperature).clamp(max=80.0))
        return weights if self.clip is None else weights.clamp(max=self.clip)
