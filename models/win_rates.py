"""How much better a tuned generator's videos are than the reference's, by a reward model.

Legend: P prompts, N noises per prompt, D columns (the dimensions and overall). ``policy[p, i]`` and ``reference[p, i]`` are
rewards of videos from the same prompt and noise.
"""

import math

import torch
from torch import Tensor

from .dimensions import DIMENSIONS, OVERALL
from .finite import require_finite
from .intervals import mean_interval


def win_rates(policy: Tensor, reference: Tensor, resamples: int = 1000, seed: int = 0) -> dict[str, dict]:
    """Win rates by column.

    ``win_rate`` compares videos of the same noise, as the paper does (section 5.2): it counts the smallest shift as a
    win. ``superiority`` compares different noises of the same prompt, P(policy > reference): it needs a shift as large
    as the spread. Equal rewards count half. ``policy`` and ``reference`` are mean rewards. Intervals are 95 %
    bootstraps over prompts (:mod:`.intervals`).

    Args:
        policy: Rewards (P, N, D) of the tuned generator's videos, columns VQ, MQ, TA, Overall.
        reference: Rewards (P, N, D) of the reference's videos.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resamples.

    Raises:
        VideoAlignError: where a reward is not finite: it would count as a loss.

    Returns:
        By column: win_rate, win_rate_interval, superiority (NaN where N is 1), superiority_interval, policy, reference, prompts.
        The interval of a single prompt is NaN.
    """
    require_finite("rewards to compare", {"policy": policy, "reference": reference}, "look at the videos and the judge")
    count = policy.shape[1]
    matched = _won(policy, reference).mean(1)  # (P, D)
    every = _won(policy[:, :, None], reference[:, None])  # (P, N, N, D)
    apart = ~torch.eye(count, dtype=torch.bool)
    unmatched = every[:, apart].mean(1) if count > 1 else torch.full_like(matched, torch.nan)
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


def _won(a: Tensor, b: Tensor) -> Tensor:
    return (a > b).double() + 0.5 * (a == b)


def best_of(scores: Tensor, values: Tensor, draws: float) -> Tensor:
    """Expected values of the best of some samples: those with the highest score among ``draws`` taken without order.

    Exact, over all subsets: the sample of rank r among N (from 1, ascending) is the best of n with probability
    C(r - 1, n - 1) / C(N, n). Between whole numbers the two neighbours are mixed, as a budget would be.

    Args:
        scores: Scores (P, N) that samples are chosen by.
        values: Values (P, N, D) that are asked of the chosen ones.
        draws: Number of samples drawn, in [1, N].

    Returns:
        (P, D).
    """
    count = scores.shape[1]
    if not 1 <= draws <= count:
        raise ValueError(f"the best of {draws} cannot be found among {count} samples")
    require_finite(
        "what the best is chosen by", {"scores": scores, "values": values}, "look at the videos and the judge"
    )
    whole = math.floor(draws)
    share = draws - whole
    ranked = values.double().gather(1, scores.argsort(1)[..., None].expand_as(values))

    def of(n: int) -> Tensor:
        chances = [math.comb(r, n - 1) / math.comb(count, n) for r in range(count)]
        return (ranked * torch.tensor(chances, dtype=torch.float64).view(1, -1, 1)).sum(1)

    return of(whole) if not share else (1 - share) * of(whole) + share * of(whole + 1)
