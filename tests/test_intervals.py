"""Intervals that resample prompts: what they cover, and what is said where prompts are too few."""

import itertools
import json
import math
import time

import numpy as np
import pytest
import torch

from videoalign import VideoAlignError
from videoalign.callbacks.reward_bench import bar_chart, table, too_few_prompts
from videoalign.commands.comparison import _difference
from videoalign.datamodules.benchmark import Benchmark
from videoalign.datamodules.shards import ShardWriter
from videoalign.models.intervals import LEAST_PROMPTS, bootstrap, mean_interval, prompt_number
from videoalign.models.metrics import PreferenceAccuracy
from videoalign.models.preference import accuracy_with_ties, accuracy_without_ties, bootstrap_interval
from videoalign.models.win_rates import win_rates

VIDEOS = 11
ENDS = np.array(list(itertools.combinations(range(VIDEOS), 2)))
"""All pairs of a prompt's videos; each video is in ten of them."""


def rated(prompts, rng):
    """Labels, margins and prompts of videos with random quality, which a judge sees with errors.

    Some prompts are harder for the judge than others.
    """
    quality = rng.normal(size=(prompts, VIDEOS))
    reward = quality + np.exp(0.5 * rng.normal(size=(prompts, 1))) * rng.normal(size=(prompts, VIDEOS))
    true, margin = (values[:, ENDS[:, 0]] - values[:, ENDS[:, 1]] for values in (quality, reward))
    labels = np.where(np.abs(true) < 0.3, 0, np.sign(true))
    return labels.ravel(), margin.ravel(), np.repeat(np.arange(prompts), len(ENDS))


@pytest.mark.parametrize("ties", [False, True])
def test_95_per_cent_intervals_hold_the_truth_in_95_per_cent_of_benchmarks(ties):
    """Intervals from resampling pairs instead of prompts hold it in less than 85 %."""
    rng = np.random.default_rng(0)
    truth = (accuracy_with_ties if ties else accuracy_without_ties)(*rated(20_000, rng)[:2])
    by_prompt, by_pair = [], []
    for _ in range(600):
        labels, margins, prompts = rated(40, rng)
        for held, clusters in ((by_prompt, prompts), (by_pair, None)):
            if clusters is not None or len(by_pair) < 200:
                low, high = bootstrap_interval(labels, margins, ties, clusters, resamples=200)
                held.append(low <= truth <= high)
    assert 0.93 <= np.mean(by_prompt) <= 0.97
    assert np.mean(by_pair) < 0.85


@pytest.mark.parametrize("prompts", [LEAST_PROMPTS, 20])
def test_intervals_of_few_prompts_are_wider_than_plain_quantiles(prompts):
    rng, held = np.random.default_rng(1), []
    truth = accuracy_without_ties(*rated(20_000, rng)[:2])
    for _ in range(500):
        labels, margins, of_pair = rated(prompts, rng)
        low, high = bootstrap_interval(labels, margins, False, of_pair, resamples=200)
        held.append(low <= truth <= high)
    assert 0.92 <= np.mean(held) <= 0.98


@pytest.mark.parametrize("ties", [False, True])
def test_the_interval_is_that_of_resampling_prompts_by_hand(ties):
    """The margins are whole numbers: a threshold inside a run of equal ones would give more."""
    rng = np.random.default_rng(2)
    labels, margins, prompts = rated(25, rng)
    margins, accuracy = np.round(margins), accuracy_with_ties if ties else accuracy_without_ties
    groups = [np.flatnonzero(prompts == p) for p in range(25)]
    drawn = (np.concatenate([groups[p] for p in rng.integers(0, 25, 25)]) for _ in range(2000))
    values = [accuracy(labels[i], margins[i]) for i in drawn]
    reach = math.sqrt(25 / 24) * 1.7109  # t with 24 degrees of freedom, 95 % to one side
    tail = 0.5 * math.erfc(reach / math.sqrt(2))
    got = bootstrap_interval(labels, margins, ties, prompts, confidence=0.9, resamples=4000)
    np.testing.assert_allclose(got, np.quantile(values, [tail, 1 - tail]), atol=0.008)


def test_the_order_of_pairs_and_the_names_of_prompts_do_not_matter():
    labels, margins, prompts = rated(15, np.random.default_rng(3))
    margins, order = np.round(margins, 1), np.random.default_rng(4).permutation(len(labels))
    for ties in (False, True):
        found = bootstrap_interval(labels, margins, ties, prompts, resamples=100)
        again = (labels[order], margins[order], ties, torch.from_numpy(prompts[order]))
        assert bootstrap_interval(*again, resamples=100) == found
        assert bootstrap_interval(labels, margins, ties, 7 * prompts + 2**60, resamples=100) == found


def test_undefined_intervals_are_nan_and_wrong_prompts_refused():
    assert all(map(math.isnan, bootstrap_interval([1, 0], [1.0, 0.0], True, [5, 5])))  # one prompt
    assert all(map(math.isnan, bootstrap_interval([1, 0], [1.0, 0.0], False, [5, 6])))  # one with a decided pair
    assert all(map(math.isnan, mean_interval([0.3])))
    assert all(map(math.isnan, bootstrap_interval([], [], True, [])))
    with pytest.raises(VideoAlignError, match="prompts"):
        bootstrap_interval([1, 0], [1.0, 0.0], True, [1, 2, 3])
    with pytest.raises(VideoAlignError, match="prompts"):
        PreferenceAccuracy().update(torch.zeros(2, 3), torch.zeros(2, 4), prompts=torch.zeros(3, dtype=torch.long))


def test_intervals_of_a_large_benchmark_take_no_second():
    """The size is VideoGen-RewardBench's: four columns, without and with ties, 1000 resamples."""
    rng = np.random.default_rng(0)
    prompts, labels = rng.integers(0, 420, 26_000), rng.choice([-1, 0, 1], (4, 26_000))
    margins = 0.5 * labels + rng.normal(size=labels.shape)
    start = time.process_time()
    for column, values in zip(labels, margins):
        for ties in (False, True):
            bootstrap_interval(column, values, ties, prompts)
    assert time.process_time() - start < 2  # 0.3 s; the old way took 5


def test_all_intervals_are_one_function():
    values = torch.rand(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = bootstrap(lambda times: times @ values.numpy() / 30, 30)
    assert mean_interval(values) == tuple(_difference(values)["interval"]) == expected
    policy = values.view(30, 1, 1).expand(30, 1, 4)
    won = win_rates(policy, torch.full_like(policy, 0.5))
    want = mean_interval((values > 0.5).double())
    assert won["VQ"]["win_rate_interval"] == want == won["Overall"]["win_rate_interval"]
    labels = torch.where(values > 0.4, 1, -1)
    assert bootstrap_interval(labels, torch.ones(30), False, torch.arange(30)) == mean_interval(values > 0.4)


# --- the metric and what it prints ----------------------------------------------------------------


def measured(prompts, cuts=1, known=True, decided=True):
    """A metric that saw prompts with four pairs each."""
    generator, metric = torch.Generator().manual_seed(1), PreferenceAccuracy(resamples=50)
    margins = torch.randn(4 * prompts, 3, generator=generator)
    labels = (
        torch.randint(-1, 2, (4 * prompts, 4), generator=generator).float() if decided else torch.zeros(4 * prompts, 4)
    )
    names = torch.tensor([prompt_number(f"prompt {i // 4}") for i in range(4 * prompts)])
    for rows in torch.arange(4 * prompts).chunk(cuts):
        metric.update(margins[rows], labels[rows], prompts=names[rows] if known else None)
    return metric.compute()


def test_the_metric_resamples_prompts_in_whatever_batches_they_came():
    whole, known, unknown = measured(20), measured(20, cuts=7), measured(20, known=False)
    assert whole == known
    assert whole["VQ"]["prompts"] == 20
    assert whole["VQ"]["decided_prompts"] <= 20
    assert whole["VQ"]["interval"] != unknown["VQ"]["interval"]
    assert "prompts" not in unknown["VQ"]
    assert 0 <= prompt_number("\ud800") < 2**63
    assert prompt_number("a") != prompt_number("b")


def test_too_few_prompts_are_told_in_place_of_an_interval():
    few, enough = measured(LEAST_PROMPTS - 1), measured(LEAST_PROMPTS + 4)
    for kind in ("interval", "interval_with_ties"):
        assert all(map(math.isnan, few["TA"][kind]))
        assert not any(map(math.isnan, enough["TA"][kind]))
    for markdown in (False, True):
        text = table(few, markdown=markdown)
        assert f"fewer than {LEAST_PROMPTS} prompts (VQ without ties of" in text
        assert f"Overall with ties of {LEAST_PROMPTS - 1}" in text
        assert "nan" not in text
        assert "prompts" not in table(enough, markdown=markdown)
    assert too_few_prompts(enough) == "" == too_few_prompts(measured(3, known=False))
    bar_chart("few", few)  # draws bars without ends
    tied = measured(20, decided=False)["VQ"]
    assert tied["decided_prompts"] == 0
    assert math.isnan(tied["interval"][0])
    assert tied["interval_with_ties"] == (1.0, 1.0)


def test_a_benchmark_knows_the_prompt_of_each_pair_with_or_without_the_column(tmp_path):
    for name, more in (("with", {"prompt": "said"}), ("without", {})):
        with ShardWriter(tmp_path / name, "videos") as writer:
            for key in "abc":
                writer.write(key, {"": b"x"}, {"prompt": f"of {key}"})
            writer.write_table(
                "pairs.csv", [{"key_A": a, "key_B": b, "VQ": "A", **more} for a, b in ("ab", "bc", "ca")]
            )
    assert Benchmark(tmp_path / "with").prompts == ["said"] * 3
    assert Benchmark(tmp_path / "without").prompts == ["of a", "of b", "of c"]
    assert json.loads((tmp_path / "with/index.json").read_text())["kind"] == "videos"
