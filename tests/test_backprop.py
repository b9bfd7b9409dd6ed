"""Sampling with gradients: the chain against the samplers, its gradients against finite differences, the routes."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from families_kit import PROMPTS, SHAPES, encoded, nothing
from flow_kit import SHAPE, make
from helpers import doubles, randn
from videoalign import VideoAlignError
from videoalign.alignment import FlowSFT
from videoalign.models.backprop import Chain, LastSteps, PredictedEnd, RandomStep
from videoalign.models.flow import expand


class Curved:
    """A generator in double precision whose velocity is a known function of latents, time and one weight."""

    def __init__(self, weight):
        self.weight = weight
        self.pipeline = SimpleNamespace(scheduler=SimpleNamespace(config={}))

    def schedule(self, scheduler, steps, x):
        scheduler.sigmas = torch.linspace(1, 0, steps + 1) ** 0.75

    def require(self, part):
        return None

    def with_image(self, x, condition):
        return x

    def _step_velocity(self, step):
        return self.weight[0] * torch.tanh(step.x) + self.weight[1] * step.x * expand(step.t, step.x)


def end_of(route, weight, x, stops, noise, steps):
    """What the route gives for a weight, begun at fixed latents: a number, and the time."""
    end, t = route(Chain(Curved(weight), {}, noise, steps), x, stops)
    return (end.sin() * torch.arange(1.0, len(end) + 1)[:, None, None, None, None]).sum(), t


@pytest.mark.parametrize("route", [RandomStep(), RandomStep(2, 3), LastSteps(), LastSteps(3), PredictedEnd(4)], ids=str)
def test_gradients_of_a_route_are_those_of_finite_differences(route):
    steps, noise = 6, doubles(4, 2, 1, 2, 2)
    weight = torch.tensor([0.7, -0.4], dtype=torch.float64, requires_grad=True)
    chain = Chain(Curved(weight), {}, noise, steps)
    stops = route.stops(torch.tensor([0.0, 0.3, 0.6, 0.99]), chain.times)
    x = chain.walk(stops)
    assert not x.requires_grad
    found, t = end_of(route, weight, x, stops, noise, steps)
    (gradient,) = torch.autograd.grad(found, weight)
    assert (t == 0).all() == route.clean
    for place in range(2):
        h = torch.zeros(2, dtype=torch.float64)
        h[place] = 1e-6
        ends = [end_of(route, weight.detach() + sign * h, x, stops, noise, steps)[0] for sign in (1, -1)]
        assert gradient[place].item() == pytest.approx((ends[0] - ends[1]).item() / 2e-6, rel=1e-7)


def test_all_steps_with_gradients_are_the_whole_chain():
    """Nothing is left out then: the gradient is that of sampling from the noise on."""
    noise, weight = doubles(2, 2, 1, 2, 2), torch.tensor([0.7, -0.4], dtype=torch.float64, requires_grad=True)
    route, stops = LastSteps(5), torch.zeros(2, dtype=torch.long)
    found, _ = end_of(route, weight, noise, stops, noise, 5)
    (gradient,) = torch.autograd.grad(found, weight)
    times, x, h = Chain(Curved(weight), {}, noise, 5).times.double(), noise.clone(), 1e-6
    ends = []
    for change in (h, -h):
        x = noise.clone()
        for t, following in pairwise(times):
            x = x + (following - t) * ((0.7 + change) * torch.tanh(x) - 0.4 * x * t)
        ends.append((x.sin() * torch.tensor([1.0, 2.0])[:, None, None, None, None]).sum().item())
    assert gradient[0].item() == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-6)


# --- real architectures ---------------------------------------------------------------------------


def setting(of_family, family, prompts=PROMPTS):
    """A generator, a batch's condition, and noise."""
    generator = of_family(family)
    condition = generator.condition(encoded(generator, prompts))
    return generator, condition, randn(len(prompts), *SHAPES[family], seed=5)


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
@pytest.mark.parametrize("family", ["ltx", "ltx-i2v", "ltx2"])
def test_the_chain_is_the_sampling_of_a_pipeline_with_an_euler_scheduler(family, cfg_scale, of_family):
    generator, condition, noise = setting(of_family, family)
    null = nothing(generator) if cfg_scale > 1 else None
    with torch.no_grad():
        want = generator.sample(condition, noise, 4, cfg_scale, null)
        chain = Chain(generator, condition, noise, 4, cfg_scale, null)
        x, t = LastSteps(2)(chain, chain.walk(torch.tensor([2, 2])), torch.tensor([2, 2]))
    torch.testing.assert_close(x, want, rtol=1e-4, atol=1e-5)
    assert t.tolist() == [0.0, 0.0]
    if "image" in condition:
        assert torch.equal(x[:, :, :1], condition["image"])


@pytest.mark.parametrize(("family", "shift"), [("wan", None), ("wan", 5.0), ("wan22-5b", None), ("wan22-5b", 3.0)])
def test_euler_steps_are_taken_at_the_times_of_the_schedule(family, shift, of_family):
    """Also where the pipeline's scheduler is another solver (UniPC), or ends with a step from t = 0.001."""
    generator, condition, noise = setting(of_family, family)
    chain = Chain(generator, condition, noise, 5, shift=shift)
    s = shift or generator.official_shift() or 1.0
    u = torch.linspace(1, 0.001, 6)[:-1]
    torch.testing.assert_close(chain.times[:-1], s * u / (1 + (s - 1) * u), rtol=0, atol=6e-3)
    assert len(chain.times) == 6 and chain.times[-1] == 0
    assert chain.times[-2] > 0.9 * (chain.times[-3] - chain.times[-2])
    x = noise
    with torch.no_grad():
        for t, following in pairwise(chain.times):
            x = x + (following - t) * generator.velocity(x, t.expand(2), condition)
        found = chain.walk(torch.tensor([5, 5]))
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-6)


def test_each_sample_has_its_own_step(of_family):
    """Samples of a batch that stop at different steps are those that are sampled alone."""
    generator, condition, noise = setting(of_family, "wan", [*PROMPTS, "a"])
    route, stops = RandomStep(), torch.tensor([2, 0, 1])
    with torch.no_grad():
        chain = Chain(generator, condition, noise, 4)
        together, times = route(chain, chain.walk(stops), stops)
        further = chain.walk(stops, 4)  # as a rank does whose neighbours need more steps
        assert torch.equal(further, chain.walk(stops))
        for n in range(3):
            one = {name: part[n : n + 1] for name, part in condition.items()}
            alone = Chain(generator, one, noise[n : n + 1], 4)
            x, t = route(alone, alone.walk(stops[n : n + 1]), stops[n : n + 1])
            torch.testing.assert_close(together[n : n + 1], x, rtol=1e-4, atol=1e-5)
            assert times[n] == t[0] == chain.times[stops[n] + 1]


def test_steps_without_gradients_leave_autocast_nothing_without_gradients(folders):
    """Autocast keeps its bf16 copies of adapters; torch before 2.11 kept those of the first steps, which had none."""
    model = make(FlowSFT, folders["wan"])
    generator, noise = model.generator, randn(1, *SHAPE)
    condition = generator.condition([{"prompt": randn(3, 32)}])
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    stops, found = torch.tensor([1]), []
    chain = Chain(generator, condition, noise, 3)
    with torch.autocast("cpu", torch.bfloat16):
        x = chain.walk(stops)
    for before in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            if before:
                assert torch.equal(chain.walk(stops), x)
            end, _ = RandomStep()(chain, x, stops)
        found.append(torch.autograd.grad(end.square().sum(), list(trained.values())))
    for name, one, other in zip(trained, *found):
        assert one.any(), name
        assert torch.equal(one, other), name


# --- routes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("route", "first", "last"),
    [
        (RandomStep(), 0, 38),
        (RandomStep(3, 7), 3, 7),
        (RandomStep(39, 39), 39, 39),
        (PredictedEnd(), 30, 39),
        (PredictedEnd(100), 0, 39),
        (LastSteps(3), 37, 37),
    ],
    ids=str,
)
def test_steps_are_drawn_alike(route, first, last):
    route.check(40)
    uniform = torch.arange(10_000) / 10_000
    counts = torch.bincount(route.stops(uniform, torch.linspace(1, 0, 41)), minlength=40)
    assert counts[first : last + 1].sum() == 10_000
    assert counts[first : last + 1].max() - counts[first : last + 1].min() <= 2  # 0.1 n is rounded
    assert route.stops(torch.tensor([1 - 2**-24]), torch.linspace(1, 0, 41)).item() == last


def test_steps_are_those_of_the_expert():
    times = torch.tensor([1.0, 0.95, 0.9, 0.8, 0.4, 0.0])
    uniform = torch.arange(100) / 100
    assert set(RandomStep().stops(uniform, times, 0.875).tolist()) == {0, 1, 2}
    assert set(RandomStep().stops(uniform, times).tolist()) == {0, 1, 2, 3}
    with pytest.raises(VideoAlignError, match=r"step 3 and those behind it begin below t = 0.875"):
        RandomStep(3).stops(uniform, times, 0.875)


@pytest.mark.parametrize(
    ("route", "steps", "words"),
    [
        (RandomStep(2, 1), 10, "steps 2 to 1 are not among the 10"),
        (RandomStep(-1), 10, "steps -1 to 8"),
        (RandomStep(0, 10), 10, "steps 0 to 10"),
        (RandomStep(), 1, "steps 0 to -1"),
        (LastSteps(0), 10, "count is 0"),
        (LastSteps(11), 10, "sampling has 10 steps"),
        (PredictedEnd(0), 10, "at least 1"),
    ],
    ids=str,
)
def test_steps_that_are_not_there_are_refused(route, steps, words):
    with pytest.raises(VideoAlignError, match=words):
        route.check(steps)
