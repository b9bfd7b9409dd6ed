"""Guidance through the predicted end, with analytic generators and with pipelines."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from helpers import FEW_TOKENS, doubles, randn
from videoalign import VideoAlignError
from videoalign.miniature.networks.pipelines import make_generator
from videoalign.models.generator_folder import load_generator
from videoalign.models.guidance import Guidance, guided, steering
from videoalign.models.noisy_reward import NoisyReward, NoisyRewardShape
from videoalign.models.video_reward import Statistics

# --- guidance through the predicted end: analytic generators --------------------------------------


class Net(torch.nn.Module):
    """A transformer whose velocity is a function of latents and times."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, t):
        return self.function(x, t)


class View:
    """A reward that is a function of latents and times, for a family without a text encoder."""

    def __init__(self, function):
        self.function, self.times = function, []
        self.generator = SimpleNamespace(
            velocity=lambda x, t, condition, net: net(x, t),
            encoded=lambda found: found,
            unpacked=lambda x, call: x,
            packed=lambda x: x,
            with_image=lambda x, condition: x,
            clean_frames=lambda condition: 0,
            plain_pipeline=True,
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
    """The samples of a pipeline with this velocity, from noise x and under guidance."""
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
    """For N(0, 1) the predicted end is (1 - t) x / s, s = (1 - t)^2 + t^2: exact for r = x_0, as a noisy reward is.

    dx/dt = ((2t - 1) x - w t) / s has the solution x_t = w (1 - t) + x_1 sqrt(s). Every sample ends at x_1 + w,
    which is distributed as N(w, 1).
    """
    noise = randn(50, 1, 1, 1, 1)
    found, view = integrate(standard, lambda x: x.flatten(1)[:, 0], noise, strength=1.5, through="predicted")
    torch.testing.assert_close(found, noise + 1.5, rtol=0, atol=0.01)
    assert len(view.times) == 999 and not torch.cat(view.times).any()  # always asked of clean latents


def test_a_quadratic_reward_shrinks_by_the_solution():
    """r = -k/2 x_0^2: dx/dt = x ((2t - 1) / s + w k t (1 - t) / s^2), whose integral from 1 to 0 is -w k / 2.

    The tilted deviation is (1 + w k)^(-1/2): through the predicted end guidance is an approximation, and stronger here.
    """
    noise = randn(50, 1, 1, 1, 1)
    found, _ = integrate(standard, lambda x: -0.25 * x.flatten(1)[:, 0] ** 2, noise, strength=2.0, through="predicted")
    torch.testing.assert_close(found, noise * math.exp(-0.5), rtol=0.01, atol=1e-3)


def test_without_strength_the_solution_is_the_noise_itself():
    noise = randn(50, 1, 1, 1, 1)
    found, view = integrate(standard, lambda x: x.flatten(1)[:, 0], noise, strength=0.0, through="predicted")
    torch.testing.assert_close(found, noise, rtol=0, atol=0.01)
    assert not view.times


def test_a_noisy_reward_is_asked_at_the_time_of_the_latents():
    noise = randn(3, 1, 1, 1, 1)
    _, view = integrate(standard, lambda x: x.flatten(1)[:, 0], noise, steps=4, strength=1.0, through="noisy")
    torch.testing.assert_close(torch.stack(view.times)[:, 0], torch.tensor([0.75, 0.5, 0.25]))


def test_the_gradient_through_the_generator_equals_finite_differences():
    """The gradient is that of r(x - t v(x, t)), in float64; one that stops at the velocity differs."""
    matrix, reader = 0.3 * doubles(24, 24), doubles(24, 3, seed=1)
    weights, t, x = {"VQ": 0.5, "TA": -2.0}, 0.6, doubles(2, 3, 2, 2, 2, seed=2)

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


# --- guidance through the predicted end: pipelines ------------------------------------------------

SIZE = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 4, "output_type": "latent"}
WORDS = ["a red circle", "a blue square moves"]


@pytest.fixture(scope="module", params=["wan", "ltx"])
def family(request, tmp_path_factory):
    """A generator and a random noisy reward of it."""
    folder = tmp_path_factory.mktemp("generator") / request.param
    make_generator(folder, request.param, hidden=48, layers=2, max_tokens=FEW_TOKENS)
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
    assert not torch.equal(found["predicted"], plain)
    assert not torch.equal(found["predicted"], found["noisy"])
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert torch.equal(sample(pipeline, scale), plain)
    assert "step" not in vars(pipeline.scheduler)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_pipeline_step_reads_the_predicted_end(family, scale):
    """Two steps are done by hand; the end is predicted without classifier-free guidance and read at time 0."""
    generator, reward = family
    guide = Guidance(weights={"VQ": 1.0, "TA": 0.5}, strength=2.0, through="predicted")
    condition = generator.condition(generator.encode_prompts(WORDS))
    null = generator.condition(generator.encode_prompts(["", ""])) if scale > 1 else None
    x = randn(2, *generator.latent_shape(9, 64, 64), seed=3)
    got = generator.sample(condition, x, 2, scale, null, steer=steering(reward, guide, condition))

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
    noise = randn(2, *generator.latent_shape(9, 64, 64), seed=3)
    values = []
    for strength in (0.0, 3.0, 10.0):
        guide = Guidance(weights={"TA": 1.0}, strength=strength, through="predicted")
        latents = generator.sample(condition, noise, 6, steer=steering(reward, guide, condition))
        values.append(float(reward(latents, torch.zeros(2), condition)[:, 2].sum()))
    assert values[0] < values[1] < values[2]


def test_the_predicted_end_works_in_inference_mode(family):
    generator, reward = family
    with guided(generator.pipeline, reward, strength=1.0, through="predicted"):
        want = sample(generator.pipeline, 3.0)
        with torch.inference_mode():
            assert torch.equal(sample(generator.pipeline, 3.0), want)
