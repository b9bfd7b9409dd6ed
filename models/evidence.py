"""How much evidence runs give: corrections for many tests, and the number of runs that decides a difference.

A number of a study, such as a difference of two win rates, has one value per seed. Its variance over seeds has two
parts: ``w^2 = s_between^2 + s_within^2 / videos``. The first part is what seeds differ in (world, weights, prompts),
the second is the noise of judging only so many videos. More videos shrink the second part alone, more seeds both.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

MOST_RUNS = 1000
"""Numbers of runs beyond this one are not looked for."""


def p_value(runs: Sequence[float]) -> float:
    """Two-sided p-value of Student's t-test that the mean over independent runs is 0.

    Args:
        runs: One value per run.

    Returns:
        The p-value in [0, 1]; 1 with fewer than two runs, which say nothing of their spread.
    """
    if len(runs) < 2:
        return 1.0
    mean, error = sum(runs) / len(runs), math.sqrt(_variance(runs) / len(runs))
    if not error:
        return float(mean == 0)
    return float(2 * stats.t.sf(abs(mean) / error, len(runs) - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values of a family of tests by Holm's step-down method (1979).

    A test is decided where its adjusted value is at most the level. The probability of any false decision in the family
    is then at most the level, however the tests depend on each other.

    Args:
        p_values: One p-value per test, each in [0, 1].

    Example:
        >>> holm([0.04, 0.01, 0.03])
        [0.06, 0.03, 0.06]
    """
    adjusted, least = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        least = max(least, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = least
    return adjusted


def false_decisions(tests: int, level: float = 0.05) -> float:
    """Expected number of tests that Holm's method decides in a family in which nothing is true.

    It is exact for independent tests. Their p-values are uniform, and at least k of them are decided where, for every i
    up to k, at least i of them are no larger than ``level / (tests - i + 1)``. These probabilities are added up over k.
    However the tests depend on each other, a family has a false decision with probability ``level`` at most.

    Args:
        tests: Number of tests in the family.
        level: Level of the method, in (0, 1).
    """
    expected, before = 0.0, 0.0
    below = {0: 1.0}  # probabilities of the numbers of p-values below the bound, given that all steps so far went on
    for step in range(1, tests + 1):
        bound = level / (tests - step + 1)
        share = (bound - before) / (1 - before)
        after: dict[int, float] = {}
        for count, chance in below.items():
            for more in range(tests - count + 1):
                if count + more >= step:
                    gain = chance * float(stats.binom.pmf(more, tests - count, share))
                    after[count + more] = after.get(count + more, 0.0) + gain
        below, before = after, bound
        expected += sum(below.values())
    return expected


# --- power ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Variance of a number over runs, split into its two parts.

    Attributes:
        between: Variance between runs that each had infinitely many videos.
        within: Variance within a run, times its number of videos; 0 where it is not known, and all variance counts as
            between.
        videos: Number of videos of each run from which the parts were estimated.
    """

    between: float
    within: float = 0.0
    videos: int = 1

    @classmethod
    def of(cls, runs: Sequence[float], halves: Sequence[tuple[float, float]] = (), videos: int = 1) -> "Spread":
        """Estimate both parts from runs.

        A run's number, computed from each half of its videos alone, differs between the halves by noise alone: the
        variance of that difference is four times the variance within the whole run, and its mean is 0.

        Args:
            runs: One value per run, at least two.
            halves: The value of each run by either half of its videos; empty where there are none.
            videos: Number of videos of each run.
        """
        total = _variance(runs)
        noise = sum((a - b) ** 2 for a, b in halves) / (4 * len(halves)) if halves else 0.0
        noise = min(noise, total)
        return cls(total - noise, noise * videos, videos)

    def deviation(self, videos: int | None = None) -> float:
        """Standard deviation over runs.

        Args:
            videos: Number of videos of each run; as many as it was estimated from if not given.
        """
        return math.sqrt(self.between + self.within / (videos or self.videos))


def power(difference: float, deviation: float, runs: int, level: float = 0.05) -> float:
    """Probability that Student's two-sided t-test decides a difference for what it is.

    Args:
        difference: The true mean over runs, above 0.
        deviation: Standard deviation over runs.
        runs: Number of runs.
        level: Level of the test, in (0, 1).
    """
    if runs < 2:
        return 0.0
    if not deviation:
        return 1.0
    reach = stats.t.ppf(1 - level / 2, runs - 1)
    return float(stats.nct.sf(reach, runs - 1, difference * math.sqrt(runs) / deviation))


def runs_needed(deviation: float, difference: float = 0.05, level: float = 0.05, chance: float = 0.8) -> int:
    """The least number of runs with which a difference is decided with some probability; :data:`MOST_RUNS` at most.

    Args:
        deviation: Standard deviation over runs.
        difference: The true mean over runs, above 0.
        level: Level of the test, in (0, 1).
        chance: The probability, in (0, 1).
    """
    low, high = 2, MOST_RUNS
    while low < high:  # power rises with the number of runs
        middle = (low + high) // 2
        low, high = (low, middle) if power(difference, deviation, middle, level) >= chance else (middle + 1, high)
    return low


def best_videos(spread: Spread, seconds: float, seconds_per_video: float) -> float:
    """Number of videos per run that decides most for the same time (two-stage sampling; Cochran, 1977, section 10.6).

    A run costs ``seconds + videos * seconds_per_video``. For a given total the variance of the mean over runs is least
    at ``sqrt(within / between * seconds / seconds_per_video)``.

    Args:
        spread: The two parts of the variance.
        seconds: Seconds of a run before its first judged video.
        seconds_per_video: Seconds of sampling and judging one video.

    Returns:
        The number, at least 1; infinite where runs do not differ but for noise.
    """
    if not spread.between:
        return math.inf if spread.within else 1.0
    return max(1.0, math.sqrt(spread.within / spread.between * seconds / seconds_per_video))


def _variance(runs: Sequence[float]) -> float:
    mean = sum(runs) / len(runs)
    return sum((value - mean) ** 2 for value in runs) / (len(runs) - 1)
