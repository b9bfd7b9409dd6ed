"""DiffusionNFT: policy improvement by matching flows, forward in time (Zheng et al., 2025)."""

import math
from typing import Any

from torch import Tensor

from .. import VideoAlignError
from ..datamodules.prompt_groups import Places
from ..models.policy_losses import nft_losses, optimality
from .on_policy import OnPolicy
from .rollout import Rollout


class DiffusionNFT(OnPolicy):
    r"""DiffusionNFT: good samples pull the velocity towards themselves, bad ones push it away (Zheng et al., 2025).

    .. math:: L = c\,\ell_\text{NFT}(v_\theta, v_\text{old}, p) + \lambda\,\overline{(v_\theta - v_\text{ref})^2}

    with :func:`.nft_losses`, the probability p of :func:`.optimality`, and the largest advantage c. No probability of a
    sample is needed, so that any sampler serves, without guidance. The behaviour policy trails the policy by
    ``old_decay``, which rises by ``old_rise`` an iteration.

    Further metrics: ``optimality`` (mean p), ``drift`` (mean squared difference to the velocity of the behaviour
    policy; a sudden rise precedes a collapse), and ``kl`` (to the reference's) where it counts.

    Args:
        beta: How far the good and the bad velocity are from the old one: 1 in the paper, 0.1 for video in later suites.
        kl: Weight of the squared difference to the reference's velocity, not negative.
        weighted: Whether a sample's error is divided by its mean absolute value, as in the paper.
        old_decay: Largest share of the behaviour policy that is kept after an iteration, in [0, 1); 0.5 in the paper.
        old_rise: Share by which that rises with each iteration, from 0 on; 0.001 in the paper.
        **kwargs: Arguments of :class:`.OnPolicy`.
    """

    needs_reference = True

    def __init__(
        self,
        beta: float = 1.0,
        kl: float = 1e-4,
        weighted: bool = True,
        old_decay: float = 0.5,
        old_rise: float | None = 0.001,
        **kwargs: Any,
    ) -> None:
        super().__init__(old_decay=old_decay, old_rise=old_rise, **kwargs)
        if not (math.isfinite(beta) and beta > 0):
            raise VideoAlignError(f"model.beta must be positive, got {beta}")
        if not (math.isfinite(kl) and kl >= 0):
            raise VideoAlignError(f"model.kl must not be negative, got {kl}")
        self.beta, self.kl, self.weighted = beta, kl, weighted

    def objective(self, rollout: Rollout, places: Places) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses (B,) of samples, and values (B,) to log; arguments as in :meth:`.OnPolicy.objective`."""
        at, advantages = self.batch(rollout, places)
        with self.as_old() as net:
            old = self.velocity(at, net)
        reference = None
        if self.kl:
            with self.as_reference() as net:
                reference = self.velocity(at, net)
        velocity = self.velocity(at)
        x, data, velocity, old = at.counted(at.x, at.data, velocity, old)
        largest = self.advantages.clip
        optimal = optimality(advantages, largest)
        losses = largest * nft_losses(x, at.t, data, velocity, old, optimal, self.beta, self.weighted)
        values = {"optimality": optimal, "drift": (velocity - old).square().flatten(1).mean(1)}
        if reference is not None:
            values["kl"] = (velocity - at.counted(reference)[0]).square().flatten(1).mean(1)
            losses = losses + self.kl * values["kl"]
        return losses, values
