"""Metrics of the benchmarks, and the published numbers of their protocols."""

import math

import numpy as np
import pytest
import torch

from bench_kit import COLUMNS, VOTES, exact, four_way, walk
from videoalign.cli import main
from videoalign.models.benchmark_protocols import PROTOCOLS, accuracy_four_way, official_accuracy_with_ties
from videoalign.models.preference import accuracy_with_ties
from videoalign.models.published import VIDEOREWARD

# --- the official metric --------------------------------------------------------------------------


def random_pairs(seed: int, kind: str) -> tuple[list, list]:
    rng = np.random.default_rng(seed)
    n, tie = int(rng.integers(1, 14)), rng.choice([0.0, 0.3, 0.7])
    labels = rng.choice([-1, 0, 1], n, p=[(1 - tie) / 2, tie, (1 - tie) / 2])
    margins = {
        "repeated": rng.integers(-3, 4, n).astype(float),
        "continuous": rng.normal(size=n),
        "right": labels * rng.integers(1, 3, n) * 1.0,
        "zeros": np.zeros(n),
    }[kind]
    return labels.tolist(), margins.tolist()


@pytest.mark.parametrize("kind", ["repeated", "continuous", "right", "zeros"])
def test_official_metric_is_the_walk(kind):
    for seed in range(150):
        labels, margins = random_pairs(seed, kind)
        got = official_accuracy_with_ties(torch.tensor(labels), torch.tensor(margins, dtype=torch.double))
        assert got == pytest.approx(walk(labels, margins), abs=1e-12)
        assert got >= exact(labels, margins, least=0.0) - 1e-12  # every threshold of its own is among the steps
        assert got >= np.mean(np.array(labels) == 0) - 1e-12  # its last step is the always-tie floor


@pytest.mark.parametrize(
    ("labels", "margins", "official", "best"),
    [
        ([1], [0.5], 0.0, 1.0),  # "no tie at all" is no candidate: lower
        ([1, -1, 0], [0.5, -0.6, 9.0], 1 / 3, 2 / 3),
        ([0, 1], [1.0, 1.0], 1.0, 0.5),  # a threshold inside the run of equal margins: higher
        ([1, 0], [1.0, 1.0], 0.5, 0.5),  # the same pairs in another order
        ([0, -1, 1], [0.0, 0.0, 2.0], 2 / 3, 2 / 3),  # zero margins: the decided one is wrong whatever it is called
    ],
)
def test_official_metric_differs_from_the_exact_one_either_way(labels, margins, official, best):
    assert official_accuracy_with_ties(labels, margins) == pytest.approx(official)
    assert accuracy_with_ties(labels, margins) == pytest.approx(best)


def test_ties_first_inflate_the_official_metric_and_not_the_exact_one():
    rng = np.random.default_rng(0)
    labels, margins = rng.choice([-1, 0, 1], 300), rng.integers(-2, 3, 300).astype(float)
    first = np.argsort(np.abs(labels), kind="stable")
    assert official_accuracy_with_ties(labels[first], margins[first]) > accuracy_with_ties(labels, margins) + 0.05
    last = first[::-1]
    assert official_accuracy_with_ties(labels[last], margins[last]) < accuracy_with_ties(labels, margins) + 0.01


def test_without_repeated_margins_the_two_metrics_differ_by_one_pair_at_most():
    lower = 0
    for seed in range(300):
        labels, margins = random_pairs(seed, "continuous")
        pairs = len(labels) * (accuracy_with_ties(labels, margins) - official_accuracy_with_ties(labels, margins))
        assert round(pairs, 9) in (0, 1)
        lower += pairs > 0.5
    assert 0 < lower < 300


def test_official_metric_of_nothing_is_undefined():
    assert math.isnan(official_accuracy_with_ties([], []))


# --- four-way scoring -----------------------------------------------------------------------------


def random_votes(seed: int, kind: str) -> tuple[list, list, list]:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 12))
    votes = rng.choice(list(VOTES), n, p=rng.dirichlet([1.0] * 4)).tolist()
    if kind == "continuous":
        return votes, rng.normal(size=n).tolist(), rng.normal(size=n).tolist()
    return votes, rng.integers(-2, 3, n).tolist(), rng.integers(-1, 3, n).tolist()


@pytest.mark.parametrize("kind", ["repeated", "continuous"])
def test_four_way_accuracy_is_the_best_of_both_thresholds(kind):
    for seed in range(150):
        votes, margins, levels = random_votes(seed, kind)
        got = accuracy_four_way(votes, torch.tensor(margins, dtype=torch.double), torch.tensor(levels))
        assert got == pytest.approx(four_way(votes, margins, levels), abs=1e-12)
        assert got == accuracy_four_way(votes, margins, [level + 1024 for level in levels])  # the scale's zero is free
        assert got >= max(votes.count("tievote"), votes.count("bothbad_vote")) / len(votes)  # one answer for all


def test_four_way_accuracy_of_a_perfect_scorer_is_one():
    votes = [*VOTES] * 5
    margins = [{"leftvote": 2.0, "rightvote": -2.0}.get(vote, 0.1 * (-1) ** i) for i, vote in enumerate(votes)]
    levels = [{"tievote": 1.5, "bothbad_vote": -1.5}.get(vote, 0.0) for vote in votes]
    assert accuracy_four_way(votes, margins, levels) == 1.0
    assert accuracy_four_way(votes, margins, [-level for level in levels]) < 1.0
    assert math.isnan(accuracy_four_way([], [], []))


# --- protocols ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("benchmark", "column", "method", "cell"),
    [
        ("videogen-rewardbench", "Overall", VIDEOREWARD, (73.59, 61.26)),
        ("videogen-rewardbench", "VQ", "VisionReward", (59.03, 47.43)),
        ("videogen-rewardbench", "MQ", "VideoScore", (51.09, 59.05)),
        ("videogen-rewardbench", "TA", "LiFT", (55.43, 33.79)),
        ("videogen-rewardbench", "TA", "random", (50.40, 37.25)),
        ("genai-bench", "Overall", VIDEOREWARD, (72.89, 49.41)),
        ("genai-bench", "Overall", "VisionReward", (72.41, 51.56)),
    ],
)
def test_published_numbers_are_without_and_with_ties(benchmark, column, method, cell):
    assert PROTOCOLS[benchmark].published[column][method] == cell


@pytest.mark.parametrize(
    ("benchmark", "columns", "pixels", "overall"),
    [("videogen-rewardbench", set(COLUMNS), 448 * 448, "sum"), ("genai-bench", {"Overall"}, 256 * 256, "TA")],
)
def test_protocols_are_whole(benchmark, columns, pixels, overall):
    protocol = PROTOCOLS[benchmark]
    assert set(protocol.columns) == set(protocol.published) == columns
    assert protocol.overall == overall
    assert (protocol.sampling.fps, protocol.sampling.max_pixels) == (2.0, pixels)
    methods = {VIDEOREWARD, "VisionReward", "LiFT", "VideoScore", "random"}
    for column, rows in protocol.published.items():
        assert set(rows) == methods, column
        assert all(0 < with_ties < 100 and 0 < without < 100 for without, with_ties in rows.values())
        assert rows["random"][0] == pytest.approx(50, abs=0.6)
        assert max(rows, key=lambda method: rows[method][0]) == VIDEOREWARD  # without ties; the paper's claim


def test_command_line_knows_the_protocols(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--benchmark", "none", "--model", "m", "--data", "d"])
    message = capsys.readouterr().err
    assert len(PROTOCOLS) == 2
    assert all(name in message for name in PROTOCOLS)
