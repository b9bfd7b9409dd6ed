"""Stochastic steps: densities, marginals and gradients against closed forms; and which steps are stochastic."""

import itertools
import math

import pytest
import torch
from torch.distributions import Independent, Normal

from videoalign import VideoAlignError
from videoalign.models.sde import (
    AllSteps,
    CoefficientPreserving,
    DanceSDE,
    EarlySteps,
    FlowSDE,
    LinearSDE,
    MovingWindow,
)

DIFFUSIONS = [FlowSDE(), FlowSDE(level=0.9), DanceSDE(), LinearSDE()]
ALL = [*DIFFUSIONS, CoefficientPreserving()]
FIRST = 0.9


def batch(kind=torch.float64, shape=(3, 2, 2, 2, 2)):
    source = torch.Generator().manual_seed(0)
    x, v, noise = (torch.randn(shape, generator=source, dtype=torch.float64).to(kind) for _ in range(3))
    return x, v, noise, torch.tensor([1.0, 0.6, 0.2]), torch.tensor([0.9, 0.5, 0.0])


def wide(values, like):
    return values.double().view(-1, *[1] * (like.ndim - 1))


def coefficients(sde, t):
    """The diffusion coefficient by hand, number by number."""
    if isinstance(sde, FlowSDE):
        return [sde.level * math.sqrt(one / (1 - (FIRST if one == 1 else one))) for one in t.tolist()]
    return [sde.level if isinstance(sde, DanceSDE) else FIRST * one for one in t.tolist()]


@pytest.mark.parametrize("sde", DIFFUSIONS, ids=repr)
def test_a_step_has_the_moments_of_its_formula(sde):
    x, v, _, t, t_next = batch()
    mean, std = sde.moments(x, v, t, t_next, FIRST)
    s, dt = torch.tensor(coefficients(sde, t), dtype=torch.float64), t_next.double() - t.double()
    noise = x + (1 - wide(t, x)) * v
    want = x + v * wide(dt, x) + wide(s**2 / (2 * t.double()), x) * noise * wide(dt, x)
    torch.testing.assert_close(mean, want)
    torch.testing.assert_close(std, s * (-dt).sqrt())


def test_a_coefficient_preserving_step_mixes_data_and_noise():
    x, v, _, t, t_next = batch()
    mean, std = CoefficientPreserving(level=0.5).moments(x, v, t, t_next, FIRST)
    assert std.tolist() == pytest.approx([one * math.sin(math.pi / 4) for one in t_next.tolist()])
    left = (wide(t_next, x) ** 2 - wide(std, x) ** 2).sqrt()
    data, noise = x - wide(t, x) * v, x + (1 - wide(t, x)) * v
    torch.testing.assert_close(mean, (1 - wide(t_next, x)) * data + left * noise)


@pytest.mark.parametrize("sde", DIFFUSIONS, ids=repr)
def test_log_probabilities_are_those_of_torch(sde):
    x, v, noise, t, t_next = batch()
    mean, std = sde.moments(x, v, t, t_next, FIRST)
    sample = mean + wide(std, mean) * noise
    law = Independent(Normal(mean, wide(std, mean).expand_as(mean)), mean.ndim - 1)
    torch.testing.assert_close(sde.log_prob(sample, mean, std), law.log_prob(sample) / mean[0].numel())


def test_a_coefficient_preserving_density_leaves_out_constants():
    x, _, noise, *_ = batch()
    std = torch.tensor([0.5, 2.0, 0.0], dtype=torch.float64)
    have = CoefficientPreserving().log_prob(x + noise, x, std)
    torch.testing.assert_close(have, -noise.square().flatten(1).mean(1))


@pytest.mark.parametrize("sde", ALL, ids=repr)
def test_frames_of_an_image_are_left_out_of_the_density(sde):
    x, v, noise, t, t_next = batch(shape=(3, 2, 4, 2, 2))
    mean, std = sde.moments(x, v, t, t_next, FIRST)
    sample = mean + noise
    want = sde.log_prob(sample[:, :, 1:], mean[:, :, 1:], std)
    torch.testing.assert_close(sde.log_prob(sample, mean, std, clean_frames=1), want)
    assert not torch.allclose(want, sde.log_prob(sample, mean, std))


@pytest.mark.parametrize("sde", ALL, ids=repr)
def test_the_gradient_of_a_density_equals_finite_differences(sde):
    x, v, noise, t, t_next = batch(shape=(3, 1, 1, 1, 2))
    sample = sde.moments(x, v, t, t_next, FIRST)[0] + noise

    def density(v):
        mean, std = sde.moments(x, v, t, t_next, FIRST)
        return sde.log_prob(sample, mean, std + (std == 0))  # the last step of CPS has no density

    assert torch.autograd.gradcheck(density, v.requires_grad_(True))


@pytest.mark.parametrize("sde", ALL, ids=repr)
def test_half_precision_is_computed_in_fp32(sde):
    x, v, noise, t, t_next = batch(torch.bfloat16)
    mean, std = sde.moments(x, v, t, t_next, FIRST)
    assert mean.dtype == std.dtype == torch.float32
    exact, exact_std = sde.moments(x.double(), v.double(), t, t_next, FIRST)
    torch.testing.assert_close(mean.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(std.double(), exact_std, rtol=1e-6, atol=1e-7)
    stored = (mean + wide(std, mean).float() * noise.float()).bfloat16()
    first, again = (sde.log_prob(stored, *sde.moments(x, v, t, t_next, FIRST)) for _ in range(2))
    assert first.dtype == torch.float32
    assert torch.equal((again - first).nan_to_num().exp(), torch.ones(3))


@pytest.mark.parametrize("begin", [1.0, 0.9997])
def test_the_first_step_takes_the_second_time_in_place_of_one(begin):
    """UniPC's first time is just below 1; without the replacement its noise would have a deviation of 9."""
    x, v, *_ = batch()
    times = torch.full((3,), begin), torch.full((3,), 0.95)
    mean, std = FlowSDE(level=0.7).moments(x, v, *times, 0.95)
    assert std.tolist() == pytest.approx([0.7 * math.sqrt(begin / 0.05 * (begin - 0.95))] * 3, rel=1e-5)
    assert mean.isfinite().all()


# --- marginals ------------------------------------------------------------------------------------

CENTRE, SPREAD = 1.5, 0.5


def velocity(x, t):
    """E[x_1 - x_0 | x_t] for data of N(CENTRE, SPREAD^2)."""
    away, variance = x - (1 - t) * CENTRE, (1 - t) ** 2 * SPREAD**2 + t**2
    return t * away / variance - CENTRE - (1 - t) * SPREAD**2 * away / variance


def marginal(sde, steps, stochastic=None, shift=3.0):
    """Mean and deviation at t = 0. Steps are linear in x, so both are carried on exactly, without samples."""
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    times = shift * u / (1 + (shift - 1) * u)
    mean, variance = 0.0, 1.0
    for number, (t, after) in enumerate(itertools.pairwise(times)):
        x = torch.tensor([[mean], [mean + 1.0]], dtype=torch.float64)
        if stochastic is None or number in stochastic:
            moved, std = sde.moments(x, velocity(x, t), t.expand(2), after.expand(2), float(times[1]))
        else:
            moved, std = x + (after - t) * velocity(x, t), torch.zeros(2)
        mean, variance = moved[0].item(), (moved[1] - moved[0]).item() ** 2 * variance + std[0].item() ** 2
    return mean, math.sqrt(variance)


@pytest.mark.parametrize("sde", DIFFUSIONS, ids=repr)
def test_marginals_keep_mean_and_spread(sde):
    mean, spread = marginal(sde, 1000)
    assert mean == pytest.approx(CENTRE, rel=0.005)
    assert spread == pytest.approx(SPREAD, rel=0.01)


def test_coefficient_preserving_steps_lose_spread_however_many_there_are():
    found = [marginal(CoefficientPreserving(level=0.7), steps) for steps in (10, 100, 1000)]
    assert [round(spread, 2) for _, spread in found] == [0.33, 0.41, 0.42]
    assert all(mean == pytest.approx(CENTRE, rel=0.02) for mean, _ in found)


@pytest.mark.parametrize("sde", ALL, ids=repr)
def test_a_short_window_keeps_the_spread(sde):
    steps = EarlySteps(size=3).steps(1000, 0, 0)
    assert marginal(sde, 1000, steps)[1] == pytest.approx(SPREAD, rel=0.01)


# --- windows --------------------------------------------------------------------------------------


def test_all_steps_but_the_last():
    assert AllSteps().steps(5, 3, 1) == [0, 1, 2, 3]
    assert AllSteps(skip_last=False).steps(2, 0, 0) == [0, 1]


def test_a_window_moves_and_begins_again():
    window = MovingWindow(size=2, every=3)
    begins = [window.steps(5, iteration, 9)[0] for iteration in range(15)]
    assert begins == [0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0, 1, 1, 1]
    assert window.steps(5, 6, 0) == [2, 3]  # 4 is the last step
    assert [MovingWindow(size=2, every=1, stride=2).steps(7, i, 0)[0] for i in range(4)] == [0, 2, 4, 0]
    assert MovingWindow().steps(25, 25, 0) == [1, 2, 3, 4]


def test_early_steps_are_drawn_from_seed_and_iteration():
    window = EarlySteps(size=2, share=0.5)
    found = {(seed, i): tuple(window.steps(12, i, seed)) for seed in range(8) for i in range(8)}
    assert set(found.values()) == {(begin, begin + 1) for begin in range(5)}  # all of them, and none after step 5
    assert found == {(seed, i): tuple(window.steps(12, i, seed)) for seed, i in found}
    assert len({found[seed, 0] for seed in range(8)}) > 1 < len({found[0, i] for i in range(8)})
    assert max(max(EarlySteps(share=1.0).steps(3, i, 0)) for i in range(50)) == 1  # never the last one


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FlowSDE(level=0.0), "FlowSDE.level is 0.0"),
        (lambda: DanceSDE(level=math.nan), "DanceSDE.level is nan"),
        (lambda: FlowSDE(level=math.inf), "must be finite"),
        (lambda: CoefficientPreserving(level=1.5), "at most 1"),
        (lambda: MovingWindow(size=0), "size must be at least 1, got 0"),
        (lambda: MovingWindow(every=0), "MovingWindow.every must be at least 1, got 0"),
        (lambda: MovingWindow(stride=-1), "MovingWindow.stride must be at least 1, got -1"),
        (lambda: EarlySteps(size=0), "size must be at least 1, got 0"),
        (lambda: EarlySteps(share=0.0), "share is 0.0"),
        (lambda: EarlySteps(share=math.nan), "share is nan"),
        (lambda: AllSteps().check(1), "there are 0 steps before the last"),
        (lambda: MovingWindow(size=4).check(4), "a window of 4 steps, but there are 3 steps before the last"),
        (lambda: EarlySteps(size=3).check(5), "a window of 3 steps, but there are 2 early ones among 5"),
    ],
)
def test_windows_and_levels_that_cannot_be_are_refused(make, words):
    with pytest.raises(VideoAlignError, match=words.replace("(", r"\(")):
        make()
