r"""Advantages: how much better a sample is than the others of its prompt, from one or several rewards.

With rewards :math:`r_k` of weights :math:`w_k`, groups g of samples of one prompt, and :math:`\epsilon = 10^{-4}`:

.. math::
    \text{normalise:}\quad A_i = \sum_k w_k \frac{r_{k,i} - \mu_g(r_k)}{\sigma(r_k) + \epsilon}
    \qquad \text{sum:}\quad A_i = \frac{s_i - \mu_g(s)}{\sigma(s) + \epsilon},\ s = \sum_k w_k r_k

The first makes weights independent of the rewards' units (GDPO, Liu et al., 2026, without its last division by the
deviation of the sums; ``advantage_aggr`` of MixGRPO); in the second a reward of a larger spread counts more
(Flow-GRPO). :math:`\sigma` is the deviation within the sample's group or over all samples. Values are clipped to
:math:`\pm` ``clip`` last.

Legend: N samples, all of a rollout; groups may have different sizes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .. import VideoAlignError
from .number_checks import positive

EPSILON = 1e-4
"""Added to deviations, so that rewards which differ by rounding alone make no advantage."""


@dataclass(frozen=True, kw_only=True)
class Advantages:
    """How rewards of samples become advantages."""

    weights: Mapping[str, float]
    """Weights of rewards by ``REWARD/NAME``, such as ``judge/VQ: 1``. A reward without a weight is only shown, as a
    held-out judge is."""
    combine: Literal["normalise", "sum"] = "normalise"
    """Order of the two steps: ``normalise`` each reward and then sum them (GDPO), or ``sum`` and then normalise."""
    deviation: Literal["group", "global"] = "group"
    """Deviation that advantages are divided by: of the sample's ``group``, or ``global``, of the rewards of all samples
    of the rollout."""
    clip: float = 5.0
    """Largest magnitude of an advantage, above 0."""

    def __post_init__(self) -> None:
        if not self.weights or not any(self.weights.values()):
            raise VideoAlignError("advantages.weights has no reward with a weight; give one, such as judge/VQ: 1")
        if wrong := [name for name, weight in self.weights.items() if not math.isfinite(weight)]:
            raise VideoAlignError(f"advantages.weights of {', '.join(wrong)} must be finite")
        positive("advantages.", clip=self.clip)
        for name, choices in (("combine", ("normalise", "sum")), ("deviation", ("group", "global"))):
            if (value := getattr(self, name)) not in choices:
                raise VideoAlignError(f"advantages.{name} {value!r} is unknown; choose {' or '.join(choices)}")

    def unclipped(self, rewards: Mapping[str, Tensor], groups: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Advantages (N,) before they are clipped, float64 on the CPU, and each reward's share; see :meth:`__call__`.

        Args:
            rewards: Rewards (N,) of all samples of the rollout, by name.
            groups: Number of each sample's group (N,), int64.
        """
        index = self._index(rewards, groups)
        # on the CPU: on a GPU the order of a sum may differ from call to call
        given = {name: rewards[name].detach().double().cpu() for name in self.weights}
        if self.combine == "normalise":
            scale = {name: self._scale(values, index) for name, values in given.items()}
        else:
            total = torch.stack([weight * given[name] for name, weight in self.weights.items()]).sum(0)
            scale = dict.fromkeys(given, self._scale(total, index))
        shares = {name: self.weights[name] * _centred(values, index) * scale[name] for name, values in given.items()}
        whole = torch.stack([*shares.values()]).sum(0)
        if not all(value.isfinite().all() for value in (whole, *scale.values())) or any(
            # of an infinite deviation nothing would be left
            not (self.weights[name] * values).square().sum().isfinite()
            for name, values in given.items()
        ):
            raise VideoAlignError(
                f"advantages.weights {dict(self.weights)} make numbers too large to be compared; make them smaller"
            )
        return whole, shares

    def __call__(self, rewards: Mapping[str, Tensor], groups: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute advantages. They are exactly 0 in a group whose rewards are equal, and where a group has one sample.

        Args:
            rewards: Rewards (N,) of all samples of the rollout, by name.
            groups: Number of each sample's group (N,), int64: the same for all samples of one prompt.

        Returns:
            Advantages (N,), fp32 on the device of ``groups``, and each weighted reward's share of them (N,), by name.
            The shares of a sample sum to its advantage.

        Raises:
            VideoAlignError: Where a weighted reward is missing, or is not finite, shapes differ, or no group has two
                samples.
        """
        whole, shares = self.unclipped(rewards, groups)
        cut = (self.clip / whole.abs()).clamp(max=1.0)
        made = {name: (share * cut).to(groups.device, torch.float32) for name, share in shares.items()}
        return (whole * cut).to(groups.device, torch.float32), made

    def _index(self, rewards: Mapping[str, Tensor], groups: Tensor) -> Tensor:
        """Numbers of groups (N,) from 0 on, after all is checked."""
        if lacking := [name for name in self.weights if name not in rewards]:
            raise VideoAlignError(
                f"advantages.weights names {', '.join(lacking)}, which no reward gives; there are {', '.join(rewards)}"
            )
        if groups.ndim != 1 or groups.is_floating_point() or not len(groups):
            raise VideoAlignError(f"groups are {groups.dtype} {tuple(groups.shape)}, not whole numbers (N,)")
        for name in self.weights:
            if rewards[name].shape != groups.shape or not rewards[name].isfinite().all():
                raise VideoAlignError(
                    f"rewards {name} are {tuple(rewards[name].shape)} for {len(groups)} samples, or hold NaN"
                )
        _, index, sizes = groups.cpu().unique(return_inverse=True, return_counts=True)
        if int(sizes.max()) < 2:
            raise VideoAlignError(
                f"each of {len(sizes)} groups has one sample, so that none is better than another; draw at least 2 "
                "samples of a prompt"
            )
        return index

    def _scale(self, values: Tensor, index: Tensor) -> Tensor:
        """What centred rewards (N,) are multiplied by; 0 in groups of equal values."""
        within = _centred(values, index)
        flat = _per_group(within.abs(), index, "amax") == 0
        if self.deviation == "group":
            deviation = _per_group(within**2, index, "mean").sqrt()
        else:
            deviation = values.std(correction=0).expand_as(values)
        return (1 / (deviation + EPSILON)).masked_fill(flat, 0.0)


def _per_group(values: Tensor, index: Tensor, how: str) -> Tensor:
    """A group's mean or extreme value (N,), at each of its samples."""
    empty = values.new_zeros(int(index.max()) + 1)
    return empty.scatter_reduce(0, index, values, how, include_self=False)[index]


def _centred(values: Tensor, index: Tensor) -> Tensor:
    """Values (N,) minus their group's mean; exactly 0 in groups of equal values, whose mean may be rounded."""
    flat = _per_group(values, index, "amin") == _per_group(values, index, "amax")
    return (values - _per_group(values, index, "mean")).masked_fill(flat, 0.0)
