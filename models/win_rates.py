"""Win rates of a tuned generator over its reference, judged by a reward model.

Legend: P prompts, N noises per prompt, D columns (the dimensions and overall). ``policy[p, i]`` and ``reference[p, i]``
are rewards of videos from the same prompt and noise.
"""

import math

import torch
from torch import Tensor

from .dimensions import DIMENSIONS, OVERALL
from .finite import require_finite
from .intervals import mean_interval


def win_rates(policy: Tensor, reference: Tensor, resamples: int = 1000, seed: int = 0) -> dict[str, dict]:
    """Win rates by column.

    ``win_rate`` compares videos of the same noise, as the paper does (section 5.2): even the smallest difference is a
    win. ``superiority`` compares different noises of the same prompt, P(policy > reference): it is high only where the
    difference is as large as the spread. Equal rewards count half. ``policy`` and ``reference`` are mean rewards.
    Intervals are 95 % bootstraps over prompts (:mod:`.intervals`).

    Args:
        policy: Rewards (P, N, D) of the tuned generator's videos, columns VQ, MQ, TA, Overall.
        reference: Rewards (P, N, D) of the reference's videos.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resamples.

    Returns:
        By column: ``win_rate``, ``win_rate_interval``, ``superiority`` (NaN where N is 1), ``superiority_interval``,
        ``policy``, ``reference`` and ``prompts``. The interval of a single prompt is NaN.

    Raises:
        VideoAlignError: Where a reward is not finite: it would count as a loss.
    """
    require_finite("rewards to compare", {"policy": policy, "reference": reference}, "look at the videos and the judge")
    matched, unmatched = _by_prompt(policy, reference)
    result = {}
    for i, column in enumerate((*DIMENSIONS, OVERALL)):
        result[column] = {
            "win_rate": float(matched[:, i].mean()),
            "win_rate_interval": mean_interval(matched[:, i], resamples, seed),
            "superiority": float(unmatched[:, i].mean()),
            "superiority_interval": mean_interval(unmatched[:, i], resamples, seed),
            "policy": float(policy[..., i].mean()),
            "reference": float(reference[..., i].mean()),
            "prompts": len(policy),
        }
    return result


def half_rates(policy: Tensor, reference: Tensor) -> list[dict[str, dict[str, float]]]:
    """Win rates by either half of the noises, which differ by the noise of judging so few videos alone.

    Args:
        policy: Rewards (P, N, D) of the tuned generator's videos, as :func:`win_rates` takes them.
        reference: Rewards (P, N, D) of the reference's videos.

    Returns:
        ``win_rate`` and ``superiority`` by column for noises 0, 2, 4 ... and for 1, 3, 5 ...; empty below four noises,
        because either half needs two.
    """
    if policy.shape[1] < 4:
        return []
    halves = []
    for start in range(2):
        matched, unmatched = (rate.mean(0) for rate in _by_prompt(policy[:, start::2], reference[:, start::2]))
        halves.append(
            {
                column: {"win_rate": float(matched[i]), "superiority": float(unmatched[i])}
                for i, column in enumerate((*DIMENSIONS, OVERALL))
            }
        )
    return halves


def _by_prompt(policy: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Each prompt's rates (P, D) of wins at the same noise, and at other noise; the latter NaN where N is 1."""
    count = policy.shape[1]
    matched = _won(policy, reference).mean(1)
    every = _won(policy[:, :, None], reference[:, None])  # (P, N, N, D)
    apart = ~torch.eye(count, dtype=torch.bool)
    return matched, every[:, apart].mean(1) if count > 1 else torch.full_like(matched, torch.nan)


def _won(a: Tensor, b: Tensor) -> Tensor:
    return (a > b).double() + 0.5 * (a == b)


def best_of(scores: Tensor, values: Tensor, draws: float) -> Tensor:
    """Expected values of the best of n samples, which is the one with the highest score in a random subset.

    The expectation is exact, over all subsets: the sample of rank r among N (from 1, ascending) is the best of n with
    probability C(r - 1, n - 1) / C(N, n). For a fractional n the values of its two neighbours are interpolated.

    Args:
        scores: Scores (P, N) that samples are chosen by.
        values: Values (P, N, D) of the samples.
        draws: Size n of the subset, in [1, N].

    Returns:
        Expected values (P, D).

    Raises:
        ValueError: Where ``draws`` is outside [1, N].
        VideoAlignError: Where a score or value is not finite.
    """
    count = scores.shape[1]
    if not 1 <= draws <= count:
        raise ValueError(f"the best of {draws} cannot be found among {count} samples")
    rows = {"scores": scores, "values": values}
    require_finite("scores and values of samples", rows, "look at the videos and the judge")
    whole = math.floor(draws)
    share = draws - whole
    ranked = values.double().gather(1, scores.argsort(1)[..., None].expand_as(values))

    def of(n: int) -> Tensor:
        chances = [math.comb(r, n - 1) / math.comb(count, n) for r in range(count)]
        return (ranked * torch.tensor(chances, dtype=torch.float64).view(1, -1, 1)).sum(1)

    return of(whole) if not share else (1 - share) * of(whole) + share * of(whole + 1)
