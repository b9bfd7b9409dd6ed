"""Rewards with gradients: VideoReward through decoded frames, seen as in files, and the noisy reward."""

import pytest
import torch

from flow_kit import SHAPE, SMALL, make
from helpers import doubles, randn
from videoalign import VideoAlignError
from videoalign.alignment import FlowSFT
from videoalign.datamodules.video import resample
from videoalign.models import VideoReward
from videoalign.models.frame_sampling import FrameSampling
from videoalign.models.generator_folder import load_generator
from videoalign.models.noisy_reward import NoisyReward, NoisyRewardShape
from videoalign.models.processor import RewardProcessor
from videoalign.models.reward_gradients import FrameRewards, NoisyRewards, as_uint8, reward_inputs, seen
from videoalign.models.template import Template

TEXTS = ["a red circle moves left to right", "a blue square"]
SAMPLINGS = {
    "as-they-are": FrameSampling(fps=8.0, min_pixels=0),
    "smaller": FrameSampling(fps=8.0, min_pixels=0, max_pixels=24 * 24),
    "larger": FrameSampling(fps=None, num_frames=4, min_pixels=70 * 70),
    "fewer": FrameSampling(fps=4.0, min_pixels=0, max_pixels=40 * 20),
}


def films(count=2, frames=9, height=32, width=48, seed=0):
    """Random frames (N, T, 3, H, W), uint8."""
    shape = (count, frames, 3, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def film(folders):
    """The Wan generator, whose videos have 8 frames per second."""
    return load_generator(folders["wan"], fps=8.0)


@pytest.fixture(scope="module")
def network(backbone):
    return made(backbone)


def made(backbone):
    torch.manual_seed(0)
    reward = VideoReward(backbone, "plain", SAMPLINGS["smaller"])
    reward.statistics = type(reward.statistics)([0.1, -0.2, 0.3], [0.5, 1.0, 2.0])
    return reward.eval()


# --- preprocessing --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("size", [(32, 48), (40, 40)], ids=str)
def test_frames_with_gradients_are_seen_as_those_of_a_file(name, size, network):
    sampling, videos = SAMPLINGS[name], films(height=size[0], width=size[1])
    processor = RewardProcessor(network.backbone_name, Template.load("plain"), sampling)
    want = processor([resample(video, 8.0, sampling, processor.factor) for video in videos], TEXTS)
    found = reward_inputs(processor, videos.float(), 8.0, TEXTS)
    assert found.keys() == want.keys()
    for entry, tensor in want.items():
        assert found[entry].shape == tensor.shape
        torch.testing.assert_close(found[entry].float(), tensor.float(), rtol=0, atol=1e-4)


def test_rewards_of_frames_are_those_of_scoring(network, film):
    videos = films()
    cut = [resample(video, 8.0, network.processor.sampling, network.processor.factor) for video in videos]
    with torch.no_grad():
        want = network.normalise(network(**network.processor(cut, TEXTS)))
        found = FrameRewards(film, network).rewards(videos.float(), TEXTS)
    assert want.std() > 1e-3
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_preprocessing_has_the_gradient_of_finite_differences(name, network):
    """In double precision, away from 0 and 255, where values are cut off."""
    sampling = SAMPLINGS[name]
    frames = (128 + 20 * doubles(1, 4, 3, 32, 48)).requires_grad_(True)
    weight = doubles(1, seed=1)

    def seen_sum(frames):
        small = seen(frames, 8.0, sampling, 16)
        patches = network.processor.geometry.pixels(network.processor.patchify(small[0])[0])
        return (patches * torch.linspace(-1, 1, patches.numel(), dtype=torch.float64).view_as(patches)).sum() * weight

    assert torch.autograd.gradcheck(seen_sum, frames, eps=1e-3, atol=1e-6, fast_mode=True)


def test_resized_frames_keep_to_the_range_of_uint8():
    """The bicubic curve overshoots at an edge."""
    frames = torch.full((1, 4, 3, 48, 48), 255.0)
    frames[..., :24] = 0
    small = seen(frames, 8.0, FrameSampling(fps=8.0, min_pixels=0, max_pixels=32 * 32), 16)
    assert small.shape[-2:] == (32, 32)
    assert small.min() == 0 and small.max() == 255


def test_rounding_passes_the_gradient_on():
    values = torch.tensor([0.2, 1.5, 254.7], requires_grad=True)
    rounded = as_uint8(values)
    torch.testing.assert_close(rounded, torch.tensor([0.0, 2.0, 255.0]))
    (rounded * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert values.grad.tolist() == [1.0, 2.0, 3.0]


# --- decoding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["wan", "ltx"], indirect=True)
def test_decoded_frames_are_those_of_sampled_videos(family, generator, network):
    x = randn(2, *SHAPE)
    with torch.no_grad():
        found = FrameRewards(generator, network).frames(x)
    want = generator.decode(x).float()
    assert found.shape == want.shape
    assert ((found - want).abs() > 1e-3).float().mean() < 1e-3  # one video at a time may round a value otherwise
    assert (found - want).abs().max() <= 1 + 1e-3


def test_the_first_latent_frames_give_the_first_frames(film, network):
    x = randn(1, 16, 3, 4, 4).requires_grad_(True)
    whole, part = (FrameRewards(film, network, latent_frames=k).frames(x) for k in (None, 2))
    assert (whole.shape[1], part.shape[1]) == (9, 5)
    torch.testing.assert_close(part, whole[:, :5], rtol=0, atol=1 + 1e-3)
    part.sum().backward()
    assert x.grad[:, :, :2].any() and not x.grad[:, :, 2:].any()


def test_checkpointing_changes_neither_reward_nor_gradient(film, backbone):
    found, network = [], made(backbone)
    for checkpointed in (False, True):
        x = randn(2, *SHAPE).requires_grad_(True)
        reward = FrameRewards(film, network, checkpointed=checkpointed)
        rewards = reward(x, torch.zeros(2), {}, TEXTS)
        (gradient,) = torch.autograd.grad(rewards.sum(), x)
        found.append((rewards.detach(), gradient))
    assert found[0][1].any()
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    layers = [m for m in network.backbone.modules() if m.training]
    assert layers and all(layer.gradient_checkpointing for layer in layers)


def test_rewards_that_see_an_image_are_refused(film, backbone):
    reward = VideoReward(backbone, "plain_image", SAMPLINGS["smaller"])
    with pytest.raises(VideoAlignError, match="shows the image"):
        FrameRewards(film, reward)


def test_a_single_frame_shows_no_motion(film, network):
    with pytest.raises(VideoAlignError, match=r"cannot see the decoded videos: it has 1 frame"):
        FrameRewards(film, network, latent_frames=1)(randn(1, *SHAPE), torch.zeros(1), {}, TEXTS[:1])


# --- the noisy reward -----------------------------------------------------------------------------


def test_the_noisy_reward_does_not_see_the_policy(folders, tmp_path):
    """Neither adapters nor weights that train are in the copied blocks, and nothing of those trains."""
    torch.manual_seed(0)
    NoisyReward(load_generator(folders["wan"]), NoisyRewardShape(blocks=1, hidden=8)).save_pretrained(tmp_path / "r")
    fresh = load_generator(folders["wan"])
    plain = NoisyRewards(NoisyReward.from_pretrained(tmp_path / "r", fresh))
    x, t, encoded = randn(2, *SHAPE), torch.tensor([0.3, 0.8]), [{"prompt": randn(3, 32)}] * 2
    want = plain(x, t, fresh.condition(encoded), TEXTS)
    for lora in (SMALL, None):
        model = make(FlowSFT, folders["wan"], trained=False, lora=lora)
        reward = NoisyRewards(NoisyReward.from_pretrained(tmp_path / "r", model.generator), checkpointed=lora is None)
        with torch.no_grad():
            for parameter in model.trained().values():
                parameter += 0.1
        condition = model.generator.condition(encoded)
        moved = model.generator.velocity(x, t, condition) - fresh.velocity(x, t, condition)
        assert moved.abs().mean() > 1e-3
        assert torch.equal(reward(x, t, condition, TEXTS), want)
        assert not any(p.requires_grad for p in reward.reward.parameters())
        own = {p.untyped_storage().data_ptr() for p in reward.reward.parameters()}
        assert not own & {p.untyped_storage().data_ptr() for p in model.parameters()}
