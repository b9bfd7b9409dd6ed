"""Times, objectives and reward weights of generator alignment, as pure functions."""

import math
from statistics import NormalDist

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from flow_kit import data, fit, make
from helpers import randn
from videoalign import VideoAlignError
from videoalign.alignment import FlowDPO, FlowIPO, QuadraticBeta
from videoalign.models import flow
from videoalign.models.flow import TimeLaw, draw, normal
from videoalign.models.flow_losses import (
    BetaSchedule,
    ConstantBeta,
    RewardWeights,
    dpo_losses,
    implicit_rewards,
    ipo_losses,
)

# --- times and objectives -------------------------------------------------------------------------

U = torch.linspace(0.001, 0.999, 400)


def test_uniform_times_are_the_uniform_variables():
    assert torch.equal(TimeLaw()(U), U)


class AsOnAGPU:
    """A generator of the CPU that says it is a GPU's."""

    class device:
        type = "cuda"


def test_noise_of_a_gpu_is_drawn_in_pieces_that_do_not_depend_on_its_model(monkeypatch):
    """No piece is larger than what a GPU draws at once; together they are one stream of standard normal numbers."""
    sizes, whole = [], torch.Generator().manual_seed(0)
    randn = torch.randn
    monkeypatch.setattr(flow.torch, "randn", lambda n, **_: sizes.append(n) or randn(n, generator=whole))
    noise = normal((3, 5, 7001), AsOnAGPU())
    assert noise.shape == (3, 5, 7001) and sum(sizes) == noise.numel() and max(sizes) == 32_768
    monkeypatch.undo()
    again = torch.Generator().manual_seed(0)
    assert torch.equal(noise.flatten(), torch.cat([torch.randn(n, generator=again) for n in sizes]))
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_noise_of_a_cpu_is_that_of_torch():
    one, other = (torch.Generator().manual_seed(5) for _ in range(2))
    assert torch.equal(normal((3, 50, 700), one), torch.randn(3, 50, 700, generator=other))


@pytest.mark.gpu
def test_noise_of_this_gpu_is_one_stream():
    one, other = (torch.Generator("cuda").manual_seed(5) for _ in range(2))
    pieces = [torch.randn(size, generator=other, device="cuda") for size in (32_768, 32_768, 100)]
    assert torch.equal(normal((65_636,), one), torch.cat(pieces))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.7, 0.4), (1.0, 2.0)])
def test_logit_normal_times_have_its_quantiles(mean, std):
    want = [1 / (1 + math.exp(-NormalDist(mean, std).inv_cdf(u))) for u in U.double().tolist()]
    found = TimeLaw(law="logit_normal", mean=mean, std=std)(U)
    torch.testing.assert_close(found, torch.tensor(want), rtol=2e-5, atol=1e-6)
    ends = TimeLaw(law="logit_normal", mean=mean, std=std)(torch.tensor([0.0, 1.0]))
    assert ends.isfinite().all()
    assert ends[0] < found[0]
    assert ends[1] > found[-1]


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 5.0])
def test_shift_is_that_of_the_samplers(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=U.flip(0).tolist())
    torch.testing.assert_close(TimeLaw(shift=shift)(U), scheduler.sigmas[:-1].flip(0), rtol=1e-5, atol=1e-6)
    both = TimeLaw(law="logit_normal", mean=0.3, shift=shift)(U)
    plain = TimeLaw(law="logit_normal", mean=0.3)(U)
    # odds are multiplied, so that the mean of the normal variable moves by ln shift
    torch.testing.assert_close(both / (1 - both), shift * plain / (1 - plain), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"law": "cosine"},
        {"std": 0.0},
        {"std": -1.0},
        {"std": math.nan},
        {"std": math.inf},
        {"mean": math.nan},
        {"mean": math.inf},
        {"shift": 0.0},
        {"shift": -3.0},
        {"shift": math.nan},
        {"shift": math.inf},
    ],
    ids=str,
)
def test_time_laws_that_mean_nothing_are_refused(options):
    with pytest.raises(VideoAlignError, match="times"):
        TimeLaw(**options)


def test_draws_are_uniform_and_normal_and_each_seeds_own():
    seeds = torch.arange(2000)
    u, noise = draw(seeds, torch.Size((4,)), torch.device("cpu"))
    quantiles = u.sort().values - (torch.arange(2000) + 0.5) / 2000
    assert quantiles.abs().max() < 0.04  # Kolmogorov-Smirnov, p about 0.003
    assert noise.mean().abs() < 0.04
    assert abs(noise.std() - 1) < 0.03
    again = draw(seeds[[7, 3]], torch.Size((4,)), torch.device("cpu"))
    assert torch.equal(again[0], u[[7, 3]])
    assert torch.equal(again[1], noise[[7, 3]])


@pytest.mark.parametrize("beta", [0.0, -500.0, math.nan, math.inf])
@pytest.mark.parametrize("kind", [ConstantBeta, QuadraticBeta])
def test_beta_that_ties_nothing_is_refused(kind, beta):
    with pytest.raises(VideoAlignError, match="beta"):
        kind(beta)


def test_beta_schedules_have_their_values():
    t = torch.tensor([0.0, 0.25, 0.5, 1.0])
    assert ConstantBeta(300.0)(t).tolist() == [300.0] * 4
    assert QuadraticBeta(200.0)(t).tolist() == [200.0, 112.5, 50.0, 0.0]


def test_a_beta_schedule_of_ones_own_is_asked_for_each_time(folders):
    class Early(BetaSchedule):
        def __call__(self, t):
            return torch.where(t > 0.5, self.beta, 0.0)

    model = make(FlowDPO, folders["wan"], beta=Early(2.0))
    errors, reference, t = torch.tensor([[1.0, 1.0], [3.0, 3.0]]), torch.ones(2, 2), torch.tensor([0.2, 0.7])
    losses, values = model.loss({}, errors, reference, t)
    assert values["rewards/margins"].tolist() == [0.0, 2.0]
    torch.testing.assert_close(losses, torch.tensor([math.log(2), math.log(1 + math.exp(-2))]))


@pytest.mark.parametrize("quadratic", [False, True])
def test_dpo_loss_and_gradient_are_those_of_the_printed_equation(quadratic):
    """The equation is computed in float64, pair by pair, as VideoAlign prints it (with means for norms)."""
    errors = (0.1 * randn(2, 6)).abs().requires_grad_()
    reference, t = (0.1 * randn(2, 6, seed=1)).abs(), torch.linspace(0.05, 0.95, 6)
    rewards = implicit_rewards(errors, reference, (QuadraticBeta if quadratic else ConstantBeta)(40.0)(t))
    loss = dpo_losses(rewards).mean()
    loss.backward()
    e = errors.detach().double().requires_grad_()
    terms = []
    for n in range(6):
        beta = 40.0 * (1 - t[n].double()) ** 2 if quadratic else 40.0
        w_diff, l_diff = e[0, n] - reference[0, n].double(), e[1, n] - reference[1, n].double()
        terms.append(-torch.log(1 / (1 + torch.exp(0.5 * beta * (w_diff - l_diff)))))
    want = sum(terms) / 6
    want.backward()
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(errors.grad.double(), e.grad, rtol=1e-4, atol=1e-7)
    assert (errors.grad[0] > 0).all() and (errors.grad[1] < 0).all()  # down with the preferred one's error


def test_ipo_loss_is_the_squared_distance_from_the_margin():
    rewards = torch.tensor([[2.0, 0.0, -1.0], [1.0, 0.0, 1.0]], requires_grad=True)
    losses = ipo_losses(rewards, 1.5)
    assert losses.tolist() == [0.25, 2.25, 12.25]
    losses.sum().backward()
    assert rewards.grad[0].tolist() == [-1.0, -3.0, -7.0]


def test_ipo_begins_at_its_margin_squared(folders, pairs):
    steps = fit(make(FlowIPO, folders["wan"], trained=False, margin=0.5), data(pairs["wan"])).steps
    assert steps[0]["train/loss"] == 0.25 and steps[0]["train/rewards/margins"] == 0.0


@pytest.mark.parametrize("margin", [0.0, -1.0, math.nan])
def test_ipo_margin_must_be_positive(margin, folders):
    with pytest.raises(VideoAlignError, match="margin"):
        make(FlowIPO, folders["wan"], margin=margin)


def test_raw_reward_weights_are_clipped_exponentials():
    r = torch.tensor([-2.0, 0.0, 1.0, 5.0, 1000.0])
    plain = RewardWeights(temperature=2.0, clip=None).raw(r)
    torch.testing.assert_close(plain[:4], torch.tensor([math.exp(x / 2) for x in (-2.0, 0.0, 1.0, 5.0)]))
    assert plain.isfinite().all()
    assert RewardWeights(clip=3.0).raw(r).max() == 3.0 and RewardWeights(clip=3.0).raw(r)[1] == 1.0


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"clip": 0.0},
        {"clip": -2.0},
        {"clip": math.nan},
    ],
    ids=str,
)
def test_reward_weights_that_mean_nothing_are_refused(options):
    with pytest.raises(VideoAlignError, match="rewards"):
        RewardWeights(**options)
