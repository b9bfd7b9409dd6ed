r"""Objectives of generator alignment, as functions of velocity errors.

Legend: S sides of a pair (preferred, other); N pairs. An *error* is the mean squared error of a velocity
(:func:`.flow.squared_error`) of the policy or of the reference, at the same x_t, t and noise. The implicit reward of a
video measures how much better the policy fits it than the reference does:

.. math:: r = -\tfrac{\beta}{2}\,(e - e^\text{ref})

so that Flow-DPO is Bradley-Terry on implicit rewards (VideoAlign, section 4.2 and Eq. 8).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import VideoAlignError


class BetaSchedule(ABC):
    """Strength of the KL penalty, which ties the policy to its reference, over time. YAML may name other subclasses.

    Args:
        beta: Scale of the schedule, above 0, for errors that are means over elements. The paper uses 500 (Table 10).
    """

    def __init__(self, beta: float = 500.0) -> None:
        if not (math.isfinite(beta) and beta > 0):
            raise VideoAlignError(f"beta is {beta}, but it must be positive: it ties the policy to its reference")
        self.beta = beta

    @abstractmethod
    def __call__(self, t: Tensor) -> Tensor:
        """Beta (N,) at times (N,)."""


class ConstantBeta(BetaSchedule):
    """A beta that is the same at all times, as in the paper's training (section 4.2; beta 500)."""

    def __call__(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.beta)


class QuadraticBeta(BetaSchedule):
    r"""The schedule :math:`\beta (1 - t)^2` of the derivation (Eq. 7).

    It removes the penalty at noisy times, where the paper saw the policy drift and hack the reward (section 4.2).
    """

    def __call__(self, t: Tensor) -> Tensor:
        return self.beta * (1 - t) ** 2


def implicit_rewards(errors: Tensor, reference: Tensor, beta: Tensor) -> Tensor:
    """Implicit rewards (S, N), in fp32.

    Args:
        errors: Errors (S, N) of the policy.
        reference: Errors (S, N) of the reference.
        beta: Strength (N,) of the penalty at the times of the errors.
    """
    return -0.5 * beta.float() * (errors.float() - reference.float())


def dpo_losses(rewards: Tensor) -> Tensor:
    r"""Flow-DPO losses (N,): :math:`-\ln\sigma` of the margin of implicit rewards (VideoAlign, Eq. 8).

    The loss is ln 2 where policy and reference are equal.

    Args:
        rewards: Implicit rewards (2, N), the preferred side first.
    """
    return -F.logsigmoid(rewards[0] - rewards[1])


def ipo_losses(rewards: Tensor, margin: float = 1.0) -> Tensor:
    """Identity-preference losses (N,): squared distance of the margin from a finite one (Azar et al., 2023, Eq. 17).

    Unlike DPO's loss, this one does not push decided pairs apart for ever. Azar et al. write (h - 1 / (2 tau))^2 for
    the margin h at beta 1, so that ``margin`` here is beta / (2 tau).

    Args:
        rewards: Implicit rewards (2, N), the preferred side first.
        margin: Margin of implicit rewards at which the loss is 0.
    """
    return (rewards[0] - rewards[1] - margin) ** 2


@dataclass(frozen=True, kw_only=True)
class RewardWeights:
    """Weights of Flow-RWR: exp(reward / temperature), optionally normalised and clipped.

    The paper gives exp(reward) and no more (VideoAlign, section 4.2).
    """

    temperature: float = 1.0
    """Divisor of the reward, above 0, in the reward's own units (standard deviations with ``normalise``). 1 gives the
    paper's exp(reward); smaller values prefer the best samples more strongly."""
    normalise: bool = True
    """Whether rewards are first z-scored among all samples of the same prompt. Prompts with fewer than four samples are
    z-scored among all samples."""
    clip: float | None = 10.0
    """Largest weight, above 0, before weights are scaled to a mean of 1; null sets no limit."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise VideoAlignError(f"rewards.temperature must be positive, got {self.temperature}")
        if self.clip is not None and not self.clip > 0:
            raise VideoAlignError(f"rewards.clip must be positive or null, got {self.clip}")

    def raw(self, scores: Tensor) -> Tensor:
        """Weights of rewards before they are scaled to a mean of 1.

        Args:
            scores: Rewards of any shape, z-scored or raw.
        """
        weights = torch.exp((scores / self.temperature).clamp(max=80.0))
        return weights if self.clip is None else weights.clamp(max=self.clip)
