"""Advantage-weighted matching: policy gradients by the velocity's error (Xue et al., 2025)."""

from typing import Any

import torch
from torch import Tensor

from .. import VideoAlignError
from ..datamodules.prompt_groups import Places
from ..models.number_checks import at_least
from ..models.policy_losses import clipped_losses
from .behaviour import Trailing
from .on_policy import OnPolicy
from .rollout import Rollout


class AWM(OnPolicy):
    r"""Advantage-weighted matching: a sample's velocity error stands in for its negative log-probability.

    .. math:: \rho = \exp(\ell_\text{old} - \ell_\theta), \qquad
        L = \max(-A\rho, -A\,\mathrm{clip}(\rho, 1\pm\epsilon)) + \lambda\,\overline{(v_\theta - v_\text{ref})^2}
            + \mu\,\overline{(v_\theta - v_\text{avg})^2}

    with the mean squared errors of the velocities at the same time and noise (Xue et al., 2025). At the policy that
    sampled, the gradient is A times that of flow matching. v_avg is the velocity of a moving average of the policy
    (:class:`.Trailing`): it slows the policy down, where the reference, which is the base, holds it back. An iteration
    begins with an average near the policy, so that it counts from the second update on; with one update an iteration
    it hardly holds.

    Further metrics: ``ratio``, ``clipped`` (share of the ratios beyond the clip), and ``kl`` and ``kl_average`` where
    they count.

    Args:
        clip: Largest distance of a ratio from 1 that is still learnt from; null for none.
        kl: Weight of the squared difference to the reference's velocity, not negative.
        kl_average: Weight of the squared difference to the velocity of the moving average, not negative. Without a
            clip one of the two must be positive (with one update an iteration, ``kl``): nothing else holds the policy.
        average_decay: Largest share of the average that is kept after an iteration, in [0, 1); the authors' 0.3.
        average_rise: Share by which that rises with each iteration, from 0 on; 0.001 with each update for the authors.
        **kwargs: Arguments of :class:`.OnPolicy`.
    """

    needs_reference = True

    def __init__(
        self,
        clip: float | None = 1e-5,
        kl: float = 0.1,
        kl_average: float = 0.0,
        average_decay: float = 0.3,
        average_rise: float | None = 0.001,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if clip is not None and not 0 < clip < 1:
            raise VideoAlignError(f"model.clip must lie in (0, 1) or be null, got {clip}")
        at_least(0, "model.", kl=kl, kl_average=kl_average)
        average = Trailing(average_decay, average_rise, where="model.average_")
        if kl_average:
            self.trailing["average"] = average
        if clip is None and not kl and not (kl_average and self.updates > 1):
            raise VideoAlignError(
                "model.clip is null and model.kl 0, so that nothing holds the policy (model.kl_average does from the "
                "second of model.updates on); set one"
            )
        self.clip, self.kl, self.kl_average = clip, kl, kl_average

    def objective(self, rollout: Rollout, places: Places) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses (B,) of samples, and values (B,) to log; arguments as in :meth:`.OnPolicy.objective`."""
        at, advantages = self.batch(rollout, places)
        with self.as_old() as net:
            old = self._error(at.counted(self.velocity(at, net), at.target))
        held = {}  # velocities that hold the policy, and their weights
        if self.kl:
            with self.as_reference() as net:
                held["kl"] = self.kl, self.velocity(at, net)
        if self.kl_average:
            with self.as_tensors(self.trailing["average"].tensors) as net:
                held["kl_average"] = self.kl_average, self.velocity(at, net)
        velocity = self.velocity(at)
        ratios = torch.exp(old - self._error(at.counted(velocity, at.target)))
        values = {"ratio": ratios}
        if self.clip is None:
            losses = -advantages.float() * ratios
        else:
            losses = clipped_losses(ratios, advantages.float(), self.clip)
            values["clipped"] = ((ratios - 1).abs() > self.clip).float()
        for name, (weight, theirs) in held.items():
            values[name] = self._error(at.counted(velocity, theirs))
            losses = losses + weight * values[name]
        return losses, values

    @staticmethod
    def _error(pair: tuple[Tensor, ...]) -> Tensor:
        """Mean squared differences (B,) of two velocities, in fp32."""
        return (pair[0].float() - pair[1].float()).square().flatten(1).mean(1)
