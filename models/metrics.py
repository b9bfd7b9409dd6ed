"""Preference metrics for torchmetrics. States are gathered over ranks, so results do not depend on their number."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from .. import VideoAlignError
from . import preference
from .dimensions import DIMENSIONS, OVERALL
from .intervals import LEAST_PROMPTS


class PreferenceAccuracy(Metric):
    r"""Accuracies of reward margins against labels, per dimension and overall.

    For each column: accuracy without ties, with ties at the best threshold (and the always-tie floor that it cannot
    fall below), with ties at a threshold from the other half of the prompts, and bootstrap intervals over prompts; see
    :mod:`videoalign.models.preference`.

    Args:
        scale: Standard deviation (D,) that each dimension's margin is divided by before they are summed to the overall
            margin; ones if not given. It may be set until ``compute``.
        resamples: Number of bootstrap resamples for the intervals; 0 leaves them out.
        kwargs: Further arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> metric = PreferenceAccuracy(resamples=0)
        >>> metric.update(torch.tensor([[1.0, -1.0, 0.5]]), torch.tensor([[1.0, 1.0, 0.0, float("nan")]]))
        >>> {name: row["without_ties"] for name, row in metric.compute().items()}
        {'VQ': 1.0, 'MQ': 0.0, 'TA': nan}
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    margins: list[Tensor] | Tensor
    labels: list[Tensor] | Tensor
    prompts: list[Tensor] | Tensor

    def __init__(self, scale: Tensor | None = None, resamples: int = 1000, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.scale, self.resamples = scale, resamples
        self.add_state("margins", default=[], dist_reduce_fx="cat")
        self.add_state("labels", default=[], dist_reduce_fx="cat")
        self.add_state("prompts", default=[], dist_reduce_fx="cat")  # -1: unknown

    def update(
        self, margins: Tensor, labels: Tensor, valid: Tensor | None = None, prompts: Tensor | None = None
    ) -> None:
        """Add a batch of pairs.

        Args:
            margins: Rewards A minus rewards B, (N, D).
            labels: Labels (N, D + 1), the last column overall: +1 / -1 / 0, NaN where there is none.
            valid: Mask (N,), False for padding; all pairs are valid if not given.
            prompts: Numbers (N,) of the pairs' prompts, int64, from :func:`.intervals.prompt_number`; -1 where the
                prompt is unknown, which makes the pair independent of all others.

        Raises:
            VideoAlignError: Where the shapes do not fit each other.
        """
        d = len(DIMENSIONS)
        if margins.ndim != 2 or margins.shape[1] != d or labels.shape != (len(margins), d + 1):
            raise VideoAlignError(
                f"margins {tuple(margins.shape)} must be (N, {d}) and labels {tuple(labels.shape)} (N, {d + 1})"
            )
        if prompts is not None and prompts.shape != margins.shape[:1]:
            raise VideoAlignError(f"prompts {tuple(prompts.shape)} must be as many as margins {tuple(margins.shape)}")
        keep = torch.ones(len(margins), dtype=torch.bool, device=margins.device) if valid is None else valid
        self.margins.append(margins.detach().float()[keep])
        self.labels.append(labels.detach().float()[keep])
        unknown = torch.full((len(margins),), -1, dtype=torch.long, device=margins.device)
        self.prompts.append((unknown if prompts is None else prompts.to(unknown))[keep])

    def columns(self) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Labels, margins and prompts of the labelled pairs by column, on the CPU."""
        if isinstance(self.margins, list) and not self.margins:
            return {}
        margins, labels, prompts = (dim_zero_cat(state).cpu() for state in (self.margins, self.labels, self.prompts))
        scale = torch.ones(len(DIMENSIONS)) if self.scale is None else self.scale.cpu()
        margins = torch.cat([margins, (margins / scale).sum(1, keepdim=True)], 1)  # (N, D + 1)
        has = ~labels.isnan()
        names = (*DIMENSIONS, OVERALL)
        return {
            name: (labels[kept, i], margins[kept, i], prompts[kept])
            for i, (name, kept) in enumerate(zip(names, has.T))
            if kept.any()
        }

    def compute(self) -> dict[str, dict]:
        """Give the row of :func:`accuracies` for every column that has labels."""
        return {name: accuracies(*column, resamples=self.resamples) for name, column in self.columns().items()}

    def _sync_dist(self, *args: object, **kwargs: object) -> None:
        """Give a rank without pairs empty states of the right width, which gathering needs."""
        for name, width in (("margins", len(DIMENSIONS)), ("labels", len(DIMENSIONS) + 1)):
            if not getattr(self, name):
                setattr(self, name, [torch.empty(0, width, device=self.device)])
        if not self.prompts:
            self.prompts = [torch.empty(0, dtype=torch.long, device=self.device)]
        super()._sync_dist(*args, **kwargs)


def accuracies(labels: Tensor, margins: Tensor, prompts: Tensor | None = None, resamples: int = 1000) -> dict:
    """Accuracies of one column of labels.

    Args:
        labels: Labels (N,): +1, -1 or 0.
        margins: Rewards A minus rewards B, (N,).
        prompts: Whole numbers (N,), equal for pairs of one prompt; -1 where the prompt is unknown, None where all are.
        resamples: Number of bootstrap resamples for the intervals; 0 leaves them out.

    Returns:
        ``without_ties``, ``with_ties``, ``held_out``, ``floor``, ``threshold``, ``margin`` (mean absolute),
        ``interval``, ``interval_with_ties``, ``pairs``, ``decided``; where prompts are known also ``prompts`` and
        ``decided_prompts`` (number of prompts with a pair, and with a decided pair). An interval of fewer than
        :data:`.intervals.LEAST_PROMPTS` known prompts is NaN.
    """
    ties = labels == 0
    known = prompts is not None and bool((prompts >= 0).any())
    if known:
        alone = -1 - torch.arange(len(labels))
        prompts = torch.where(prompts < 0, alone, prompts)
    row = {
        "without_ties": preference.accuracy_without_ties(labels, margins),
        "with_ties": preference.accuracy_with_ties(labels, margins),
        "held_out": preference.held_out_accuracy_with_ties(labels, margins, prompts=prompts if known else None),
        "floor": ties.float().mean().item(),
        "threshold": preference.tie_threshold(labels, margins),
        "margin": math.fsum(margins.abs().tolist()) / len(margins),  # exact, whatever the order
        "pairs": len(labels),
        "decided": int((~ties).sum()),
    }
    if known:
        row |= {"prompts": len(prompts.unique()), "decided_prompts": len(prompts[~ties].unique())}
    for name, with_ties, count in (("interval", False, "decided_prompts"), ("interval_with_ties", True, "prompts")):
        if resamples:
            few, of_pair = row.get(count, LEAST_PROMPTS) < LEAST_PROMPTS, prompts if known else None
            bootstrap = preference.bootstrap_interval
            row[name] = (math.nan,) * 2 if few else bootstrap(labels, margins, with_ties, of_pair, resamples=resamples)
    return row


class Reliability(NamedTuple):
    """Forecasts and outcomes in bins of the forecast probability, as :class:`Calibration` computes them."""

    count: Tensor
    """Number of forecasts (D, bins)."""
    forecast: Tensor
    """Mean forecast (D, bins), NaN where a bin is empty."""
    frequency: Tensor
    """Share of forecasts that came true (D, bins), NaN where a bin is empty."""
    error: Tensor
    """Expected calibration error (D,), NaN without a label."""
    tie: Tensor
    """Mean probability of a tie over all labelled pairs (D,)."""


class Calibration(Metric):
    """Reliability of predicted outcome probabilities: the frequency of outcomes in bins of their forecast probability.

    Every pair gives three forecasts per dimension: of A winning, a tie, and B winning. The expected calibration error
    is the mean distance of the bins' frequency from their mean forecast, weighted by their counts (Naeini et al.,
    2015).

    Args:
        bins: Number of equal bins over [0, 1].
        outcomes: Numbers of the forecasts that count: 0 for A, 1 for a tie, 2 for B. Plain Bradley-Terry has no tie.
        kwargs: Further arguments of :class:`torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    sums: Tensor
    ties: Tensor

    def __init__(self, bins: int = 10, outcomes: tuple[int, ...] = (0, 1, 2), **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.bins, self.outcomes = bins, list(outcomes)
        # count, sum of forecasts, sum of occurrences
        self.add_state("sums", default=torch.zeros(3, len(DIMENSIONS), bins, dtype=torch.double), dist_reduce_fx="sum")
        # labelled pairs, sum of their probabilities of a tie
        self.add_state("ties", default=torch.zeros(2, len(DIMENSIONS), dtype=torch.double), dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, labels: Tensor, valid: Tensor) -> None:
        """Add a batch of pairs.

        Args:
            probabilities: Probabilities (N, D, 3) of A winning, a tie and B winning.
            labels: Labels (N, D): +1 / -1 / 0, NaN where there is none.
            valid: Mask (N,), False for padding.
        """
        came_true = labels[..., None] == torch.tensor([1.0, 0.0, -1.0], device=labels.device)  # (N, D, 3)
        counts = valid[:, None] & ~labels.isnan()  # (N, D)
        self.ties += torch.stack([counts.double(), probabilities[..., 1].double() * counts]).sum(1)
        if 1 not in self.outcomes:
            counts = counts & (labels != 0)
        p, hit = probabilities[..., self.outcomes].double(), came_true[..., self.outcomes].double()
        where = (p * self.bins).long().clamp(0, self.bins - 1)  # (N, D, O)
        weight = counts[..., None].expand_as(p).double()
        one_hot = torch.nn.functional.one_hot(where, self.bins) * weight[..., None]  # (N, D, O, bins)
        self.sums += torch.stack([(one_hot * value[..., None]).sum((0, 2)) for value in (torch.ones_like(p), p, hit)])

    def compute(self) -> Reliability:
        """Give the means per bin and the calibration errors."""
        count, forecasts, hits = self.sums
        forecast, frequency = forecasts / count, hits / count
        error = ((forecast - frequency).abs().nan_to_num() * count).sum(1) / count.sum(1)
        return Reliability(count, forecast, frequency, error, self.ties[1] / self.ties[0])


class RewardMoments(Metric):
    """Mean and standard deviation of raw rewards per dimension, over all valid videos.

    Args:
        kwargs: Further arguments of :class:`torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False

    sums: Tensor

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.add_state("sums", default=torch.zeros(3, len(DIMENSIONS), dtype=torch.double), dist_reduce_fx="sum")

    def update(self, rewards: Tensor, valid: Tensor) -> None:
        """Add a batch of videos.

        Args:
            rewards: Raw rewards (N, D).
            valid: Mask (N,), False for padding.
        """
        kept = rewards.detach().double()[valid]
        self.sums += torch.stack([torch.full_like(kept[:1].sum(0), len(kept)), kept.sum(0), (kept**2).sum(0)])

    def compute(self) -> Tensor:
        """Give mean and standard deviation (2, D), with N in the denominator as for z-scores of a given set.

        A deviation of zero, such as that of a single video, is given as 1, so that normalising stays possible.
        """
        count, total, squares = self.sums
        mean = total / count
        std = (squares / count - mean**2).clamp(min=0).sqrt()
        return torch.stack([mean, torch.where(std > math.sqrt(torch.finfo(std.dtype).eps), std, 1.0)])
