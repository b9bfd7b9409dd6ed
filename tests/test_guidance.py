"""Flow-NRG: the guided velocity against closed forms, and guidance of unmodified diffusers pipelines."""

import itertools
import math

import pytest
import torch
from diffusers import UniPCMultistepScheduler

from helpers import FEW_TOKENS
from videoalign import VideoAlignError
from videoalign.miniature.networks.pipelines import make_generator
from videoalign.models.generator_folder import load_generator
from videoalign.models.guidance import Guidance, guided, steering
from videoalign.models.noisy_reward import NoisyReward, NoisyRewardShape

SIZE = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 4, "output_type": "latent"}
PROMPTS = ["a red circle", "a blue square moves"]


@pytest.fixture(scope="module", params=["wan", "ltx"])
def family(request, tmp_path_factory):
    """A generator and a random noisy reward of it."""
    folder = tmp_path_factory.mktemp("generator") / request.param
    make_generator(folder, request.param, hidden=48, layers=2, max_tokens=FEW_TOKENS)
    generator = load_generator(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reward = NoisyReward(generator, NoisyRewardShape(blocks=2, taps=(1, 2), pooling="attention", hidden=16))
    return generator, reward.eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("trains", [False, True])
def test_a_frozen_reward_computes_in_the_generators_dtype(dtype, trains, tmp_path):
    make_generator(tmp_path / "wan", "wan", hidden=48, layers=2, max_tokens=FEW_TOKENS)
    generator, seen = load_generator(tmp_path / "wan", dtype), []
    reward = NoisyReward(generator, NoisyRewardShape(blocks=1, hidden=16)).eval()
    if not trains:
        reward.requires_grad_(False)
    reward.trunk.blocks[0].attn1.to_q.register_forward_hook(lambda layer, args, out: seen.append(out.dtype))
    x = torch.randn(1, *generator.latent_shape(9, 64, 64), requires_grad=True)
    found = reward(x, torch.tensor([0.5]), generator.condition(generator.encode_prompts(PROMPTS[:1])))
    found.sum().backward()
    assert seen == [torch.float32 if trains else getattr(torch, dtype)]
    assert found.dtype == x.grad.dtype == torch.float32 and x.grad.any()


def sample(pipeline, scale=1.0, prompts=PROMPTS):
    return pipeline(prompts, guidance_scale=scale, generator=torch.Generator().manual_seed(0), **SIZE).frames


def ones(dimension=None):
    return {d: float(dimension in (None, d)) for d in ("VQ", "MQ", "TA")}


# --- the formula ----------------------------------------------------------------------------------


def gaussian(strength, sign=1.0, steps=1500):
    """Mean and variance of samples of N(0, 1) tilted by exp(w x_0), under the exact noisy reward, in float64.

    Of x_0 given x_t the mean is (1 - t) x / s with s = (1 - t)^2 + t^2, and the variance t^2 / s: hence
    ln E[exp(w x_0) | x_t] / w = (1 - t) x / s + w t^2 / (2 s), which is what a noise-aware reward would learn.
    """
    x = torch.randn(20000, 1, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    guide = Guidance(weights={"VQ": 1.0}, strength=strength, largest_factor=math.inf)

    def reward(x, t):
        t = t.view(-1, 1)
        s = (1 - t) ** 2 + t**2
        value = sign * ((1 - t) * x.flatten(1) / s + strength * t**2 / (2 * s))
        return torch.cat([value, 0 * value, 0 * value], 1)

    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    for number, (t, after) in enumerate(itertools.pairwise(times)):
        s = (1 - t) ** 2 + t**2
        velocity = (t - (1 - t)) / s * x  # E[x_1 - x_0 | x_t]
        if guide.acts(float(t), number):
            velocity = guide(reward, x, t.expand(len(x)), velocity)
        x = x - (t - after) * velocity
    return x.mean().item(), x.var().item()


def test_an_exact_reward_reaches_the_tilted_mean():
    mean, variance = gaussian(1.0)
    assert mean == pytest.approx(1.0, rel=0.02)
    assert variance == pytest.approx(1.0, abs=0.05)
    assert gaussian(0.0)[0] == pytest.approx(0.0, abs=0.02)


def test_the_other_sign_goes_the_other_way():
    assert gaussian(1.0, sign=-1.0)[0] == pytest.approx(-1.0, abs=0.05)


def test_the_gradient_equals_finite_differences():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 2, 2, 2, dtype=torch.float64, generator=generator)
    matrix = torch.randn(24, 3, dtype=torch.float64, generator=generator)
    guide = Guidance(weights={"VQ": 0.5, "TA": -2.0}, strength=3.0)
    t = torch.tensor([0.25, 0.75], dtype=torch.float64)

    def reward(x, t):
        return torch.sin(x.flatten(1) @ matrix) * (1 + t[:, None])

    change = guide(reward, x, t, torch.zeros_like(x))
    step = 1e-6
    for place in [(0, 0, 0, 0, 0), (1, 2, 1, 0, 1)]:
        moved = torch.zeros_like(x)
        moved[place] = step
        weights = torch.tensor([0.5, 0.0, -2.0], dtype=torch.float64)
        slope = (((reward(x + moved, t) - reward(x - moved, t)) @ weights).sum() / (2 * step)).item()
        want = -3.0 * (t / (1 - t))[place[0]].item() * slope
        assert change[place].item() == pytest.approx(want, rel=1e-6)


def test_the_change_is_linear_in_strength_and_weights():
    x = torch.randn(2, 1, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    t, zero = torch.tensor([0.3, 0.6], dtype=torch.float64), torch.zeros_like(x)

    def reward(x, t):
        return torch.stack([x.flatten(1).sum(1) ** 2, x.flatten(1).prod(1), x.flatten(1).exp().sum(1)], 1)

    def change(strength=1.0, **weights):
        return Guidance(weights=weights, strength=strength)(reward, x, t, zero)

    parts = [change(**{d: 1.0}) for d in ("VQ", "MQ", "TA")]
    torch.testing.assert_close(change(VQ=0.1, MQ=0.2, TA=0.7), 0.1 * parts[0] + 0.2 * parts[1] + 0.7 * parts[2])
    torch.testing.assert_close(change(5.0, VQ=1.0), 5 * parts[0])


def test_factor_and_share_are_bounded():
    guide = Guidance(weights={"VQ": 1.0}, strength=1000.0, largest_factor=4.0, largest_share=0.5)
    torch.testing.assert_close(
        guide.factor(torch.tensor([0.0, 0.5, 0.8, 0.99, 1.0])), torch.tensor([0.0, 1.0, 4.0, 4.0, 4.0])
    )
    velocity = torch.ones(2, 1, 1, 2, 2)
    change = guide(lambda x, t: x.flatten(1)[:, :3], velocity.clone(), torch.tensor([0.5, 0.9]), velocity) - velocity
    torch.testing.assert_close(change.flatten(1).norm(dim=1), torch.full((2,), 0.5 * 2.0))


@pytest.mark.parametrize(
    ("options", "t", "step", "acts"),
    [
        ({}, 0.5, 3, True),
        ({}, 1.0, 0, False),
        ({"begin": 0.6}, 0.7, 0, False),
        ({"end": 0.2}, 0.1, 0, False),
        ({"every": 2}, 0.5, 1, False),
        ({"every": 2}, 0.5, 2, True),
        ({"strength": 0.0}, 0.5, 0, False),
        ({"weights": {}}, 0.5, 0, False),
    ],
)
def test_when_it_acts(options, t, step, acts):
    assert Guidance(**options).acts(t, step) is acts


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": {"XX": 1.0}}, "XX"),
        ({"strength": -1.0}, "strength"),
        ({"every": 0}, "every"),
        ({"begin": 0.1, "end": 0.5}, "end"),
        ({"largest_share": 0.0}, "largest_share"),
        ({"largest_factor": 0.0}, "largest_factor"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(VideoAlignError, match=words):
        Guidance(**options)


# --- pipelines ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_no_strength_or_no_weight_changes_nothing(family, scale):
    generator, reward = family
    want = sample(generator.pipeline, scale)
    for options in ({"strength": 0.0}, {"weights": {"VQ": 0.0}}):
        with guided(generator.pipeline, reward, **options):
            assert torch.equal(sample(generator.pipeline, scale), want)
    assert torch.equal(sample(generator.pipeline, scale), want)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_step_is_guided_once_and_the_pipeline_is_left_as_it_was(family, scale):
    generator, reward = family
    pipeline, calls = generator.pipeline, []
    hook = reward.register_forward_hook(lambda module, args, out: calls.append(len(out)))
    try:
        with guided(pipeline, reward, strength=1.0):
            guided_once = sample(pipeline, scale)
        assert calls == [len(PROMPTS)] * (SIZE["num_inference_steps"] - 1)  # never at t = 1
        calls.clear()
        with guided(pipeline, reward, strength=1.0, every=2):
            sample(pipeline, scale)
        assert len(calls) == 1  # steps 0 (t = 1) and 2
    finally:
        hook.remove()
    assert "step" not in vars(pipeline.scheduler)
    assert "encode_prompt" not in vars(pipeline)
    assert not pipeline.transformer._forward_pre_hooks
    assert not torch.equal(guided_once, sample(pipeline, scale))


def test_a_pipeline_step_is_the_formula(family):
    """Two steps are done by hand: the first, at t = 1, is unguided, and the second is guided."""
    generator, reward = family
    guide = Guidance(weights=ones(), strength=2.0)
    condition = generator.condition(generator.encode_prompts(PROMPTS))
    x = torch.randn(2, *generator.latent_shape(9, 64, 64), generator=torch.Generator().manual_seed(3))
    got = generator.sample(condition, x, 2, steer=steering(reward, guide, condition))
    times = [*(generator.pipeline.scheduler.timesteps / 1000).tolist(), 0.0]
    for number in range(2):
        t = torch.full((2,), times[number])
        velocity = generator.velocity(x, t, condition)
        if times[number] < 1:
            velocity = guide(lambda x, t: reward.normalise(reward(x, t, condition)), x, t, velocity)
        x = (x - (times[number] - times[number + 1]) * velocity).detach()
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-5)


def test_it_raises_the_reward_that_it_follows(family):
    generator, reward = family
    condition = generator.condition(generator.encode_prompts(PROMPTS))
    noise = torch.randn(2, *generator.latent_shape(9, 64, 64), generator=torch.Generator().manual_seed(3))
    values = []
    for strength in (0.0, 3.0, 10.0):
        steer = steering(reward, Guidance(weights=ones("TA"), strength=strength), condition)
        latents = generator.sample(condition, noise, 6, steer=steer)
        values.append(reward(latents, torch.full((2,), 0.05), condition)[:, 2].sum().item())
    assert values[0] < values[1] < values[2]


def test_it_works_in_inference_mode(family):
    generator, reward = family
    with guided(generator.pipeline, reward, strength=1.0):
        want = sample(generator.pipeline, 3.0)
        with torch.inference_mode():
            assert torch.equal(sample(generator.pipeline, 3.0), want)


# --- the reward -----------------------------------------------------------------------------------


def test_a_folder_gives_the_same_rewards(family, tmp_path):
    generator, reward = family
    reward.save_pretrained(tmp_path / "reward")
    again = NoisyReward.from_pretrained(tmp_path / "reward", generator)
    condition = generator.condition(generator.encode_prompts(PROMPTS))
    x, t = torch.randn(2, *generator.latent_shape(9, 64, 64)), torch.tensor([0.2, 0.8])
    assert torch.equal(again(x, t, condition), reward(x, t, condition))


def test_a_reward_of_another_generator_is_refused(family, tmp_path):
    generator, reward = family
    reward.save_pretrained(tmp_path / "reward")
    make_generator(
        tmp_path / "other", type(generator).__name__.lower(), hidden=48, layers=2, seed=1, max_tokens=FEW_TOKENS
    )
    with pytest.raises(VideoAlignError, match=r"another generator .*transformer, vae"):
        NoisyReward.from_pretrained(tmp_path / "reward", load_generator(tmp_path / "other"))


def test_blocks_and_taps_must_be_there(family):
    generator, _ = family
    with pytest.raises(VideoAlignError, match="the generator has 2 blocks"):
        NoisyReward(generator, NoisyRewardShape(blocks=3))
    with pytest.raises(VideoAlignError, match=r"taps \[3\]"):
        NoisyRewardShape(blocks=2, taps=(1, 3))


def test_the_copy_leaves_the_generator_alone(family):
    generator, _ = family
    reward = NoisyReward(generator, NoisyRewardShape(blocks=1, hidden=16))
    blocks = getattr(reward.trunk, generator.blocks)
    assert len(blocks) == 1 and len(getattr(generator.transformer, generator.blocks)) == 2
    own = {p.data_ptr() for p in generator.transformer.parameters()}
    assert not own & {p.data_ptr() for p in reward.trunk.parameters()}
    assert not any(p.requires_grad for p in generator.transformer.parameters())
    assert all(p.requires_grad for p in blocks.parameters())


def test_only_what_a_reward_depends_on_trains(family):
    generator, _ = family
    reward = NoisyReward(generator, NoisyRewardShape(blocks=2, taps=(1,), hidden=16))
    condition = generator.condition(generator.encode_prompts(PROMPTS))
    x = torch.randn(2, *generator.latent_shape(9, 64, 64))
    reward(x, torch.tensor([0.2, 0.8]), condition).sum().backward()
    # DDP stops at a parameter that trains and gets no gradient
    assert not [name for name, p in reward.named_parameters() if p.requires_grad and p.grad is None]
    assert len(getattr(reward.trunk, generator.blocks)) == 1


def test_rewards_are_fp32_and_the_same_with_checkpointing(family):
    generator, reward = family
    condition = generator.condition(generator.encode_prompts(PROMPTS))
    x, t = torch.randn(2, *generator.latent_shape(9, 64, 64)), torch.tensor([0.2, 0.8])
    with torch.autocast("cpu", torch.bfloat16):
        assert reward(x, t, condition).dtype == torch.float32
    guide = Guidance(weights=ones())
    want = guide(lambda x, t: reward(x, t, condition), x, t, torch.zeros_like(x))
    reward.trunk.enable_gradient_checkpointing()
    try:
        torch.testing.assert_close(guide(lambda x, t: reward(x, t, condition), x, t, torch.zeros_like(x)), want)
        assert reward._read is None
    finally:
        reward.trunk.disable_gradient_checkpointing()


def test_a_generator_is_itself_in_any_precision(family, tmp_path):
    generator, reward = family
    reward.save_pretrained(tmp_path / "reward")
    generator.pipeline.save_pretrained(tmp_path / "generator")
    NoisyReward.from_pretrained(tmp_path / "reward", load_generator(tmp_path / "generator", "bfloat16"))


def test_a_scheduler_that_rounds_its_first_time_is_not_guided_in_noise(family):
    generator, reward = family
    pipeline, own, times = generator.pipeline, generator.pipeline.scheduler, []
    if type(generator).__name__ != "Wan":
        pytest.skip("LTX asks for a scheduler with shifted sigmas")
    pipeline.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    hook = reward.register_forward_hook(lambda module, args, out: times.append(float(args[1][0])))
    try:
        with guided(pipeline, reward, strength=1.0):
            sample(pipeline)
    finally:
        hook.remove()
        pipeline.scheduler = own
    assert len(times) == SIZE["num_inference_steps"] - 1
    assert max(times) < 0.95
