"""Bootstrap intervals that resample prompts.

A benchmark's pairs are not independent: a video stands in about ten of them, and all videos of a prompt share how hard the prompt
is. Resampling pairs takes them for independent, and "95 %" intervals then hold the truth in 59 to 78 % of cases. Here prompts are
drawn with replacement, each with all of its pairs (a cluster bootstrap; Field & Welsh, 2007).
"""

import hashlib
import math
from collections.abc import Callable

import numpy as np
from scipy import stats
from torch import Tensor

LEAST_PROMPTS = 8
"""Prompts below which no interval of a benchmark is shown: "95 %" of eight hold the truth in 93 % of cases, of five in 90 %."""
_BLOCK = 64
"""Resamples that are computed at once; more do not fit the processor's cache."""


def prompt_number(prompt: str) -> int:
    """A number from 0 that stands for a prompt, on every process the same."""
    return int.from_bytes(hashlib.sha256(prompt.encode(errors="surrogatepass")).digest()[:8]) >> 1


def interval(
    statistic: Callable[[np.ndarray], np.ndarray],
    prompts: int,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Expanded percentile interval (Hesterberg, 2015) of a statistic, resampling prompts.

    The quantiles lie as far out as Student's t with one degree of freedom less than prompts, because plain ones are too narrow where
    prompts are few.

    Args:
        statistic: Takes (R, prompts) int32, how often each prompt was drawn in each resample; gives R values.
        prompts: Number of prompts.
        confidence: Share of cases in which the interval is to hold the truth, in (0, 1).
        resamples: Number of bootstrap samples.
        seed: Seed of the resampling.

    Returns:
        Lower and upper end; NaN below two prompts.
    """
    if prompts < 2:
        return math.nan, math.nan
    rng, found = np.random.default_rng(seed), []
    for start in range(0, resamples, _BLOCK):
        count = min(_BLOCK, resamples - start)
        drawn = rng.integers(0, prompts, (count, prompts)) + prompts * np.arange(count)[:, None]
        times = np.bincount(drawn.ravel(), minlength=count * prompts).reshape(count, prompts)
        found.append(statistic(times.astype(np.int32)))
    reach = math.sqrt(prompts / (prompts - 1)) * stats.t.ppf((1 + confidence) / 2, prompts - 1)
    tail = float(stats.norm.cdf(-reach))
    low, high = np.quantile(np.concatenate(found), [tail, 1 - tail])
    return float(low), float(high)


def interval_text(ends: tuple[float, float], digits: int = 3) -> str:
    """An interval as it stands in tables: ``0.812-0.934``, or ``-`` where there is none."""
    return "-" if any(math.isnan(end) for end in ends) else f"{ends[0]:.{digits}f}-{ends[1]:.{digits}f}"


def mean_interval(values: Tensor | np.ndarray, resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of a mean over prompts.

    Args:
        values: (P,) one number for each prompt.
        resamples: Number of bootstrap samples.
        seed: Seed of the resampling; with the same seed, values of the same prompts are drawn alike.
    """
    each = np.asarray(values, dtype=np.float64)
    return interval(lambda times: times @ each / each.size, each.size, resamples=resamples, seed=seed)
