r"""Objectives of on-policy training, as functions of velocities, log-probabilities and advantages.

Legend: N samples of an iteration; ... the dimensions of latents. v is the policy's velocity, v_old that of the policy
that sampled; x_0 is a sample, x_t that sample with noise. Velocities predict the sample as
:math:`\hat x_0(v) = x_t - t v`.
"""

import torch
from torch import Tensor

from .flow import expand


def optimality(advantages: Tensor, clip: float = 5.0) -> Tensor:
    r"""Probability (N,) that a sample is a good one, :math:`\tfrac12 + \tfrac12\,\mathrm{clip}(A, \pm c)/c`.

    A sample that is as good as its group (A = 0) has 1/2 (DiffusionNFT; Zheng et al., 2025, section 3.3).

    Args:
        advantages: Advantages (N,).
        clip: Largest advantage c, above 0.
    """
    return 0.5 + 0.5 * advantages.clamp(-clip, clip) / clip


def nft_losses(
    x: Tensor, t: Tensor, data: Tensor, velocity: Tensor, old: Tensor, optimal: Tensor, beta: float, weighted: bool
) -> Tensor:
    r"""DiffusionNFT losses (N,), in fp32 (Zheng et al., 2025, Eq. 5 and section 3.4).

    .. math:: L = \tfrac1\beta\big[p\,\ell(v^+) + (1 - p)\,\ell(v^-)\big], \qquad
        v^+ = (1-\beta)\,v_\text{old} + \beta v, \quad v^- = (1+\beta)\,v_\text{old} - \beta v

    with the mean squared error :math:`\ell` of the predicted sample, over its mean absolute error (which has no
    gradient); or, unweighted, that of the velocity. Unweighted and at v = v_old, the gradient is 2p - 1 times that of
    flow matching. It is the same but for a positive factor where it is weighted.

    Args:
        x: Noisy latents (N, ...).
        t: Their times (N,).
        data: Samples (N, ...).
        velocity: Velocity (N, ...) of the policy.
        old: Velocity (N, ...) of the policy that sampled.
        optimal: Probabilities p (N,) of :func:`optimality`.
        beta: How far the two velocities are from the old one, above 0.
        weighted: Whether each error is divided by its mean absolute value.
    """
    x, data, velocity, old = (one.float() for one in (x, data, velocity, old))
    times, optimal = expand(t.float(), x), optimal.float()
    losses = []
    for sign in (1.0, -1.0):
        error = x - times * ((1 - sign * beta) * old + sign * beta * velocity) - data  # (N, ...)
        if weighted:
            scale = error.detach().abs().flatten(1).mean(1).clamp(min=1e-5)  # (N,)
        else:
            scale = t.float().square().clamp(min=1e-12)
        losses.append(error.square().flatten(1).mean(1) / scale)
    return (optimal * losses[0] + (1 - optimal) * losses[1]) / beta


def clipped_losses(ratios: Tensor, advantages: Tensor, clip: float) -> Tensor:
    r"""PPO's losses (N,), :math:`\max(-A\rho, -A\,\mathrm{clip}(\rho, 1 \pm \epsilon))` (Schulman et al., 2017, Eq. 7).

    Args:
        ratios: Ratios (N,) of probabilities, policy over the one that sampled.
        advantages: Advantages (N,).
        clip: Largest distance of a ratio from 1 that is still learnt from.
    """
    return torch.maximum(-advantages * ratios, -advantages * ratios.clamp(1 - clip, 1 + clip))


def guarded_ratios(change: Tensor, mean: Tensor, old: Tensor, std: Tensor) -> Tensor:
    r"""GRPO-Guard's ratios (N,): log-ratios without their bias, of one scale at all times (Wang et al., 2025).

    A log-ratio is on average :math:`-b`, :math:`b = \overline{(\mu - \mu_\text{old})^2} / 2\sigma^2`, so that ratios
    lie below 1 and are clipped on one side alone; and it is the larger, the smaller the noise of a step is. Hence
    :math:`\rho = \exp((\Delta + b)\,\sigma)`.

    Args:
        change: Log-probabilities (N,) by the policy minus those by the one that sampled.
        mean: Mean (N, ...) of a step of the policy.
        old: Mean (N, ...) of the same step of the policy that sampled.
        std: Standard deviation (N,) of the step.
    """
    bias = (mean.float() - old.float()).square().flatten(1).mean(1) / (2 * std.square())
    return torch.exp((change + bias) * std)
