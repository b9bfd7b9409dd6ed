"""Advantage-weighted matching: policy gradients by the velocity's error (Xue et al., 2025)."""

import math
from typing import Any

import torch
from torch import Tensor

from .. import VideoAlignError
from ..datamodules.prompt_groups import Places
from ..models.policy_losses import clipped_losses
from .on_policy import OnPolicy
from .rollout import Rollout


class AWM(OnPolicy):
    r"""Advantage-weighted matching: a sample's velocity error stands in for its negative log-probability.

    .. math:: \rho = \exp(\ell_\text{old} - \ell_\theta), \qquad
        L = \max(-A\rho, -A\,\mathrm{clip}(\rho, 1\pm\epsilon)) + \lambda\,\overline{(v_\theta - v_\text{ref})^2}

    with the mean squared errors of the velocities at the same time and noise (Xue et al., 2025). At the policy that
    sampled, the gradient is A times that of flow matching. The reference is the base, as elsewhere here; the authors'
    0.1 holds to a moving average of the policy.

    Further metrics: ``ratio``, ``clipped`` (share of the ratios beyond the clip), and ``kl`` where it counts.

    Args:
        clip: Largest distance of a ratio from 1 that is still learnt from; null for none.
        kl: Weight of the squared difference to the reference's velocity, not negative. Without a clip it must be
            positive: nothing else holds the policy.
        **kwargs: Arguments of :class:`.OnPolicy`.
    """

    needs_reference = True

    def __init__(self, clip: float | None = 1e-5, kl: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if clip is not None and not 0 < clip < 1:
            raise VideoAlignError(f"model.clip must lie in (0, 1) or be null, got {clip}")
        if not (math.isfinite(kl) and kl >= 0):
            raise VideoAlignError(f"model.kl must not be negative, got {kl}")
        if clip is None and not kl:
            raise VideoAlignError(
                "model.clip is null and model.kl 0, so that nothing holds the policy; set one of them"
            )
        self.clip, self.kl = clip, kl

    def objective(self, rollout: Rollout, places: Places) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses (B,) of samples, and values (B,) to log; arguments as in :meth:`.OnPolicy.objective`."""
        at, advantages = self.batch(rollout, places)
        with self.as_old() as net:
            old = self._error(at.counted(self.velocity(at, net), at.target))
        reference = None
        if self.kl:
            with self.as_reference() as net:
                reference = self.velocity(at, net)
        velocity = self.velocity(at)
        ratios = torch.exp(old - self._error(at.counted(velocity, at.target)))
        values = {"ratio": ratios}
        if self.clip is None:
            losses = -advantages.float() * ratios
        else:
            losses = clipped_losses(ratios, advantages.float(), self.clip)
            values["clipped"] = ((ratios - 1).abs() > self.clip).float()
        if reference is not None:
            mine, theirs = at.counted(velocity, reference)
            values["kl"] = (mine.float() - theirs.float()).square().flatten(1).mean(1)
            losses = losses + self.kl * values["kl"]
        return losses, values

    @staticmethod
    def _error(pair: tuple[Tensor, ...]) -> Tensor:
        """Mean squared differences (B,) of two velocities, in fp32."""
        return (pair[0].float() - pair[1].float()).square().flatten(1).mean(1)
