"""Corrections for many tests, and the number of runs that decides a difference: by brute force and by simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from videoalign.models.evidence import (
    MOST_RUNS,
    Spread,
    best_videos,
    false_decisions,
    holm,
    p_value,
    power,
    runs_needed,
)


def test_the_p_value_is_students():
    runs = (0.1, 0.3, -0.05, 0.2)
    assert p_value(runs) == pytest.approx(stats.ttest_1samp(runs, 0).pvalue)
    assert p_value([-v for v in runs]) == pytest.approx(p_value(runs))
    assert (p_value([0.3]), p_value([0.0, 0.0]), p_value([0.1, 0.1])) == (1, 1, 0)


def test_holm_is_the_closed_test_of_bonferronis():
    """A test is decided where Bonferroni rejects every intersection of hypotheses that it belongs to."""
    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 5, 7):
        p_values = rng.uniform(size=count) ** 3
        subsets = [s for r in range(1, count + 1) for s in itertools.combinations(range(count), r)]
        closed = [max(min(1, len(s) * min(p_values[j] for j in s)) for s in subsets if i in s) for i in range(count)]
        assert holm(list(p_values)) == pytest.approx(closed)
    assert holm([]) == []


def test_holm_decides_ties_alike():
    assert holm([0.02, 0.02, 0.5]) == pytest.approx([0.06, 0.06, 0.5])


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_a_family_without_truth_has_a_false_decision_in_one_of_twenty_studies_at_most(correlation):
    rng, studies, tests, seeds = np.random.default_rng(1), 4000, 8, 5
    shared = rng.normal(size=(studies, 1, seeds))
    values = math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * rng.normal(size=(studies, tests, seeds))
    p_values = stats.ttest_1samp(values, 0, axis=-1).pvalue
    wrong = np.mean([min(holm(list(row))) <= 0.05 for row in p_values])
    assert wrong <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / studies)
    if not correlation:
        assert wrong >= 0.04  # and the correction gives nothing away there


@pytest.mark.parametrize(("tests", "level"), [(1, 0.05), (5, 0.05), (12, 0.3)])
def test_expected_false_decisions_are_those_of_simulated_families(tests, level):
    p_values = np.sort(np.random.default_rng(2).uniform(size=(200_000, tests)))
    steps = level / (tests - np.arange(tests))
    found = np.cumprod(p_values <= steps, axis=1).sum(1)  # step-down ends at the first that is not decided
    assert false_decisions(tests, level) == pytest.approx(found.mean(), abs=4 * found.std() / math.sqrt(len(found)))
    assert false_decisions(tests, level) <= tests * level + 1e-12
    assert false_decisions(0) == 0


@pytest.mark.parametrize(("difference", "deviation", "runs"), [(0.05, 0.04, 5), (0.05, 0.07, 10), (0.02, 0.02, 3)])
def test_power_is_how_often_the_test_decides(difference, deviation, runs):
    values = np.random.default_rng(3).normal(difference, deviation, size=(40_000, runs))
    decided = (stats.ttest_1samp(values, 0, axis=1).pvalue <= 0.05) & (values.mean(1) > 0)
    assert power(difference, deviation, runs) == pytest.approx(decided.mean(), abs=0.01)


def test_the_least_number_of_runs_is_the_least():
    for deviation, difference, level in itertools.product((0.01, 0.05, 0.09), (0.03, 0.05), (0.05, 0.01)):
        runs = runs_needed(deviation, difference, level)
        assert power(difference, deviation, runs, level) >= 0.8
        assert runs == 2 or power(difference, deviation, runs - 1, level) < 0.8
    assert (runs_needed(0.0), runs_needed(50.0), power(0.05, 0.01, 1)) == (2, MOST_RUNS, 0)


def study(rng, seeds, videos, between=0.03, noise=0.4):
    """Runs, and their values by halves of the videos."""
    true = rng.normal(0.1, between, size=seeds)
    each = true[:, None] + rng.normal(0, noise, size=(seeds, videos))
    return each.mean(1), list(zip(each[:, ::2].mean(1), each[:, 1::2].mean(1)))


def test_the_two_parts_of_the_variance_are_told_apart():
    """And the deviation with other numbers of videos is predicted."""
    rng = np.random.default_rng(4)
    spread = Spread.of(*study(rng, 4000, 128), 128)
    assert math.sqrt(spread.within) == pytest.approx(0.4, rel=0.05)
    assert math.sqrt(spread.between) == pytest.approx(0.03, rel=0.1)
    for videos in (32, 512):
        assert spread.deviation(videos) == pytest.approx(np.std(study(rng, 4000, videos)[0]), rel=0.06)
    assert spread.deviation() == pytest.approx(spread.deviation(128))


def test_without_halves_all_variance_is_between_runs():
    runs = [0.1, 0.2, 0.4]
    spread = Spread.of(runs)
    assert spread.deviation() == spread.deviation(10_000) == pytest.approx(np.std(runs, ddof=1))


def test_noise_beyond_the_variance_leaves_nothing_between_runs():
    spread = Spread.of([0.1, 0.1001], [(0.0, 0.2), (0.2, 0.0)], 64)
    assert spread.between == 0 and spread.deviation() == pytest.approx(np.std([0.1, 0.1001], ddof=1))
    assert best_videos(spread, 1000, 1) == math.inf and best_videos(Spread(0.0), 1000, 1) == 1


def test_the_best_number_of_videos_decides_most_for_the_time():
    spread, seconds, each = Spread(0.03**2, 0.4**2, 128), 1800.0, 3.0
    counts = np.arange(1, 5000)
    variances = (spread.between + spread.within / counts) * (seconds + counts * each)  # of the mean, for a total time
    assert best_videos(spread, seconds, each) == pytest.approx(counts[variances.argmin()], abs=1)


def test_a_study_of_the_planned_size_decides_what_it_was_planned_for():
    """From observed variance to seeds, and those seeds simulated."""
    rng = np.random.default_rng(5)
    spread = Spread.of(*study(rng, 2000, 128), 128)
    for videos in (64, 256):
        seeds = runs_needed(spread.deviation(videos), 0.05)
        decided = [p_value(study(rng, seeds, videos)[0] - 0.05) <= 0.05 for _ in range(1500)]  # mean .1 - .05
        assert np.mean(decided) == pytest.approx(0.82, abs=0.06)
