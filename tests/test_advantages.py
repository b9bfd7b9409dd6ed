"""Advantages: against a reference in plain Python, and that equal rewards give exactly nothing."""

import math
import random
from statistics import fmean, pstdev

import pytest
import torch

from videoalign import VideoAlignError
from videoalign.models.advantages import EPSILON, Advantages


def reference(weights, combine, deviation, clip, rewards, groups):
    """The equations, sample by sample."""

    def normalised(values):
        by_group = {g: [v for v, h in zip(values, groups) if h == g] for g in groups}
        spread = {g: pstdev(v) if deviation == "group" else pstdev(values) for g, v in by_group.items()}
        return [(v - fmean(by_group[g])) / (spread[g] + EPSILON) for v, g in zip(values, groups)]

    if combine == "normalise":
        parts = [[w * z for z in normalised(rewards[name])] for name, w in weights.items()]
        whole = [sum(column) for column in zip(*parts)]
    else:
        whole = normalised([sum(w * rewards[n][i] for n, w in weights.items()) for i in range(len(groups))])
    return [max(-clip, min(clip, value)) for value in whole]


def drawn(seed, sizes=(4, 3, 2, 1, 5)):
    rng = random.Random(seed)
    groups = [g for g, size in enumerate(sizes) for _ in range(size)]
    rng.shuffle(groups)
    rewards = {name: [rng.gauss(3, spread) for _ in groups] for name, spread in (("a/VQ", 1), ("a/TA", 40), ("b/x", 1))}
    return rewards, groups


def tensors(rewards, groups):
    made = {name: torch.tensor(values, dtype=torch.float64) for name, values in rewards.items()}
    return made, torch.tensor(groups) * 7 - 3  # any numbers will do


@pytest.mark.parametrize("combine", ["normalise", "sum"])
@pytest.mark.parametrize("deviation", ["group", "global"])
@pytest.mark.parametrize("clip", [5.0, 0.7])
def test_advantages_are_those_of_the_equations(combine, deviation, clip):
    weights = {"a/VQ": 0.5, "a/TA": 2.0, "b/x": -1.0}
    for seed in range(4):
        rewards, groups = drawn(seed)
        made = Advantages(weights=weights, combine=combine, deviation=deviation, clip=clip)
        found, shares = made(*tensors(rewards, groups))
        want = reference(weights, combine, deviation, clip, rewards, groups)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, torch.tensor(want), rtol=1e-5, atol=1e-6)
        assert shares.keys() == weights.keys()
        torch.testing.assert_close(sum(shares.values()), found, rtol=1e-5, atol=1e-6)
        assert found.abs().max() <= clip + 1e-6


@pytest.mark.parametrize("combine", ["normalise", "sum"])
@pytest.mark.parametrize("deviation", ["group", "global"])
@pytest.mark.parametrize("value", [0.1, 1e8 + 0.3, -7.7])
def test_equal_rewards_of_a_group_give_exactly_nothing(combine, deviation, value):
    """The mean of three times 0.1 is not 0.1."""
    rewards = {"a": torch.tensor([value] * 3 + [1.0, 2.0]), "b": torch.tensor([value * 3] * 3 + [0.0, -9.0])}
    groups = torch.tensor([0, 0, 0, 1, 1])
    found, shares = Advantages(weights={"a": 0.3, "b": 0.7}, combine=combine, deviation=deviation)(rewards, groups)
    assert found[:3].tolist() == [0, 0, 0] and found[3:].abs().min() > 0
    assert all(share[:3].tolist() == [0, 0, 0] for share in shares.values())


def test_one_equal_reward_leaves_the_other():
    rewards = {"flat": torch.full((4,), 0.1), "a": torch.tensor([0.0, 1.0, 2.0, 5.0])}
    groups = torch.zeros(4, dtype=torch.long)
    both, shares = Advantages(weights={"flat": 1.0, "a": 1.0})(rewards, groups)
    alone, _ = Advantages(weights={"a": 1.0})(rewards, groups)
    assert torch.equal(both, alone) and not shares["flat"].any()


def test_units_count_in_sums_alone():
    """A hundredfold reward takes the sum over; normalised, it counts as before."""
    rewards, groups = tensors(*drawn(3, sizes=(6, 6)))
    larger = {**rewards, "a/VQ": 100 * rewards["a/VQ"]}
    weights = {"a/VQ": 1.0, "b/x": 1.0}

    def of(given, combine):
        return Advantages(weights=weights, combine=combine)(given, groups)

    torch.testing.assert_close(of(rewards, "normalise")[0], of(larger, "normalise")[0], rtol=1e-3, atol=1e-3)
    assert of(larger, "sum")[1]["b/x"].abs().max() < 0.05 < of(rewards, "sum")[1]["b/x"].abs().max()


def test_rewards_without_a_weight_change_nothing():
    rewards, groups = tensors(*drawn(5))
    made = Advantages(weights={"a/VQ": 1.0})
    held_out = {**rewards, "b/x": torch.full_like(rewards["b/x"], math.nan)}
    assert torch.equal(made(rewards, groups)[0], made(held_out, groups)[0])


def test_the_order_of_samples_does_not_matter():
    rewards, groups = tensors(*drawn(6))
    order = torch.randperm(len(groups))
    made = Advantages(weights={"a/VQ": 1.0, "a/TA": 0.5})
    moved = made({name: values[order] for name, values in rewards.items()}, groups[order])[0]
    torch.testing.assert_close(moved, made(rewards, groups)[0][order])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weights": {}}, "advantages.weights has no reward"),
        ({"weights": {"a": 0.0}}, "advantages.weights has no reward"),
        ({"weights": {"a": math.nan}}, "weights of a must be finite"),
        ({"weights": {"a": 1.0}, "clip": 0.0}, "clip must be above 0"),
        ({"weights": {"a": 1.0}, "clip": math.nan}, "clip must be above 0"),
        ({"weights": {"a": 1.0}, "combine": "mean"}, "combine 'mean' is unknown; choose normalise or sum"),
        ({"weights": {"a": 1.0}, "deviation": "batch"}, "deviation 'batch' is unknown; choose group or global"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, words):
    with pytest.raises(VideoAlignError, match=words):
        Advantages(**settings)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weights": {"a": 1.0, "judge/VX": 1.0}}, "names judge/VX, which no reward gives; there are a"),
        ({"groups": torch.arange(4)}, "each of 4 groups has one sample"),
        ({"groups": torch.zeros(3, dtype=torch.long)}, r"rewards a are \(4,\) for 3 samples"),
        ({"groups": torch.zeros(4)}, "not whole numbers"),
        ({"groups": torch.zeros(2, 2, dtype=torch.long)}, "not whole numbers"),
        ({"rewards": {"a": torch.tensor([1.0, math.nan, 2.0, 3.0])}}, "or hold NaN"),
        ({"rewards": {"a": torch.zeros(0)}, "groups": torch.zeros(0, dtype=torch.long)}, "not whole numbers"),
    ],
)
def test_rewards_that_cannot_be_compared_are_refused(change, words):
    given = {"weights": {"a": 1.0}, "rewards": {"a": torch.arange(4.0)}, "groups": torch.zeros(4, dtype=torch.long)}
    given |= change
    with pytest.raises(VideoAlignError, match=words):
        Advantages(weights=given["weights"])(given["rewards"], given["groups"])


@pytest.mark.parametrize("combine", ["normalise", "sum"])
def test_numbers_that_are_too_large_to_be_compared_are_refused(combine):
    """Of an infinite deviation every advantage would be 0, and training would change nothing."""
    rewards, groups = {"r/x": torch.tensor([1.0, 2.0, 4.0, 8.0])}, torch.tensor([0, 0, 1, 1])
    with pytest.raises(VideoAlignError, match="too large to be compared"):
        Advantages(weights={"r/x": 1e308}, combine=combine)(rewards, groups)
