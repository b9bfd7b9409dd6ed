r"""Preference mathematics: losses, probabilities and accuracies of rated pairs.

Legend: N pairs, D dimensions. A *margin* is reward A minus reward B. A *label* is +1 (A wins), -1 (B wins) or
0 (tie); NaN marks a label that is missing or invalid, which no mean includes.

Bradley-Terry with ties (Rao & Kupper, 1967; VideoAlign, section 3.2) with tie parameter :math:`\theta \ge 1` and
margin d:

.. math::
    P(A) = \sigma(d - \ln\theta), \qquad P(B) = \sigma(-d - \ln\theta), \qquad
    P(\text{tie}) = (\theta^2 - 1)\, P(A)\, P(B)

The three sum to one. :math:`\theta = 1` is plain Bradley-Terry. The paper's Eq. 1 prints another denominator in the
first branch, with which they do not sum to one; this is the form that its code trains.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor

from .. import VideoAlignError
from .intervals import bootstrap

LIKERT_CENTRE = 3.0
"""Middle of the 1-5 score scale; regression trains on scores minus this."""


class LabelLosses(NamedTuple):
    """Losses of labels or scores, one each.

    Attributes:
        values: Losses (N, D); arbitrary finite numbers where ``counted`` is False.
        counted: Mask (N, D), False where the label is missing or its kind takes no part.
    """

    values: Tensor
    counted: Tensor

    def mean(self) -> Tensor:
        """Mean of the counted losses; 0 where there are none."""
        return torch.where(self.counted, self.values, 0.0).sum() / self.counted.sum().clamp(min=1)

    def slot_mean(self) -> Tensor:
        """Sum of the counted losses divided by N x D, the number of places for labels. Training minimises this.

        Every label has the same weight, so that the gradient of a step does not depend on how its samples are cut into
        micro-batches and ranks. A mean over the labels of a micro-batch would give the only label of a pair three times
        the weight of one beside two others.
        """
        return torch.where(self.counted, self.values, 0.0).sum() / self.values.numel()


def check_theta(theta: float) -> float:
    """Refuse a tie parameter for which ties have no probability, and return it otherwise.

    Args:
        theta: Tie parameter of :func:`btt_losses`.

    Raises:
        VideoAlignError: Where it is not above 1 and finite.
    """
    if not (math.isfinite(theta) and theta > 1):
        raise VideoAlignError(
            f"theta is {theta}, but Bradley-Terry with ties needs theta > 1 (at 1 a tie has probability 0). "
            "Set theta to 5, the paper's value, or choose loss: bt."
        )
    return theta


def probabilities(margins: Tensor, theta: float = 1.0) -> Tensor:
    """Probabilities of the three outcomes.

    Args:
        margins: Rewards A minus rewards B, of any shape (...).
        theta: Tie parameter, at least 1; 1 is plain Bradley-Terry without ties.

    Returns:
        Probabilities (..., 3) of A winning, a tie and B winning, which sum to 1.
    """
    a = torch.sigmoid(margins - math.log(theta))
    b = torch.sigmoid(-margins - math.log(theta))
    return torch.stack([a, (theta**2 - 1) * a * b, b], dim=-1)


def bt_losses(margins: Tensor, labels: Tensor, ties: bool = False) -> LabelLosses:
    r"""Bradley-Terry: :math:`-\ln\sigma(d)` for the side that won (VideoAlign, section 3.2).

    Args:
        margins: Rewards A minus rewards B, (N, D).
        labels: Labels (N, D): +1 / -1 / 0, NaN where there is none.
        ties: Whether a tie counts as half a win for each side; otherwise ties are left out.
    """
    # NaN would survive the mask in the backward pass (0 x NaN), so missing labels are numbers from here on
    win_a = (labels.nan_to_num() + 1) / 2  # 1, 0.5 or 0
    losses = -(win_a * F.logsigmoid(margins) + (1 - win_a) * F.logsigmoid(-margins))
    return LabelLosses(losses, _counted(labels, ties))


def btt_losses(margins: Tensor, labels: Tensor, theta: float = 5.0, ties: bool = True) -> LabelLosses:
    """Bradley-Terry with ties (BTT): the negative log-likelihood of the three outcomes (VideoAlign, section 3.2).

    Args:
        margins: Rewards A minus rewards B, (N, D).
        labels: Labels (N, D): +1 / -1 / 0, NaN where there is none.
        theta: Tie parameter, above 1; 5 in the paper. A larger one makes ties more probable.
        ties: Whether ties take part; otherwise they are left out.

    Raises:
        VideoAlignError: Where ``theta`` is not above 1.
    """
    shift = math.log(check_theta(theta))
    log_a = F.logsigmoid(margins - shift)
    log_b = F.logsigmoid(-margins - shift)
    log_tie = log_a + log_b + math.log(theta**2 - 1)
    losses = -torch.where(labels > 0, log_a, torch.where(labels < 0, log_b, log_tie))
    return LabelLosses(losses, _counted(labels, ties))


def reg_losses(rewards: Tensor, scores: Tensor) -> LabelLosses:
    """Regression on absolute scores: the squared error against score - 3 (VideoAlign, section 3.2).

    Args:
        rewards: Raw rewards (N, D).
        scores: Scores (N, D) on the 1-5 Likert scale, NaN where there is none.
    """
    return LabelLosses((rewards - (scores.nan_to_num() - LIKERT_CENTRE)) ** 2, ~scores.isnan())


def _counted(labels: Tensor, ties: bool) -> Tensor:
    """Mask of the labels that take part: all that exist, ties only if they are wanted."""
    return ~labels.isnan() & (ties | (labels != 0))


# --- accuracies -------------------------------------------------------------------------------------------------


def _as_arrays(labels: Sequence | Tensor | np.ndarray, margins: Sequence | Tensor | np.ndarray) -> tuple:
    """Labels and margins as equally long 1-D NumPy arrays; refuses other shapes, unknown labels and NaN."""
    arrays = []
    for values in (labels, margins):
        if isinstance(values, Tensor):
            values = values.detach().cpu()
            values = values.float().numpy() if values.dtype == torch.bfloat16 else values.numpy()
        arrays.append(np.asarray(values))
    labels, margins = arrays
    if labels.ndim != 1 or labels.shape != margins.shape:
        raise VideoAlignError(f"labels {labels.shape} and margins {margins.shape} must be 1-D and equally long")
    if np.isnan(margins.sum(dtype=np.float64)) and np.isnan(margins).any():  # inf - inf also sums to NaN
        count = int(np.isnan(margins).sum())
        raise VideoAlignError(f"{count} of {margins.size} margins are NaN: the rewards are broken")
    if not ((labels == 1) | (labels == -1) | (labels == 0)).all():
        raise VideoAlignError("labels must be +1 (A wins), -1 (B wins) or 0 (tie); leave out missing ones first")
    return labels, margins


def _correct(labels: np.ndarray, margins: np.ndarray) -> np.ndarray:
    """Mask of the decided pairs whose margin has the label's sign."""
    return ((labels > 0) & (margins > 0)) | ((labels < 0) & (margins < 0))


def accuracy_without_ties(labels: Sequence | Tensor, margins: Sequence | Tensor) -> float:
    """Share of decided pairs whose margin has the label's sign.

    Pairs labelled as ties are left out; a margin of exactly zero on a decided pair is wrong.

    Args:
        labels: Labels (N,): +1 / -1 / 0.
        margins: Rewards A minus rewards B, (N,).

    Returns:
        Accuracy in [0, 1]; NaN without a decided pair.

    Example:
        >>> accuracy_without_ties([1, -1, 0, 1], [0.5, -2.0, 3.0, 0.0])
        0.6666666666666666
    """
    labels, margins = _as_arrays(labels, margins)
    decided = np.count_nonzero(labels)
    return float(np.count_nonzero(_correct(labels, margins)) / decided) if decided else math.nan


def accuracy_with_ties(labels: Sequence | Tensor, margins: Sequence | Tensor) -> float:
    """Best three-class accuracy over all tie thresholds (tie calibration; Deutsch et al., 2023).

    A tie is predicted where abs(margin) <= epsilon, otherwise a win by the margin's sign. The optimum over
    every epsilon is exact: "no predicted ties" is a candidate, equal margins fall on the same side. The threshold
    depends on the labels, so the accuracy is never below the share of ties: state that floor beside it.

    O(n log n). Raising epsilon from "none" to e gains the ties with abs(margin) <= e and loses the correctly
    ordered pairs with abs(margin) <= e; wrongly ordered pairs are wrong either way.

    Args:
        labels: Labels (N,): +1 / -1 / 0.
        margins: Rewards A minus rewards B, (N,).

    Returns:
        Accuracy in [0, 1]; NaN without a pair.

    Example:
        >>> accuracy_with_ties([1, -1, 0, 0], [2.0, -1.5, 0.1, -0.4])
        1.0
    """
    labels, margins = _as_arrays(labels, margins)
    if not labels.size:
        return math.nan
    size, right = np.abs(margins.astype(np.float64)), _correct(labels, margins)
    # One sort of ties and correct pairs by abs(margin), ties after correct pairs of the same size: positive doubles are
    # ordered as their bits are, and the sign's bit is free for the flag. The running count of the gain is then highest
    # at the end of a run of equal margins, or was as high before the run.
    tied, correct = size[labels == 0].view(np.uint64) << 1 | 1, size[right].view(np.uint64) << 1
    order = np.sort(np.concatenate([tied, correct])) & 1  # 1 for a tie, 0 for a correct pair
    gained = 2 * np.cumsum(order, dtype=np.int64) - np.arange(1, order.size + 1)
    return float((correct.size + max(0, gained.max(initial=0))) / labels.size)


def tie_threshold(labels: Sequence | Tensor, margins: Sequence | Tensor) -> float:
    """The smallest tie threshold epsilon that reaches :func:`accuracy_with_ties`; -1 if it is best to predict no tie.

    Args:
        labels: Labels (N,): +1 / -1 / 0.
        margins: Rewards A minus rewards B, (N,).
    """
    labels, margins = _as_arrays(labels, margins)
    tied = np.sort(np.abs(margins[labels == 0]))
    correct = np.sort(np.abs(margins[_correct(labels, margins)]))
    gained = np.searchsorted(tied, tied, side="right") - np.searchsorted(correct, tied, side="right")
    return float(tied[gained.argmax()]) if gained.max(initial=0) > 0 else -1.0


def accuracy_at_threshold(labels: Sequence | Tensor, margins: Sequence | Tensor, epsilon: float) -> float:
    """Three-class accuracy with a given tie threshold.

    Args:
        labels: Labels (N,): +1 / -1 / 0.
        margins: Rewards A minus rewards B, (N,).
        epsilon: Tie threshold: a tie is predicted where abs(margin) <= epsilon, and nowhere if it is negative.

    Returns:
        Accuracy in [0, 1]; NaN without a pair.
    """
    labels, margins = _as_arrays(labels, margins)
    tie = np.abs(margins) <= epsilon
    hits = np.where(tie, labels == 0, _correct(labels, margins))
    return float(hits.mean()) if hits.size else math.nan


def held_out_accuracy_with_ties(
    labels: Sequence | Tensor, margins: Sequence | Tensor, seed: int = 0, prompts: Sequence | Tensor | None = None
) -> float:
    """Three-class accuracy with tie thresholds from the other half of the prompts, averaged over both halves.

    Unlike in :func:`accuracy_with_ties`, no pair, and no other pair of its videos, influences the threshold that is
    applied to it. The halves depend on the pairs and the seed, not on the order of the pairs.

    Args:
        labels: Labels (N,): +1 / -1 / 0.
        margins: Rewards A minus rewards B, (N,).
        seed: Seed of the halves.
        prompts: Whole numbers (N,), equal for pairs of one prompt. Without them each pair counts as a prompt of its
            own.

    Returns:
        Accuracy in [0, 1]; NaN below two prompts.
    """
    labels, margins, prompts = _with_prompts(labels, margins, prompts)
    names, of_pair = np.unique(prompts, return_inverse=True)
    if names.size < 2:
        return math.nan
    first = np.isin(of_pair, np.random.default_rng(seed).permutation(names.size)[::2])
    hits = sum(
        accuracy_at_threshold(labels[test], margins[test], tie_threshold(labels[~test], margins[~test])) * test.sum()
        for test in (first, ~first)
    )
    return float(hits / labels.size)


def bootstrap_interval(
    labels: Sequence | Tensor,
    margins: Sequence | Tensor,
    ties: bool,
    prompts: Sequence | Tensor | None = None,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Bootstrap interval of an accuracy, resampling prompts with all of their pairs; see :mod:`.intervals`.

    Args:
        labels: Labels (N,): +1 / -1 / 0.
        margins: Rewards A minus rewards B, (N,).
        ties: True for :func:`accuracy_with_ties` (with a new threshold in every resample), False for
            :func:`accuracy_without_ties`.
        prompts: Whole numbers (N,), equal for pairs of one prompt. Without them each pair counts as a prompt of its
            own, which gives far too narrow an interval where videos occur in several pairs.
        confidence: Share of the resamples inside the interval, in (0, 1).
        resamples: Number of bootstrap resamples.
        seed: Seed of the resamples.

    Returns:
        Lower and upper end; NaN below two prompts with a pair that takes part.

    Raises:
        VideoAlignError: Where the shapes do not fit each other.
    """
    labels, margins, prompts = _with_prompts(labels, margins, prompts)
    if not ties:
        labels, margins, prompts = (values[labels != 0] for values in (labels, margins, prompts))
    clusters, of_pair = np.unique(prompts, return_inverse=True)
    correct = _correct(labels, margins)
    right, pairs = (np.bincount(of_pair, weights, len(clusters)) for weights in (correct, None))
    tied = _gained_by_ties(labels, margins, correct, of_pair, len(clusters)) if ties else lambda times: 0
    return bootstrap(lambda n: (n @ right + tied(n)) / (n @ pairs), len(clusters), confidence, resamples, seed)


def _gained_by_ties(
    labels: np.ndarray, margins: np.ndarray, correct: np.ndarray, prompts: np.ndarray, count: int
) -> Callable[[np.ndarray], np.ndarray]:
    """Function that gives the number of pairs gained by the best threshold, compared with none, in each resample.

    Raising the threshold gains ties and loses correct pairs, in the order of abs(margin). Of equal margins the correct
    pairs come first, so that the running sum is highest where a run of ties ends. One sparse product gives the sums of
    all runs.
    """
    gain = (labels == 0).astype(np.int32) - correct
    order = np.lexsort((gain, np.abs(margins)))
    order = order[gain[order] != 0]
    gain, prompts = gain[order], prompts[order]
    run = np.cumsum(np.diff(gain, prepend=gain[:1]) != 0)
    sums = sparse.csr_matrix((gain, (run, prompts)), shape=(run.max(initial=-1) + 1, count), dtype=np.int32)

    def best(times: np.ndarray) -> np.ndarray:
        gained = np.ascontiguousarray((sums @ np.ascontiguousarray(times.T)).T)  # (R, runs): sums along memory
        return np.cumsum(gained, axis=1, dtype=np.int32, out=gained).max(axis=1, initial=0)

    return best


def _with_prompts(
    labels: Sequence | Tensor, margins: Sequence | Tensor, prompts: Sequence | Tensor | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, margins and prompts (N,) as arrays; without prompts, pairs are sorted by margin and label and numbered.

    So seeded choices do not depend on the order of ranks.

    Raises:
        VideoAlignError: Where the shapes do not fit each other.
    """
    labels, margins = _as_arrays(labels, margins)
    if prompts is None:
        order = np.lexsort((labels, margins))
        return labels[order], margins[order], np.arange(labels.size)
    prompts = np.asarray(prompts)
    if prompts.shape != labels.shape:
        raise VideoAlignError(f"prompts {prompts.shape} must be as many as labels {labels.shape}")
    return labels, margins, prompts
