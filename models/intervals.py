"""Confidence intervals: over independent runs by Student's t, over a benchmark's prompts by the bootstrap.

A benchmark's pairs are not independent: a video occurs in about ten of them, and all videos of a prompt share how hard
the prompt is. Resampling pairs takes them for independent, and "95 %" intervals then hold the truth in 59 to 78 % of
cases. The bootstrap here draws prompts with replacement, each with all of its pairs (a cluster bootstrap; Field and
Welsh, 2007).
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from torch import Tensor

LEAST_PROMPTS = 8
"""Prompts below which no interval of a benchmark is shown: of eight, "95 %" hold the truth in 93 %, of five in 90 %."""
_BLOCK = 32
"""Resamples that are computed at once; more do not fit the processor's cache."""


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % confidence interval.

    Attributes:
        mean: The number itself, a mean or another estimate.
        low: Lower end of the interval; NaN or -infinity where nothing is known about it.
        high: Upper end of the interval; NaN or infinity where nothing is known about it.
        runs: Values of the independent runs that the number is the mean of; empty where it is no such mean.
    """

    mean: float
    low: float
    high: float
    runs: tuple[float, ...] = ()

    @classmethod
    def over(cls, runs: Sequence[float]) -> "Interval":
        """Mean over independent runs, such as seeds, with the interval of Student's t.

        Args:
            runs: One value per run, at least one. With a single run the interval is infinite.

        Example:
            >>> print(Interval.over([0.5, 0.6, 0.7]), Interval.over([0.5]))
            0.600 ± 0.248 0.500
        """
        mean, half = sum(runs) / len(runs), _half(runs)
        return cls(mean, mean - half, mean + half, tuple(runs))

    @property
    def half(self) -> float:
        """Half the width of an interval over runs; infinite with one run."""
        return _half(self.runs)

    def verdict(self, words: tuple[str, str]) -> str:
        """What an interval over runs says about the sign of its mean.

        Args:
            words: The answer where the whole interval is above 0, and where it is below 0. Otherwise the answer is
                ``undecided`` with the number of runs above 0.
        """
        if self.low > 0:
            return words[0]
        if self.high < 0:
            return words[1]
        agree = sum(value > 0 for value in self.runs)
        return f"undecided ({agree} of {len(self.runs)} seeds for it)"

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + (f" ± {self.half:.3f}" if math.isfinite(self.half) else "")


def _half(runs: Sequence[float]) -> float:
    count, mean = len(runs), sum(runs) / max(len(runs), 1)
    if count < 2:
        return math.inf
    error = math.sqrt(sum((value - mean) ** 2 for value in runs) / (count - 1) / count)
    return student(count) * error


def student(count: int, confidence: float = 0.95) -> float:
    """Standard errors that an interval reaches to each side of a mean, by Student's t.

    Args:
        count: Number of independent values in the mean, at least 2.
        confidence: Share of cases in which the interval is to hold the truth, in (0, 1).
    """
    return float(stats.t.ppf((1 + confidence) / 2, count - 1))


def prompt_number(prompt: str) -> int:
    """A whole number that identifies a prompt; it is at least 0, and the same on every process."""
    return int.from_bytes(hashlib.sha256(prompt.encode(errors="surrogatepass")).digest()[:8]) >> 1


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray],
    prompts: int,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Expanded percentile interval (Hesterberg, 2015) of a statistic, resampling prompts.

    The quantiles lie as far out as Student's t with one degree of freedom less than prompts, because plain ones are too
    narrow where prompts are few.

    Args:
        statistic: Function that takes (R, prompts) int32, how often each prompt was drawn in each resample, and gives
            the R values of the statistic.
        prompts: Number of prompts.
        confidence: Share of cases in which the interval is to hold the truth, in (0, 1).
        resamples: Number of bootstrap samples.
        seed: Seed of the resampling.

    Returns:
        Lower and upper end; NaN below two prompts.
    """
    if prompts < 2:
        return math.nan, math.nan
    rng, values = np.random.default_rng(seed), []
    for start in range(0, resamples, _BLOCK):
        count = min(_BLOCK, resamples - start)
        drawn = rng.integers(0, prompts, (count, prompts)) + prompts * np.arange(count)[:, None]
        times = np.bincount(drawn.ravel(), minlength=count * prompts).reshape(count, prompts)
        values.append(statistic(times.astype(np.int32)))
    reach = math.sqrt(prompts / (prompts - 1)) * student(prompts, confidence)
    tail = float(stats.norm.cdf(-reach))
    low, high = np.quantile(np.concatenate(values), [tail, 1 - tail])
    return float(low), float(high)


def interval_text(ends: tuple[float, float], digits: int = 3) -> str:
    """Both ends as tables show them, such as ``0.812-0.934``; ``-`` where one of them is NaN."""
    return "-" if any(math.isnan(end) for end in ends) else f"{ends[0]:.{digits}f}-{ends[1]:.{digits}f}"


def mean_interval(values: Tensor | np.ndarray, resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of a mean over prompts, by :func:`bootstrap`.

    Args:
        values: (P,) one number for each prompt.
        resamples: Number of bootstrap samples.
        seed: Seed of the resampling; with the same seed, values of the same prompts are drawn alike.

    Returns:
        Lower and upper end; NaN below two prompts.
    """
    each = np.asarray(values, dtype=np.float64)
    return bootstrap(lambda times: times @ each / each.size, each.size, resamples=resamples, seed=seed)
