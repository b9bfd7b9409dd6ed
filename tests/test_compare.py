"""Ways of sampling side by side: best-of-N, guidance through the predicted end, `videoalign compare`, the noisy reward on two processes."""

import functools
import itertools
import json
import math
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from diffusers.training_utils import _collate_lora_metadata
from matplotlib import pyplot as plt
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import videoalign
from videoalign import VideoAlignError
from videoalign.alignment import NoisyRewardModel
from videoalign.cli import main
from videoalign.commands import arms as module
from videoalign.commands.arms import Arm, Sweep
from videoalign.commands.comparison import COLUMNS, Judged, bars, film, found_of, table, trade_off
from videoalign.datamodules.encode_list import ClipSize
from videoalign.datamodules.latents import NULL, LatentPairs
from videoalign.datamodules.shards import ShardSet, ShardWriter, sha256
from videoalign.datamodules.video import decode
from videoalign.miniature.networks.pipelines import make_generator
from videoalign.miniature.world.oracle import Oracle
from videoalign.miniature.world.sprites import SCENES
from videoalign.models import VideoReward
from videoalign.models.generator import Generator
from videoalign.models.generator_folder import load_generator
from videoalign.models.guidance import Guidance, guided
from videoalign.models.noisy_reward import NoisyReward, NoisyRewardShape
from videoalign.models.video_reward import Statistics
from videoalign.models.win_rates import best_of

DIMENSIONS = ("VQ", "MQ", "TA")
PROMPTS = [content.prompt for content in SCENES[:2]]
SAMPLES = 2


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


# --- best of N ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [1, 2, 3, 4, 5])
def test_best_of_is_the_mean_over_all_subsets(draws):
    scores, values = randn(3, 5), randn(3, 5, 4, seed=1)
    want = torch.zeros(3, 4, dtype=torch.float64)
    for p in range(3):
        chosen = [values[p, max(s, key=lambda i: scores[p, i])] for s in itertools.combinations(range(5), draws)]
        want[p] = torch.stack(chosen).mean(0)
    torch.testing.assert_close(best_of(scores, values, draws), want)


def test_one_draw_is_the_mean_and_all_draws_the_best():
    scores, values = randn(4, 6), randn(4, 6, 4, seed=1)
    torch.testing.assert_close(best_of(scores, values, 1), values.mean(1))
    assert torch.equal(best_of(scores, values, 6), values[torch.arange(4), scores.argmax(1)])


def test_own_values_rise_with_the_draws_and_those_of_others_need_not():
    scores = randn(50, 6)
    values = torch.stack([scores, -scores, torch.ones_like(scores)], -1)
    means = torch.stack([best_of(scores, values, n).mean(0) for n in range(1, 7)])
    assert (means[:, 0].diff() > 0).all() and (means[:, 1].diff() < 0).all()
    torch.testing.assert_close(means[:, 2], torch.ones(6, dtype=torch.float64))


def test_between_whole_draws_the_neighbours_are_mixed():
    scores, values = randn(3, 4), randn(3, 4, 4, seed=1)
    for whole, share in itertools.product((1, 2, 3), (0.25, 0.5, 0.9)):
        mixed = (1 - share) * best_of(scores, values, whole) + share * best_of(scores, values, whole + 1)
        torch.testing.assert_close(best_of(scores, values, whole + share), mixed)


@pytest.mark.parametrize("draws", [0, 0.99, 4.01, 5, -1, math.nan])
def test_more_draws_than_samples_or_less_than_one_raise(draws):
    with pytest.raises(ValueError, match="among 4 samples"):
        best_of(randn(3, 4), randn(3, 4, 4), draws)


def test_float_rewards_are_summed_in_double():
    scores, values = randn(2, 3), torch.full((2, 3, 4), 0.1)
    assert best_of(scores, values, 2).dtype == torch.float64


# --- guidance through the predicted end: analytic generators -----------------------------------------------------------


class Net(torch.nn.Module):
    """A transformer whose velocity is a function of latents and times."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, t):
        return self.function(x, t)


class View:
    """A reward that is a function of latents and times, and a family without a text encoder."""

    def __init__(self, function):
        self.function, self.times = function, []
        self.generator = SimpleNamespace(
            velocity=lambda x, t, condition, net: net(x, t),
            encoded=lambda found: found,
            unpacked=lambda x, call: x,
            packed=lambda x: x,
        )

    def __call__(self, x, t, condition):
        self.times.append(t.clone())
        value = self.function(x)
        return value if value.ndim == 2 else torch.stack([value, 0 * value, 0 * value], 1)

    def normalise(self, rewards):
        return rewards


class Euler:
    """A scheduler of so many equal steps from 1 to 0."""

    config = SimpleNamespace(num_train_timesteps=1000)

    def __init__(self, steps):
        self.steps, self.seen = steps, []

    def step(self, velocity, timestep, x):
        self.seen.append(velocity)
        return x - velocity / self.steps


def toy(velocity, steps):
    return SimpleNamespace(transformer=Net(velocity), scheduler=Euler(steps), encode_prompt=lambda: {})


def integrate(velocity, reward, x, steps=1000, **options):
    """What a pipeline of this velocity makes of noise x under guidance."""
    pipeline, view = toy(velocity, steps), View(reward)
    with guided(pipeline, view, weights={"VQ": 1.0}, largest_factor=math.inf, **options), torch.no_grad():
        pipeline.encode_prompt()
        for time in (1000 * (steps - n) / steps for n in range(steps)):
            v = pipeline.transformer(x, torch.full((len(x),), time / 1000))
            x = pipeline.scheduler.step(v, torch.tensor(time), x)
    return x, view


def standard(x, t):
    """E[x_1 - x_0 | x_t] of data from N(0, 1): linear in x."""
    t = t.view(-1, 1, 1, 1, 1)
    return (2 * t - 1) / ((1 - t) ** 2 + t**2) * x


def test_a_linear_reward_moves_every_sample_by_the_strength():
    """Of N(0, 1) the predicted end is (1 - t) x / s, s = (1 - t)^2 + t^2: exact for r = x_0, as the noisy reward would be.

    dx/dt = ((2t - 1) x - w t) / s has the solution x_t = w (1 - t) + x_1 sqrt(s): every sample ends at x_1 + w, hence N(w, 1).
    """
    noise = randn(50, 1, 1, 1, 1, dtype=torch.float32)
    found, view = integrate(standard, lambda x: x.flatten(1)[:, 0], noise, strength=1.5, through="predicted")
    torch.testing.assert_close(found, noise + 1.5, rtol=0, atol=0.01)
    assert len(view.times) == 999 and not torch.cat(view.times).any()  # always asked of clean latents


def test_a_quadratic_reward_shrinks_by_the_solution():
    """r = -k/2 x_0^2: dx/dt = x ((2t - 1) / s + w k t (1 - t) / s^2), whose integral from 1 to 0 is -w k / 2.

    The tilted deviation is (1 + w k)^(-1/2): through the predicted end guidance is an approximation, and stronger here.
    """
    noise = randn(50, 1, 1, 1, 1, dtype=torch.float32)
    found, _ = integrate(standard, lambda x: -0.25 * x.flatten(1)[:, 0] ** 2, noise, strength=2.0, through="predicted")
    torch.testing.assert_close(found, noise * math.exp(-0.5), rtol=0.01, atol=1e-3)


def test_without_strength_the_solution_is_the_noise_itself():
    noise = randn(50, 1, 1, 1, 1, dtype=torch.float32)
    found, view = integrate(standard, lambda x: x.flatten(1)[:, 0], noise, strength=0.0, through="predicted")
    torch.testing.assert_close(found, noise, rtol=0, atol=0.01)
    assert not view.times


def test_a_noisy_reward_is_asked_at_the_time_of_the_latents():
    noise = randn(3, 1, 1, 1, 1, dtype=torch.float32)
    _, view = integrate(standard, lambda x: x.flatten(1)[:, 0], noise, steps=4, strength=1.0, through="noisy")
    torch.testing.assert_close(torch.stack(view.times)[:, 0], torch.tensor([0.75, 0.5, 0.25]))


def test_the_gradient_through_the_generator_equals_finite_differences():
    """Of r(x - t v(x, t)), in float64; a gradient that stops at the velocity is another."""
    matrix, reader = 0.3 * randn(24, 24), randn(24, 3, seed=1)
    weights, t, x = {"VQ": 0.5, "TA": -2.0}, 0.6, randn(2, 3, 2, 2, 2, seed=2)

    def velocity(x, t):
        bent = torch.tanh(x.flatten(1) @ matrix.to(x.dtype)) * (1 + t.view(-1, 1))
        return bent.view_as(x)

    def reward(x):
        return torch.sin(x.flatten(1) @ reader.to(x.dtype))

    pipeline = toy(velocity, 10)
    with guided(pipeline, View(reward), weights=weights, strength=3.0, through="predicted"):
        pipeline.encode_prompt()
        for _ in range(2):  # the first step is never guided
            time = torch.full((2,), t)
            pipeline.scheduler.step(pipeline.transformer(x.float(), time), torch.tensor(1000 * t), x.float())
    unguided, changed = pipeline.scheduler.seen
    change = (changed - unguided).double()

    def value(x):
        rows = reward(x - t * velocity(x, torch.full((2,), t, dtype=torch.float64)))
        return (rows @ torch.tensor([0.5, 0.0, -2.0], dtype=torch.float64)).sum()

    step, slopes = 1e-6, torch.zeros_like(x)
    for place in itertools.product(*map(range, x.shape)):
        moved = torch.zeros_like(x)
        moved[place] = step
        slopes[place] = (value(x + moved) - value(x - moved)) / (2 * step)
    torch.testing.assert_close(change, -3.0 * t / (1 - t) * slopes, rtol=1e-4, atol=1e-4)
    stopped = x.clone().requires_grad_(True)
    end = stopped - t * velocity(x, torch.full((2,), t, dtype=torch.float64))
    weighted = reward(end) @ torch.tensor([0.5, 0.0, -2.0], dtype=torch.float64)
    (naive,) = torch.autograd.grad(weighted.sum(), stopped)
    assert (naive - slopes).abs().max() > 0.1


def test_another_way_to_read_is_refused():
    with pytest.raises(VideoAlignError, match=r"through 'clean' is unknown; choose noisy or predicted"):
        Guidance(through="clean")


# --- guidance through the predicted end: pipelines ---------------------------------------------------------------------

SIZE = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 4, "output_type": "latent"}
WORDS = ["a red circle", "a blue square moves"]


@pytest.fixture(scope="module", params=["wan", "ltx"])
def family(request, tmp_path_factory):
    """A generator and a random noisy reward of it."""
    folder = tmp_path_factory.mktemp("generator") / request.param
    make_generator(folder, request.param, hidden=48, layers=2)
    generator = load_generator(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reward = NoisyReward(generator, NoisyRewardShape(blocks=2, hidden=16))
    reward.statistics = Statistics([0.1, -0.2, 0.3], [0.5, 0.25, 2.0])
    return generator, reward.eval().requires_grad_(False)


def sample(pipeline, scale=1.0):
    return pipeline(WORDS, guidance_scale=scale, generator=torch.Generator().manual_seed(0), **SIZE).frames


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_through_the_predicted_end_samples_are_others(family, scale):
    generator, reward = family
    pipeline = generator.pipeline
    plain = sample(pipeline, scale)
    with guided(pipeline, reward, strength=0.0, through="predicted"):
        assert torch.equal(sample(pipeline, scale), plain)
    found = {}
    for through in ("noisy", "predicted"):
        with guided(pipeline, reward, strength=3.0, through=through):
            found[through] = sample(pipeline, scale)
    assert not torch.equal(found["predicted"], plain) and not torch.equal(found["predicted"], found["noisy"])
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert torch.equal(sample(pipeline, scale), plain) and "step" not in vars(pipeline.scheduler)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_pipeline_step_reads_the_predicted_end(family, scale):
    """Two steps by hand; the end is predicted without classifier-free guidance, and read at time 0."""
    generator, reward = family
    guide = Guidance(weights={"VQ": 1.0, "TA": 0.5}, strength=2.0, through="predicted")
    condition = generator.condition(generator.encode_prompts(WORDS))
    null = generator.condition(generator.encode_prompts(["", ""])) if scale > 1 else None
    x = randn(2, *generator.latent_shape(9, 64, 64), seed=3, dtype=torch.float32)
    with guided(generator.pipeline, reward, guide):
        got = generator.sample(condition, x, 2, scale, null)

    def view(x, t):
        end = x - t.view(-1, 1, 1, 1, 1) * generator.velocity(x, t, condition)
        return reward.normalise(reward(end, torch.zeros_like(t), condition))

    times = [*(generator.pipeline.scheduler.timesteps / 1000).tolist(), 0.0]
    for number in range(2):
        t = torch.full((2,), times[number])
        velocity = generator.velocity(x, t, condition)
        if null:
            without = generator.velocity(x, t, null)
            velocity = without + scale * (velocity - without)
        if times[number] < 1:
            velocity = guide(view, x, t, velocity)
        x = (x - (times[number] - times[number + 1]) * velocity).detach()
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-5)


def test_it_raises_the_clean_reward_of_its_end(family):
    generator, reward = family
    condition = generator.condition(generator.encode_prompts(WORDS))
    noise = randn(2, *generator.latent_shape(9, 64, 64), seed=3, dtype=torch.float32)
    values = []
    for strength in (0.0, 3.0, 10.0):
        with guided(generator.pipeline, reward, weights={"TA": 1.0}, strength=strength, through="predicted"):
            latents = generator.sample(condition, noise, 6)
        values.append(float(reward(latents, torch.zeros(2), condition)[:, 2].sum()))
    assert values[0] < values[1] < values[2]


def test_the_predicted_end_works_in_inference_mode(family):
    generator, reward = family
    with guided(generator.pipeline, reward, strength=1.0, through="predicted"):
        want = sample(generator.pipeline, 3.0)
        with torch.inference_mode():
            assert torch.equal(sample(generator.pipeline, 3.0), want)


# --- numbers of a comparison -------------------------------------------------------------------------------------------


def judged(seconds=1.0, **ratings):
    """An arm; ratings (P, N, 3) by judge, spaces as underscores."""
    whole = {name.replace("_", " "): torch.cat([r, r.sum(-1, keepdim=True)], -1) for name, r in ratings.items()}
    return Judged(whole, seconds)


P, N = 40, 3
BASE = randn(P, N, 3)


def swept(steps, own, judge="oracle", prompts=P, weights=None, jitter=0.0):
    """A sweep over 0, 1, 3, 10 in which a judge's ratings rise by ``steps`` and the own view by ``own``."""
    names, weights = ["base", "s@1", "s@3", "s@10"], weights or {"TA": 1.0}
    base, view = BASE[:prompts], 2 * randn(prompts, N, 3, seed=5)
    arms = {
        name: judged(
            1.0 + number,
            **{
                judge: base + rise + (jitter * randn(prompts, 1, 1, seed=number) if number else 0),
                "own_view": view + mine,
            },
        )
        for number, (name, rise, mine) in enumerate(zip(names, (0.0, *steps), (0.0, *own)))
    }
    found = found_of(arms, {"s": (weights, names)})
    return found, found["sweeps"]["s"]


def test_strengths_of_a_sweep_have_one_cost_and_what_costs_more_than_all_samples_has_no_rival():
    arms = {
        name: judged(seconds, oracle=BASE, own_view=BASE)
        for name, seconds in {"base": 1.0, "s@1": 2.5, "s@3": 1.5, "s@10": 9.0, "dear": N + 1.0}.items()
    }
    found = found_of(arms, {"s": ({"TA": 1.0}, ["base", "s@1", "s@3", "s@10"])})["arms"]
    assert {name: row["cost"] for name, row in found.items()} == {
        "base": 1.0,
        "s@1": 2.5,
        "s@3": 2.5,
        "s@10": 2.5,
        "dear": N + 1.0,
    }
    assert [name for name, row in found.items() if "best_of" in row] == ["s@1", "s@3", "s@10"]
    assert found["s@3"]["best_of"]["draws"] == 2.5 and found["s@3"]["seconds"] == 1.5


def test_costs_are_ratios_of_seconds_and_means_are_means():
    arms = {"base": judged(2.0, oracle=BASE), "slow": judged(3.0, oracle=BASE + 1), "fast": judged(1.0, oracle=BASE)}
    found = found_of(arms, {})
    assert {name: row["cost"] for name, row in found["arms"].items()} == {"base": 1.0, "slow": 1.5, "fast": 0.5}
    assert {name: row["seconds"] for name, row in found["arms"].items()} == {"base": 2.0, "slow": 3.0, "fast": 1.0}
    assert (found["judge"], found["prompts"], found["samples"], found["sweeps"]) == ("oracle", P, N, {})
    for i, column in enumerate(DIMENSIONS):
        assert found["arms"]["slow"]["means"]["oracle"][column] == pytest.approx(float(BASE[..., i].mean()) + 1)
    assert found["arms"]["slow"]["means"]["oracle"]["Overall"] == pytest.approx(float(BASE.sum(-1).mean()) + 3)


def test_win_rates_against_the_base_are_those_of_loops():
    other = BASE + 0.3 * randn(P, N, 3, seed=1)
    found = found_of(
        {"base": judged(oracle=BASE, reward_model=-BASE), "arm": judged(oracle=other, reward_model=-other)}, {}
    )
    row = found["arms"]["arm"]["against_base"]
    assert row.keys() == {"oracle", "reward model"} and "against_base" not in found["arms"]["base"]
    for i, column in enumerate(COLUMNS):
        mine, theirs = (r.sum(-1) if i == 3 else r[..., i] for r in (other, BASE))
        wins = [float(mine[p, n] > theirs[p, n]) for p in range(P) for n in range(N)]
        apart = [float(mine[p, a] > theirs[p, b]) for p in range(P) for a in range(N) for b in range(N) if a != b]
        assert row["oracle"][column]["win_rate"] == pytest.approx(np.mean(wins))
        assert row["oracle"][column]["superiority"] == pytest.approx(np.mean(apart))
        assert row["reward model"][column]["win_rate"] == pytest.approx(1 - np.mean(wins))


def test_best_of_n_is_chosen_by_the_reward_model_and_valued_by_the_judge():
    model = randn(P, N, 3, seed=2)
    found = found_of({"base": judged(oracle=BASE, reward_model=model)}, {})
    assert [*found["best_of"]] == ["1", "2", "3"]
    chosen = model.sum(-1).argmax(1)
    best = BASE[torch.arange(P), chosen]
    for i, column in enumerate(DIMENSIONS):
        assert found["best_of"]["1"][column] == pytest.approx(float(BASE[..., i].mean()))
        assert found["best_of"]["3"][column] == pytest.approx(float(best[:, i].mean()))
    assert found["best_of"]["3"]["Overall"] == pytest.approx(float(best.sum(-1).mean()))


@pytest.mark.parametrize(
    ("cost", "there"), [(0.9, True), (1.0, True), (1.25, True), (2.0, True), (3.0, True), (3.1, False)]
)
def test_an_arm_is_held_against_the_best_of_its_cost(cost, there):
    model = randn(P, N, 3, seed=2)
    mine = BASE + 1 + randn(P, N, 3, seed=3)
    arms = {
        "base": judged(2.0, oracle=BASE, reward_model=model),
        "arm": judged(2.0 * cost, oracle=mine, reward_model=model),
    }
    row = found_of(arms, {})["arms"]["arm"]
    assert ("best_of" in row) == there
    if not there:
        return
    of = {}
    for n in (1, 2, 3):
        subsets = [*itertools.combinations(range(N), n)]
        of[n] = [
            np.mean([float(BASE[p, max(s, key=lambda i: model[p, i].sum())].sum()) for s in subsets]) for p in range(P)
        ]
    cost = max(cost, 1.0)  # faster than the base by chance: held against one of its samples
    whole = min(int(cost), 2)
    rival = (1 - (cost - whole)) * np.array(of[whole]) + (cost - whole) * np.array(of[whole + 1])
    differences = mine.sum(-1).mean(1).numpy() - rival
    assert row["best_of"]["draws"] == cost
    assert row["best_of"]["difference"] == pytest.approx(differences.mean())
    low, high = row["best_of"]["interval"]
    error = differences.std(ddof=1) / math.sqrt(P)
    assert low < differences.mean() < high and high - low == pytest.approx(2 * 1.96 * error, rel=0.2)


def test_gains_are_in_the_bases_deviations_under_the_weights():
    weights = {"VQ": 0.5, "TA": -1.5}
    rise = torch.tensor([2.0, 100.0, 1.0], dtype=torch.float64)
    found, curve = swept((rise, 2 * rise, 0 * rise), (rise, rise, rise), weights=weights)
    std = BASE[..., [0, 2]].flatten(0, 1).std(0)
    want = float((0.5 * 2.0 / std[0] - 1.5 * 1.0 / std[1]) / 2.0)
    assert curve["gains"]["oracle"] == pytest.approx([0.0, want, 2 * want, 0.0], abs=1e-12)
    assert curve["strengths"] == [0.0, 1.0, 3.0, 10.0] and curve["weights"] == weights
    view = (2 * randn(P, N, 3, seed=5))[..., [0, 2]].flatten(0, 1).std(0)
    assert curve["gains"]["own view"][1] == pytest.approx(float((0.5 * 2.0 / view[0] - 1.5 / view[1]) / 2.0))
    assert found["sweeps"].keys() == {"s"}


def test_gains_do_not_depend_on_a_judges_units():
    _, one = swept((1.0, 0.5, -1.0), (1.0, 2.0, 3.0))
    arms = {
        name: judged(oracle=100 * BASE + 100 * rise - 7, own_view=BASE)
        for name, rise in (("base", 0.0), ("s@1", 1.0), ("s@3", 0.5), ("s@10", -1.0))
    }
    other = found_of(arms, {"s": ({"TA": 3.0}, [*arms])})["sweeps"]["s"]
    assert other["gains"]["oracle"] == pytest.approx(one["gains"]["oracle"])


def test_a_dimension_without_spread_does_not_drown_the_others():
    """The oracle calls every video of a poor base 0 in visual quality."""
    base = BASE * torch.tensor([0.0, 1.0, 1.0])
    arms = {"base": judged(oracle=base), "s@1": judged(oracle=base + torch.tensor([0.01, 0.5, 0.5]))}
    gains = found_of(arms, {"s": (dict.fromkeys(DIMENSIONS, 1 / 3), [*arms])})["sweeps"]["s"]["gains"]["oracle"]
    assert 0 < gains[1] < 10


@pytest.mark.parametrize(
    ("steps", "own", "jitter", "best", "limit"),
    [
        ((1.0, 0.5, -1.0), (1.0, 2.0, 3.0), 0.1, 1.0, 3.0),  # judge falls after 1, own view goes on rising
        ((1.0, 2.0, -1.0), (1.0, 2.0, 3.0), 0.1, 3.0, 10.0),
        ((-0.5, -0.6, -1.0), (1.0, 2.0, 3.0), 0.1, 0.0, 1.0),  # bad from the start
        ((1.0, 2.0, 3.0), (1.0, 2.0, 3.0), 0.1, 10.0, None),  # both rise
        ((1.0, 0.5, -1.0), (1.0, 0.5, -1.0), 0.1, 1.0, None),  # guidance fails, also in its own view: no hacking
        ((1.0, 0.5, -1.0), (1.0, 0.5, 3.0), 0.1, 1.0, 10.0),  # the own view rises later
        ((1.0, 0.9, -1.0), (1.0, 2.0, 3.0), 2.0, 1.0, 10.0),  # the first fall is within noise, the second is not
        ((1.0, 0.95, 0.9), (1.0, 2.0, 3.0), 2.0, None, None),  # no fall beyond noise
        ((-0.5, 1.0, 2.0), (5.0, 2.0, 3.0), 0.1, 10.0, None),  # what lies below the best is no hacking
    ],
)
def test_hacking_is_a_significant_fall_while_the_own_view_rises(steps, own, jitter, best, limit):
    _, curve = swept(steps, own, jitter=jitter)
    assert best is None or curve["best"] == best
    assert curve["stay_under"] == limit


def test_the_reward_model_judges_where_there_is_no_oracle():
    found, curve = swept((1.0, 0.5, -1.0), (1.0, 2.0, 3.0), judge="reward_model")
    assert found["judge"] == "reward model" and (curve["best"], curve["stay_under"]) == (1.0, 3.0)


def test_the_oracle_judges_before_the_reward_model():
    names = ["base", "s@1", "s@3"]
    arms = {
        n: judged(oracle=BASE + o, reward_model=BASE + m, own_view=BASE + v)
        for n, o, m, v in zip(names, (0.0, 1.0, -1.0), (0.0, 1.0, 2.0), (0.0, 1.0, 2.0))
    }
    curve = found_of(arms, {"s": ({"VQ": 1.0}, names)})["sweeps"]["s"]
    assert (curve["best"], curve["stay_under"]) == (1.0, 3.0) and curve["gains"].keys() == {
        "oracle",
        "reward model",
        "own view",
    }


def test_without_an_own_view_nothing_is_called_hacking():
    names = ["base", "s@1"]
    arms = {n: judged(oracle=BASE + o) for n, o in zip(names, (0.0, -1.0))}
    assert found_of(arms, {"s": ({"VQ": 1.0}, names)})["sweeps"]["s"]["stay_under"] is None


def test_a_sweep_of_strength_nought_alone_is_the_base():
    curve = found_of({"base": judged(oracle=BASE, own_view=BASE)}, {"s": ({"VQ": 1.0}, ["base"])})["sweeps"]["s"]
    assert curve["strengths"] == [0.0] and curve["best"] == 0.0 and curve["gains"]["oracle"] == [0.0]
    trade_off("s", curve).canvas.draw()


# --- for people ---------------------------------------------------------------------------------------------------------


def cells(text, name):
    """Cells of an arm's row."""
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_holds_every_arm_and_the_sentence():
    found, _ = swept((1.0, 0.5, -1.0), (1.0, 2.0, 3.0), jitter=0.1)
    text = table(found)
    head = [cell.strip() for cell in text.splitlines()[0].strip("|").split("|")]
    for name, row in found["arms"].items():
        line = dict(zip(head, cells(text, name), strict=True))
        for column in COLUMNS:
            assert line[f"oracle: {column}"] == f"{row['means']['oracle'][column]:.3f}"
        assert (
            line["cost"] == f"{row['cost']:.2f}" and line["own view"] == f"{row['means']['own view']['Overall']:+.2f}"
        )
        won = row.get("against_base", {}).get("oracle", {}).get("Overall")
        assert line["wins, same noise (oracle)"] == (f"{won['win_rate']:.3f}" if won else "")
        assert line["wins, other noise (oracle)"] == (f"{won['superiority']:.3f}" if won else "")
        gap = row.get("best_of")  # the base has no rival
        text_of_gap = "{:+.3f} ({:+.3f} to {:+.3f})".format(gap["difference"], *gap["interval"]) if gap else ""
        assert line["minus best-of-cost"] == text_of_gap
    assert [name for name, row in found["arms"].items() if "best_of" in row] == ["s@1", "s@3", "s@10"]
    for number in ("2", "3"):
        line = dict(zip(head, cells(text, f"best of {number}"), strict=True))
        assert line["oracle: Overall"] == f"{found['best_of'][number]['Overall']:.3f}" and line["cost"] == number
    assert "best of 1" not in text and f"{P} prompts, {N} noises each" in text
    assert "sweep s: best for the oracle at strength 1; **reward hacking from 3: stay under it**" in text


def test_the_table_says_where_no_hacking_is_shown():
    text = table(swept((1.0, 2.0, 3.0), (1.0, 2.0, 3.0))[0])
    assert "sweep s: best for the oracle at strength 10; no reward hacking shown at these strengths" in text
    assert "stay under" not in text


def test_the_table_names_who_chose_the_best_of_n():
    text = table(found_of({"base": judged(oracle=BASE), "arm": judged(oracle=BASE)}, {}))
    assert "base samples by the oracle" in text and "by the reward model" not in text


@pytest.mark.parametrize(("steps", "shaded"), [((1.0, 0.5, -1.0), True), ((1.0, 2.0, 3.0), False)])
def test_the_trade_off_shows_every_judge_and_the_hacked_strengths(steps, shaded):
    _, curve = swept(steps, (1.0, 2.0, 3.0), jitter=0.1)
    figure = trade_off("s", curve)
    figure.canvas.draw()
    (axis,) = figure.axes
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["oracle", "own view", *["reward hacking"] * shaded]
    drawn = {line.get_label(): line.get_ydata() for line in axis.lines}
    assert all(np.allclose(drawn[judge], gains) for judge, gains in curve["gains"].items())
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["0", "1", "3", "10"] and "TA 1" in axis.get_title()
    if shaded:
        (span,) = axis.patches
        assert span.get_extents().transformed(axis.transData.inverted()).x0 == pytest.approx(1.5)  # strength 3 is third
    plt.close(figure)


@pytest.mark.parametrize("samples", [1, N])
def test_bars_are_the_wins_of_every_arm(samples):
    other = BASE + 0.3 * randn(P, N, 3, seed=1)
    arms = {
        "base": judged(oracle=BASE[:, :samples]),
        **{f"a{i}": judged(oracle=other[:, :samples] + 0.1 * i) for i in range(6)},
    }
    found = found_of(arms, {})
    figure = bars(found)
    figure.canvas.draw()
    (axis,) = figure.axes
    heights = [bar.get_height() for bars in axis.containers if hasattr(bars, "patches") for bar in bars.patches]
    kind = "superiority" if samples > 1 else "win_rate"
    want = [found["arms"][f"a{i}"]["against_base"]["oracle"][column][kind] for column in COLUMNS for i in range(6)]
    assert heights == pytest.approx(want) and all(map(math.isfinite, heights))
    assert [tick.get_text() for tick in axis.get_xticklabels()] == [f"a{i}" for i in range(6)]
    plt.close(figure)


def test_one_sample_per_prompt_is_enough():
    names = ["base", "s@1", "s@3"]
    arms = {
        n: judged(oracle=BASE[:, :1] + o, own_view=BASE[:, :1] + v)
        for n, o, v in zip(names, (0.0, 1.0, -1.0), (0.0, 1.0, 2.0))
    }
    found = found_of(arms, {"s": ({"VQ": 1.0}, names)})
    row = found["arms"]["s@1"]["against_base"]["oracle"]["Overall"]
    assert row["win_rate"] == 1.0 and math.isnan(row["superiority"]) and [*found["best_of"]] == ["1"]
    assert found["arms"]["s@1"]["best_of"]["difference"] == pytest.approx(3.0)
    assert (found["sweeps"]["s"]["best"], found["sweeps"]["s"]["stay_under"]) == (1.0, 3.0)
    assert "best of" not in table(found).replace("best-of", "") and "s@3" in table(found)


# --- the command --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory, backbone, sampling):
    """Folder of a generator, adapters, a noisy reward, a reward model, an oracle and prompts. Read only."""
    folder = tmp_path_factory.mktemp("world")
    make_generator(folder / "wan", "wan", PROMPTS, hidden=48, layers=2)
    generator = load_generator(folder / "wan")
    torch.manual_seed(0)
    reward = NoisyReward(generator, NoisyRewardShape(blocks=2, hidden=16))
    reward.statistics = Statistics([0.1, -0.2, 0.3], [0.5, 0.25, 2.0])
    reward.save_pretrained(folder / "nrg")
    reward.statistics = Statistics([5.1, 4.8, 5.3], [0.5, 0.25, 2.0])  # the same gradient from another zero
    reward.save_pretrained(folder / "moved")
    judge = VideoReward(backbone, template="plain", sampling=sampling, language="full")
    judge.statistics = Statistics([1.0, 2.0, 3.0], [0.5, 2.0, 0.25])
    judge.save_pretrained(folder / "judge")
    Oracle().save(folder / "oracle.json")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    transformer = generator.transformer
    transformer.add_adapter(
        LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    )
    type(generator.pipeline).save_lora_weights(
        folder / "lora",
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        **_collate_lora_metadata({"transformer": transformer}),
    )
    return folder


SHORT = {"num_frames": 9, "height": 32, "width": 32, "fps": 8, "steps": 3, "batch_size": 2, "seed": 4}


def settings(world, out, **changes):
    return {
        "generator": world / "wan",
        "prompts": world / "prompts.txt",
        "out": out,
        "samples": SAMPLES,
        "sampling": SHORT,
        "reward_model": world / "judge",
        "oracle": world / "oracle.json",
        "workers": 0,
        "device": "cpu",
        **changes,
    }


def compare(path, config, *options):
    """Call the command with a YAML file; the exit status."""
    path.write_text(yaml.safe_dump(json.loads(json.dumps(config, default=str)), sort_keys=False))
    return call("compare", "--config", path, *options)


def call(*args):
    try:
        main([str(a) for a in args])
    except SystemExit as done:
        return done.code or 0
    return 0


def strict(path):
    """JSON without the NaN that Python would let pass."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def counted(monkeypatch, most=10**9):
    """Videos of each call of a generator's sampling, which fails behind so many calls."""
    sizes, original = [], Generator.sample

    def sample(self, condition, noise, *args, **kwargs):
        if len(sizes) == most:
            raise RuntimeError("interrupted here")
        sizes.append(len(noise))
        return original(self, condition, noise, *args, **kwargs)

    monkeypatch.setattr(Generator, "sample", sample)
    return sizes


def tree(folder):
    """Every file's content, and when it was written where it is of videos."""
    return {
        str(p.relative_to(folder)): (
            p.read_bytes(),
            p.stat().st_mtime_ns * (p.suffix == ".tar" or p.name == "index.json"),
        )
        for p in folder.rglob("*")
        if p.is_file()
    }


def videos(folder):
    return {content.key: content.read("mp4") for content in ShardSet(folder).contents()}


def records(folder):
    return {content.key: content.record for content in ShardSet(folder).contents()}


def frames(video):
    return decode(video, ClipSize(num_frames=9, height=32, width=32), 1)


ARMS = ["base", "none", "predicted", "tuned", "both", "nrg@1", "nrg@30.5"]


@pytest.fixture(scope="module")
def compared(world, tmp_path_factory):
    """A comparison of every kind of arm. Read only."""
    folder = tmp_path_factory.mktemp("compared")
    config = settings(
        world,
        folder / "out",
        arms={
            "none": {"noisy_reward": world / "nrg", "guide": {"strength": 0.0}},
            "predicted": {"noisy_reward": world / "nrg", "guide": {"through": "predicted", "strength": 5.0}},
            "tuned": {"lora": world / "lora"},
            "both": {"lora": world / "lora", "noisy_reward": world / "nrg", "guide": {"strength": 30.0}},
        },
        sweeps={
            "nrg": {
                "noisy_reward": world / "nrg",
                "strengths": [0, 1, 30.5],
                "guide": {"weights": {"TA": 1.0}, "every": 1},
            }
        },
    )
    assert compare(folder / "c.yaml", config) == 0
    return SimpleNamespace(config=config, out=folder / "out", found=strict(folder / "out" / "comparison.json"))


def test_a_comparison_writes_numbers_table_charts_films_and_events(compared):
    out, found = compared.out, compared.found
    assert [*found["arms"]] == ARMS and (found["judge"], found["prompts"], found["samples"]) == ("oracle", 2, SAMPLES)
    assert [*found["sweeps"]] == ["nrg"] and found["sweeps"]["nrg"]["strengths"] == [0.0, 1.0, 30.5]
    assert found["sweeps"]["nrg"]["weights"] == {"TA": 1.0} and [*found["best_of"]] == ["1", "2"]
    text = (out / "comparison.md").read_text()
    assert all(f"\n| {name} |" in text for name in ARMS) and "sweep nrg: best for the oracle" in text
    assert text.startswith(f"{compared.config['generator']}, {SAMPLES} noises for each of 2 prompts")
    for name in ("arms.png", "sweep_nrg.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 200 and len(picture.convert("RGB").getcolors(10**6)) > 10
    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    (shown,) = events.Tensors("compare/text_summary")
    assert all(name in shown.tensor_proto.string_val[0].decode() for name in ARMS)
    tags = events.Tags()["images"]
    assert {"compare/arms", "compare/sweep_nrg"} <= set(tags) and any("none, predicted" in tag for tag in tags)


def test_films_show_a_row_per_prompt_and_a_column_per_arm(compared):
    best = compared.found["sweeps"]["nrg"]["best"]
    columns = 5 + len({best, 30.5} - {0.0})
    with Image.open(compared.out / "films.gif") as film:
        assert film.n_frames == 9
        width, height = film.size
    assert width / height == pytest.approx(columns * 34 / (2 * 34)) and height >= 2 * 96


def test_a_cell_of_a_film_is_the_video_of_its_prompt_and_arm(compared):
    moving = film(compared.out, ["base", "tuned"], PROMPTS, least=1)
    for column, row in itertools.product(range(2), range(2)):
        want = frames(videos(compared.out / "videos" / ("base", "tuned")[column])[f"{row:05d}-000"])
        for number in (0, 8):
            cell = np.asarray(moving[number])[1 + 34 * row : 33 + 34 * row, 1 + 34 * column : 33 + 34 * column]
            assert np.array_equal(cell, want[number].permute(1, 2, 0).numpy())


def test_ratings_are_those_of_every_judge_by_itself(compared, world):
    network = VideoReward.from_pretrained(world / "judge").eval()
    oracle = Oracle.load(world / "oracle.json")
    for name in ("base", "predicted", "nrg@30.5"):
        kept, made = videos(compared.out / "videos" / name), records(compared.out / "videos" / name)
        assert sorted(kept) == ["00000-000", "00000-001", "00001-000", "00001-001"]
        clips = {key: frames(video) for key, video in kept.items()}
        rows = {"oracle": [], "reward model": [], "own view": []}
        for key, clip in clips.items():
            prompt = PROMPTS[int(key[:5])]
            assert made[key]["prompt"] == prompt and made[key]["source"] == name
            rows["oracle"].append(oracle(clip.permute(0, 2, 3, 1).numpy()[None], [prompt])[0])
            content = decode(kept[key], network.processor.sampling, network.processor.factor)
            with torch.no_grad():
                rows["reward model"].append(network.normalise(network(**network.processor([content], [prompt])))[0])
            rows["own view"].append(torch.tensor([made[key]["noisy_reward"][d] for d in DIMENSIONS]))
        means = compared.found["arms"][name]["means"]
        for judge, found in rows.items():
            mean = torch.stack(found).double().mean(0)
            for column, value in zip(COLUMNS, [*mean.tolist(), float(mean.sum())]):
                assert means[judge][column] == pytest.approx(value, abs=2e-4), (name, judge, column)
        if name == "base":  # of each prompt the sample that the reward model likes best, as the oracle sees it
            liked = torch.stack(rows["reward model"]).sum(1).view(2, SAMPLES).argmax(1)
            best = torch.stack(rows["oracle"]).sum(1).view(2, SAMPLES)[torch.arange(2), liked].mean()
            assert compared.found["best_of"]["2"]["Overall"] == pytest.approx(float(best), abs=1e-4)
        seconds = [record["seconds"] for record in made.values()]
        assert min(seconds) > 0 and compared.found["arms"][name]["seconds"] == pytest.approx(np.mean(seconds))


def test_who_only_watches_changes_no_byte(compared, world, tmp_path):
    """The base, which the sweep's reward watches, a guide of strength 0, and `generate` without a reward."""
    base = videos(compared.out / "videos" / "base")
    assert videos(compared.out / "videos" / "none") == base
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SHORT.items()]
    assert (
        call(
            "generate",
            "--generator",
            world / "wan",
            "--prompts",
            world / "prompts.txt",
            "--out",
            tmp_path / "plain",
            "--samples",
            SAMPLES,
            "--device",
            "cpu",
            *options,
        )
        == 0
    )
    assert videos(tmp_path / "plain") == base
    assert not any(
        {"noisy_reward", "guide", "reward"} & record.keys() for record in records(tmp_path / "plain").values()
    )
    row = compared.found["arms"]["none"]["against_base"]["oracle"]["Overall"]
    assert row["win_rate"] == row["superiority"] == 0.5 and row["win_rate_interval"] == [0.5, 0.5]


def test_every_other_arm_is_a_set_of_its_own(compared):
    sets = {name: videos(compared.out / "videos" / name) for name in ARMS if name != "none"}
    for (one, first), (two, second) in itertools.combinations(sets.items(), 2):
        assert any(not torch.equal(frames(first[key]), frames(second[key])) for key in first), (one, two)
    seeds = {name: {key: r["seed"] for key, r in records(compared.out / "videos" / name).items()} for name in ARMS}
    assert all(found == seeds["base"] for found in seeds.values())


def test_what_steered_is_recorded(compared, world):
    def one(name):
        return records(compared.out / "videos" / name)["00000-000"]

    assert one("nrg@30.5")["guide"]["strength"] == 30.5 and one("nrg@30.5")["guide"]["weights"] == {"TA": 1.0}
    assert one("predicted")["guide"]["through"] == "predicted" and one("nrg@1")["guide"]["through"] == "noisy"
    assert one("base")["guide"]["strength"] == 0 and one("base")["reward"] == str(world / "nrg")
    assert "guide" not in one("tuned") and "own view" not in compared.found["arms"]["tuned"]["means"]


def test_arms_with_adapters_are_those_of_generate(compared, world, tmp_path):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SHORT.items()]
    assert (
        call(
            "generate",
            "--generator",
            world / "wan",
            "--prompts",
            world / "prompts.txt",
            "--out",
            tmp_path / "set",
            "--lora",
            world / "lora",
            "--samples",
            SAMPLES,
            "--device",
            "cpu",
            *options,
        )
        == 0
    )
    assert videos(tmp_path / "set") == videos(compared.out / "videos" / "tuned")


def test_a_second_call_samples_and_scores_nothing_again(compared, tmp_path, monkeypatch, capsys):
    sizes, before = counted(monkeypatch), tree(compared.out / "videos")
    scored, forward = [], VideoReward.forward
    monkeypatch.setattr(VideoReward, "forward", lambda self, *a, **k: (scored.append(1), forward(self, *a, **k))[1])
    kept = (compared.out / "comparison.json").read_bytes(), (compared.out / "comparison.md").read_bytes()
    assert compare(tmp_path / "c.yaml", compared.config) == 0
    assert not sizes and not scored and tree(compared.out / "videos") == before
    assert ((compared.out / "comparison.json").read_bytes(), (compared.out / "comparison.md").read_bytes()) == kept
    assert "arm 1 of" not in capsys.readouterr().out


def without_seconds(found):
    """What does not depend on the machine's mood."""
    arms = {
        n: {k: v for k, v in row.items() if k not in ("seconds", "cost", "best_of")} for n, row in found["arms"].items()
    }
    return {**found, "arms": arms}


def test_an_arm_that_was_removed_is_sampled_again(compared, tmp_path, monkeypatch):
    shutil.copytree(compared.out, tmp_path / "out")
    for name in ("tuned", "tuned.rewards"):
        shutil.rmtree(tmp_path / "out" / "videos" / name)
    sizes = counted(monkeypatch)
    assert compare(tmp_path / "c.yaml", {**compared.config, "out": tmp_path / "out"}) == 0
    assert sizes == [2, 2]
    assert without_seconds(strict(tmp_path / "out" / "comparison.json")) == without_seconds(compared.found)


def test_an_arm_whose_videos_alone_were_removed_goes_on(compared, tmp_path, capsys):
    shutil.copytree(compared.out, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "videos" / "tuned")
    assert compare(tmp_path / "c.yaml", {**compared.config, "out": tmp_path / "out"}) == 0


def test_an_interrupted_comparison_goes_on(compared, world, tmp_path, monkeypatch, capsys):
    """It stops in the second of two batches of the second arm."""
    arms = {"none": compared.config["arms"]["none"]}
    config = settings(world, tmp_path / "out", arms=arms)
    with monkeypatch.context() as patch:
        counted(patch, 3)
        assert compare(tmp_path / "c.yaml", config) == 1  # a fault of the program
    left = tmp_path / "out" / "videos"
    assert (left / "base").is_dir() and (left / ".none.parts").is_dir() and not (left / "none").exists()
    assert not (tmp_path / "out" / "comparison.json").exists()
    sizes = counted(monkeypatch)
    assert compare(tmp_path / "c.yaml", config) == 0
    assert sizes == [2] and not (left / ".none.parts").exists()
    assert videos(left / "none") == videos(compared.out / "videos" / "none")
    assert "arm 2 of 2: none" in capsys.readouterr().out


def test_interrupted_scoring_goes_on(compared, tmp_path, monkeypatch):
    shutil.copytree(compared.out, tmp_path / "out")
    file = tmp_path / "out" / "videos" / "nrg@1.rewards" / "rewards.0.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]) + '{"key": "0')
    sizes, forward = [], VideoReward.forward
    monkeypatch.setattr(VideoReward, "forward", lambda self, *a, **k: (sizes.append(1), forward(self, *a, **k))[1])
    assert compare(tmp_path / "c.yaml", {**compared.config, "out": tmp_path / "out"}) == 0
    assert sizes == [1]
    again = strict(tmp_path / "out" / "comparison.json")
    for name, row in compared.found["arms"].items():  # one by one is scored in another batch
        assert again["arms"][name]["means"]["reward model"] == pytest.approx(row["means"]["reward model"], abs=1e-3)


@pytest.mark.parametrize("what", ["sampling", "samples", "prompts", "arms", "sweeps"])
def test_videos_of_other_settings_are_refused(what, compared, world, tmp_path, monkeypatch, capsys):
    config, before = json.loads(json.dumps(compared.config, default=str)), tree(compared.out)
    if what == "sampling":
        config["sampling"]["steps"] = 4
    elif what == "samples":
        config["samples"] = 3
    elif what == "prompts":
        (tmp_path / "p.txt").write_text(PROMPTS[1] + "\n")
        config["prompts"] = str(tmp_path / "p.txt")
    elif what == "arms":
        config["arms"]["both"]["guide"]["strength"] = 31.0
    else:
        config["sweeps"]["nrg"]["guide"]["end"] = 0.1
    sizes = counted(monkeypatch)
    assert compare(tmp_path / "c.yaml", config) == 2
    message = capsys.readouterr().err
    name = {"arms": "both", "sweeps": "nrg@1"}.get(what, "base")
    assert message.count("videoalign: error:") == 1 and f"{name} holds videos of other settings" in message
    assert not sizes and tree(compared.out) == before


def test_an_arm_may_be_added_later(compared, world, tmp_path, monkeypatch):
    shutil.copytree(compared.out, tmp_path / "out")
    later = {
        **compared.config,
        "out": tmp_path / "out",
        "arms": {**compared.config["arms"], "late": {"lora": world / "lora", "generator": world / "wan"}},
    }
    sizes = counted(monkeypatch)
    assert compare(tmp_path / "c.yaml", later) == 0 and sizes == [2, 2]
    found = strict(tmp_path / "out" / "comparison.json")
    assert [*found["arms"]] == ["base", "none", "predicted", "tuned", "both", "late", "nrg@1", "nrg@30.5"]
    assert videos(tmp_path / "out" / "videos" / "late") == videos(tmp_path / "out" / "videos" / "tuned")


def test_the_base_alone_with_one_judge_and_one_sample(world, tmp_path):
    """Options on the command line hold over the YAML file."""
    config = settings(world, tmp_path / "out", reward_model=None)
    assert compare(tmp_path / "c.yaml", config, "--samples", "1", "--sampling.steps", "2") == 0
    found = strict(tmp_path / "out" / "comparison.json")
    assert (
        [*found["arms"]] == ["base"] and found["samples"] == 1 and found["arms"]["base"]["means"].keys() == {"oracle"}
    )
    assert not (tmp_path / "out" / "arms.png").exists() and (tmp_path / "out" / "films.gif").exists()
    assert {record["steps"] for record in records(tmp_path / "out" / "videos" / "base").values()} == {2}


def test_one_sample_per_prompt_is_compared_by_the_same_noise(world, tmp_path):
    sweeps = {"s": {"noisy_reward": world / "nrg", "strengths": [30.0]}}
    config = settings(
        world, tmp_path / "out", oracle=None, samples=1, sweeps=sweeps, arms={"tuned": {"lora": world / "lora"}}
    )
    assert compare(tmp_path / "c.yaml", config) == 0
    found = strict(tmp_path / "out" / "comparison.json")
    assert [*found["arms"]] == ["base", "tuned", "s@30"] and found["judge"] == "reward model"
    row = found["arms"]["tuned"]["against_base"]["reward model"]["Overall"]
    assert 0 <= row["win_rate"] <= 1 and row["superiority"] is None and [*found["best_of"]] == ["1"]
    assert (tmp_path / "out" / "arms.png").stat().st_size > 1000 and (
        tmp_path / "out" / "sweep_s.png"
    ).stat().st_size > 1000


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reward_model": None, "oracle": None}, "nobody judges"),
        ({"arms": {"a@1": {}}}, "arms or sweeps ['a@1']"),
        ({"arms": {"../a": {}}}, "arms or sweeps ['../a']"),
        ({"arms": {"a.rewards": {}}}, "arms or sweeps ['a.rewards']"),
        ({"arms": {"": {}}}, "arms or sweeps ['']"),
        ({"sweeps": {"base": {"noisy_reward": "nrg", "strengths": [0, 1]}}}, "arms or sweeps ['base']"),
        ({"sweeps": {"s": {"noisy_reward": "nrg", "strengths": [1, 0]}}}, "strengths must be finite, ascend"),
        ({"sweeps": {"s": {"noisy_reward": "nrg", "strengths": [1, 1]}}}, "strengths must be finite, ascend"),
        ({"sweeps": {"s": {"noisy_reward": "nrg", "strengths": []}}}, "strengths must be finite, ascend"),
        ({"sweeps": {"s": {"noisy_reward": "nrg", "strengths": [1], "guide": {"weights": {"XX": 1.0}}}}}, "XX"),
        ({"sweeps": {"s": {"noisy_reward": "nrg", "strengths": [1], "guide": {"through": "clean"}}}}, "through"),
        ({"arms": {"a": {"strength": 3}}}, "strength"),
        ({"arms": {"a": {"guide": {"strength": -1.0}, "noisy_reward": "nrg"}}}, "strength"),
        ({"unheard_of": 3}, "unheard_of"),
        ({"sampling": {"num_frames": 9}}, "height"),
        ({"prompts": "none.txt"}, "none.txt"),
        ({"reward_model": "none"}, "none"),
        ({"oracle": "none.json"}, "none.json"),
        ({"generator": "./none"}, "none"),
        ({"sweeps": {"s": {"noisy_reward": "none", "strengths": [1]}}}, "none"),
    ],
)
def test_compare_refuses(changes, words, world, tmp_path, monkeypatch, capsys):
    sizes = counted(monkeypatch)
    assert compare(tmp_path / "c.yaml", settings(world, tmp_path / "out", **changes)) == 2
    message = capsys.readouterr().err
    assert message.count("videoalign: error:") == 1 and words in message and "Traceback" not in message
    assert not sizes and not (tmp_path / "out" / "comparison.json").exists()


@pytest.mark.parametrize("strengths", [[-1.0, 0.0, 1.0], [1e6, 1e6 + 1]], ids=["negative", "of one name"])
def test_no_strength_is_dropped_without_a_word(strengths):
    try:
        sweep = Sweep(noisy_reward="r", strengths=strengths)
    except VideoAlignError:
        return
    assert len(sweep.arms("s")) == sum(s != 0 for s in strengths)


def test_an_arm_with_a_guide_but_no_reward_is_refused(world, tmp_path):
    config = settings(world, tmp_path / "out", reward_model=None, arms={"a": {"guide": {"strength": 3.0}}})
    assert compare(tmp_path / "c.yaml", config) == 2


def test_a_mended_path_may_use_the_same_folder(world, tmp_path, capsys):
    """The reward's folder is misspelt, nothing is sampled; the next call names it rightly."""
    wrong, right = ({"s": {"noisy_reward": world / name, "strengths": [1.0]}} for name in ("ngr", "nrg"))
    assert compare(tmp_path / "c.yaml", settings(world, tmp_path / "out", reward_model=None, sweeps=wrong)) == 2
    assert not list((tmp_path / "out" / "videos").glob("*/index.json"))
    assert compare(tmp_path / "c.yaml", settings(world, tmp_path / "out", reward_model=None, sweeps=right)) == 0


def test_prompts_that_the_oracle_cannot_judge_are_refused_before_the_work(world, tmp_path, monkeypatch, capsys):
    (tmp_path / "p.txt").write_text("a dog runs\n")
    sizes = counted(monkeypatch)
    assert (
        compare(tmp_path / "c.yaml", settings(world, tmp_path / "out", reward_model=None, prompts=tmp_path / "p.txt"))
        == 2
    )
    assert "none of the miniature world" in capsys.readouterr().err and not sizes


def test_each_sweep_is_held_against_the_base_as_its_own_reward_sees_it(world, tmp_path):
    """Two rewards that differ in their zero alone: the same videos, hence the same gains."""
    sweeps = {
        name: {"noisy_reward": world / folder, "strengths": [30.0]}
        for name, folder in (("one", "nrg"), ("two", "moved"))
    }
    assert compare(tmp_path / "c.yaml", settings(world, tmp_path / "out", reward_model=None, sweeps=sweeps)) == 0
    assert videos(tmp_path / "out" / "videos" / "one@30") == videos(tmp_path / "out" / "videos" / "two@30")
    one, two = (strict(tmp_path / "out" / "comparison.json")["sweeps"][name]["gains"] for name in sweeps)
    assert one["oracle"] == two["oracle"]
    assert one["own view"] == pytest.approx(two["own view"], abs=1e-4)


def test_arms_of_a_sweep_carry_everything_but_the_strength():
    guide = Guidance(weights={"TA": 1.0}, every=2, through="predicted", strength=7.0)
    arms = Sweep(noisy_reward="r", strengths=[0, 0.5, 20], guide=guide, lora="l").arms("s")
    assert [*arms] == ["s@0", "s@0.5", "s@20"]
    assert arms.pop("s@0") == Arm(noisy_reward="r", lora="l")  # it only watches
    for name, arm in arms.items():
        assert isinstance(arm, Arm) and (arm.noisy_reward, arm.lora, arm.generator) == ("r", "l", None)
        assert arm.guide == Guidance(weights={"TA": 1.0}, every=2, through="predicted", strength=float(name[2:]))


EXPERIMENTS = Path(videoalign.__file__).parent / "experiments"


@pytest.mark.parametrize("path", ["nrg/sweep.yaml", "sprites/compare.yaml"])
def test_shipped_comparisons_are_read(path, monkeypatch):
    """Nothing is sampled: only what the function is called with counts, and every name in the file arrives."""
    seen, told = {}, yaml.safe_load((EXPERIMENTS / path).read_text())

    @functools.wraps(module.compare)
    def record(**given):
        seen.update(given)

    monkeypatch.setattr(module, "compare", record)
    assert (
        call("compare", "--config", EXPERIMENTS / path, "--out", "o", "--prompts", "p.txt", "--sampling.seed", 9) == 0
    )
    assert (seen["out"], seen["prompts"], seen["sampling"].seed) == ("o", "p.txt", 9)
    assert {*(seen["arms"] or {})} == {*told.get("arms", {})} and {*seen["sweeps"]} == {*told["sweeps"]}
    for name, sweep in seen["sweeps"].items():
        assert isinstance(sweep, Sweep) and sweep.strengths == told["sweeps"][name]["strengths"]
        assert all(getattr(sweep.guide, key) == value for key, value in told["sweeps"][name].get("guide", {}).items())
    assert all(
        isinstance(arm, Arm) and arm.lora == told["arms"][name]["lora"] for name, arm in (seen["arms"] or {}).items()
    )


def test_help_needs_no_configuration(capsys):
    assert call("compare", "--help") == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--generator", "--sweeps", "--sampling.steps"))


# --- the noisy reward on two processes ---------------------------------------------------------------------------------

LATENT = (16, 3, 4, 4)
SCRIPT = """
import json, sys, torch, lightning as L
from functools import partial
from videoalign.alignment import NoisyRewardModel
from videoalign.datamodules.latents import LatentPairs
from videoalign.models.lora import LoRA
from videoalign.models.noisy_reward import NoisyRewardShape

class Watch(L.Callback):
    def __init__(self):
        self.steps = []
    def on_train_batch_end(self, trainer, module, *rest):
        self.steps.append(float(trainer.callback_metrics["train/loss"]))

def train(generator, latents, out, devices):
    # the same global batch of all 8 pairs in each step; 7 held-out ones, so that a process has one to fill up with
    result = {}
    for name, options in {
        "bt": {},
        "btt": {"loss": "btt", "shared_noise": False, "gradient_checkpointing": True, "shape": NoisyRewardShape(blocks=2, taps=(1, 2), pooling="attention", hidden=16)},
        "lora": {"lora": LoRA(rank=4, alpha=8, targets=["to_q", "to_v"])},
    }.items():
        L.seed_everything(0, verbose=False)
        options = {"shape": NoisyRewardShape(blocks=2, hidden=16), **options}
        model = NoisyRewardModel(generator, optimizer=partial(torch.optim.SGD, lr=0.05), **options)
        watch = Watch()
        trainer = L.Trainer(accelerator="cpu", devices=devices, strategy="auto" if devices == 1 else "ddp", max_steps=3, val_check_interval=3,
            check_val_every_n_epoch=None, logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
            enable_checkpointing=False, use_distributed_sampler=False, callbacks=[watch])
        decided = f"{latents}/{'tied' if name == 'btt' else 'decided'}"
        data = LatentPairs(decided, f"{latents}/held", batch_size=8 // devices, val_batch_size=2, workers=0, shuffle_buffer=0, min_margin=None)
        trainer.fit(model, data)
        result[name] = {
            "weights": {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}, "steps": watch.steps,
            "val": {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")},
            "statistics": [model.network.statistics.mean, model.network.statistics.std],
        }
        torch.save(result, f"{out}/{devices}-{trainer.global_rank}.pt")

if __name__ == "__main__":
    from videoalign.cli import main
    torch.set_num_threads(1)
    generator, latents, out, command = sys.argv[1:]
    train(generator, latents, out, 2)
    main(json.loads(command))
"""


def write_pairs(folder, identity, count, ties):
    """Pairs of random latents with labels; the first ``ties`` of them tied in VQ and MQ."""
    with ShardWriter(folder, "latents", media="safetensors", per_shard=3) as writer:
        writer.index.latents = {**identity, "of": "pairs"}
        for i in range(count):
            made = {side: randn(*LATENT, seed=100 * i + s, dtype=torch.float32) for s, side in enumerate("ab")}
            made["prompt"] = randn(3 + i % 3, 32, seed=100 * i + 50, dtype=torch.float32)
            labels = {
                "VQ": "same" if i < ties else "AB"[i % 2],
                "MQ": "same" if i < ties else "AB"[i // 2 % 2],
                "TA": "AB"[i // 4 % 2],
            }
            writer.write(f"k{i}", {"": safetensors.torch.save(made)}, {"prompt": PROMPTS[i % 2], "labels": labels})
        (writer.path / NULL).write_bytes(safetensors.torch.save({"prompt": randn(1, 32, dtype=torch.float32)}))
        writer.index.tables[NULL] = sha256(writer.path / NULL)


@pytest.fixture(scope="module")
def pairs(world, tmp_path_factory):
    folder, identity = tmp_path_factory.mktemp("pairs"), load_generator(world / "wan").identity()
    write_pairs(folder / "decided", identity, 8, 0)
    write_pairs(folder / "tied", identity, 8, 3)
    write_pairs(folder / "held", identity, 7, 0)
    write_pairs(folder / "held_ties", identity, 7, 3)
    return folder


@pytest.fixture(scope="module")
def both(world, pairs, tmp_path_factory):
    """Trainings and a guided generation by one process and by two."""
    folder = tmp_path_factory.mktemp("both")
    (folder / "run.py").write_text(SCRIPT)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SHORT.items()]

    def command(out, devices):
        return [
            str(a)
            for a in (
                "generate",
                "--generator",
                world / "wan",
                "--prompts",
                world / "prompts.txt",
                "--out",
                folder / out,
                "--samples",
                SAMPLES,
                "--device",
                "cpu",
                *options,
                "--noisy-reward",
                world / "nrg",
                "--strength",
                30,
                "--weights",
                "TA=1",
                "--devices",
                devices,
            )
        ]

    done = subprocess.run(
        [sys.executable, folder / "run.py", world / "wan", pairs, folder, json.dumps(command("two", 2))],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with torch.random.fork_rng():
        runpy.run_path(str(folder / "run.py"))["train"](str(world / "wan"), str(pairs), str(folder), 1)
    assert call(*command("one", 1)) == 0
    trained = [torch.load(folder / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1")]
    return SimpleNamespace(folder=folder, one=trained[0], two=trained[1:], text=done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bt", "btt", "lora"])
def test_two_processes_train_a_noisy_reward_as_one(name, both):
    """The same weights and losses: noise and time belong to the pair and not to the process."""
    one, (first, second) = both.one[name], (ranks[name] for ranks in both.two)
    assert len(one["steps"]) == len(first["steps"]) == 3 and len(set(one["steps"])) == 3
    for step in range(3):
        mean = (first["steps"][step] + second["steps"][step]) / 2
        assert mean == pytest.approx(one["steps"][step], rel=1e-4)
    assert first["weights"].keys() == second["weights"].keys() == one["weights"].keys() and one["weights"]
    for key, want in one["weights"].items():
        torch.testing.assert_close(first["weights"][key], want, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
        assert torch.equal(first["weights"][key], second["weights"][key])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bt", "btt", "lora"])
def test_two_processes_measure_a_noisy_reward_as_one(name, both):
    one, ranks = both.one[name], [rank[name] for rank in both.two]
    assert {"val/loss", "val/accuracy/TA", "val/accuracy_at_t/0.5/VQ", "val/calibration/MQ"} <= one["val"].keys()
    assert any(0 < value < 1 for key, value in one["val"].items() if "accuracy" in key)
    for rank in ranks:
        assert rank["val"] == pytest.approx(one["val"], rel=1e-4, abs=1e-5)
        for found, want in zip(rank["statistics"], one["statistics"]):
            assert found == pytest.approx(want, rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_two_processes_generate_the_same_guided_videos(both):
    one, two = (videos(both.folder / name) for name in ("one", "two"))
    assert one == two
    made, other = (records(both.folder / name) for name in ("one", "two"))
    for key, record in made.items():
        assert record["guide"]["strength"] == 30 and record["seconds"] > 0 and other[key]["seconds"] > 0
        assert other[key]["noisy_reward"] == pytest.approx(record["noisy_reward"], abs=1e-4)
        assert {**other[key], "seconds": 0, "noisy_reward": 0} == {**record, "seconds": 0, "noisy_reward": 0}
    assert both.text.count("videos in") == 1
    assert [shard.samples for shard in ShardSet(both.folder / "two").index.shards] == [2, 2]


def held_out(world, pairs, batch, **options):
    """Validation metrics of an untrained noisy reward."""
    torch.manual_seed(0)
    model = NoisyRewardModel(str(world / "wan"), shape=NoisyRewardShape(blocks=2, hidden=16), **options)
    data = LatentPairs(val=str(pairs / "held_ties"), batch_size=batch, workers=0, min_margin=None)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    return trainer.validate(model, data, verbose=False)[0]


@pytest.mark.parametrize("loss", ["bt", "btt"])
def test_held_out_numbers_do_not_depend_on_the_batches(loss, world, pairs):
    one, other = (held_out(world, pairs, batch, loss=loss) for batch in (7, 2))
    assert {k: v for k, v in one.items() if k != "val/loss"} == pytest.approx(
        {k: v for k, v in other.items() if k != "val/loss"}, abs=1e-5
    )
    assert one["val/loss"] == pytest.approx(other["val/loss"], rel=1e-5)
