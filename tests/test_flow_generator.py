"""The flow's conventions in each generator family, and what a generator cannot take."""

import json

import pytest
import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    UniPCMultistepScheduler,
)

from flow_kit import PROMPTS, SHAPE
from helpers import randn
from videoalign import VideoAlignError
from videoalign.miniature.networks.pipelines import make_generator
from videoalign.models.flow import interpolate, squared_error
from videoalign.models.generator_folder import load_generator

# --- conventions of the flow ----------------------------------------------------------------------


def ideal(generator, truth, seen=None):
    """A forward that knows the data: (x_t - data) / t, which on the path is noise - data."""
    packed = LTXPipeline._pack_latents(truth) if type(generator).__name__ == "LTX" else truth

    def forward(hidden_states, *args, timestep=None, **kwargs):
        timestep = next(a for a in args if a.ndim == 1) if timestep is None else timestep
        if seen is not None:
            seen.append(timestep)
        t = (timestep / 1000).view(-1, *[1] * (hidden_states.ndim - 1))
        return ((hidden_states - packed) / t,)

    return forward


@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (4, 1.0), (7, 3.0), (30, 5.0)])
def test_exact_velocity_is_integrated_back_to_the_data(steps, shift, generator, monkeypatch):
    truth, noise = randn(2, *SHAPE), randn(2, *SHAPE, seed=1)
    monkeypatch.setattr(generator.transformer, "forward", ideal(generator, truth))
    generator.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    condition = generator.condition([{"prompt": randn(3, 32)}, {"prompt": randn(5, 32)}])
    torch.testing.assert_close(generator.sample(condition, noise, steps), truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_hub_scheduler_of_wan_integrates_the_same_velocity(shift, folders, monkeypatch):
    generator = load_generator(folders["wan"])
    truth, noise = randn(1, *SHAPE), randn(1, *SHAPE, seed=1)
    monkeypatch.setattr(generator.transformer, "forward", ideal(generator, truth))
    generator.pipeline.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    # its timesteps are whole numbers while its sigmas are not: 1e-3 of a time step at most
    found = generator.sample(generator.condition([{"prompt": randn(3, 32)}]), noise, 8)
    torch.testing.assert_close(found, truth, rtol=0, atol=2e-2)


def test_training_asks_the_transformer_for_noise_minus_data_at_1000_t(generator, monkeypatch):
    """This tests the sign, the unit of time and the order of LTX's tokens in the call that training makes."""
    truth, noise, t, seen = randn(3, *SHAPE), randn(3, *SHAPE, seed=1), torch.tensor([0.05, 0.5, 1.0]), []
    monkeypatch.setattr(generator.transformer, "forward", ideal(generator, truth, seen))
    x = interpolate(truth, noise, t)
    velocity = generator.velocity(x, t, generator.condition([{"prompt": randn(3, 32)}] * 3))
    torch.testing.assert_close(velocity, noise - truth, rtol=0, atol=2e-5)
    torch.testing.assert_close(seen[0], torch.tensor([50.0, 500.0, 1000.0]))
    torch.testing.assert_close(x[2], noise[2])  # t = 1 is noise
    assert squared_error(velocity, truth, noise).max() < 1e-9


@pytest.mark.parametrize("fps", [8.0, 25.0])
def test_training_and_sampling_ask_the_same_of_the_transformer(fps, family, folders):
    """One Euler step from t = 1 to 0 is noise - velocity: time, prompt, packing and frame rate are the pipeline's."""
    generator, noise = load_generator(folders[family], fps=fps), randn(2, *SHAPE)
    condition = generator.condition([{"prompt": randn(3, 32)}, {"prompt": randn(7, 32)}])
    with torch.no_grad():
        want = noise - generator.velocity(noise, torch.ones(2), condition)
    torch.testing.assert_close(generator.sample(condition, noise, 1), want, rtol=0, atol=1e-5)


def test_another_transformer_samples_for_one_call(generator, family, folders, tmp_path):
    make_generator(tmp_path / "other", family, hidden=48, heads=4, seed=1)
    other, noise = load_generator(tmp_path / "other"), randn(1, *SHAPE)
    condition = generator.condition([{"prompt": randn(3, 32)}])
    before = generator.sample(condition, noise, 2)
    want = other.sample(condition, noise, 2)
    assert torch.equal(generator.sample(condition, noise, 2, transformer=other.transformer), want)
    assert torch.equal(generator.sample(condition, noise, 2), before)
    assert not torch.equal(before, want)


def test_squared_error_is_a_mean_in_fp32():
    v, x0, x1 = (randn(2, *SHAPE, seed=s).bfloat16() for s in range(3))
    want = (v.double() - (x1.double() - x0.double())).pow(2).reshape(2, -1).mean(1)
    found = squared_error(v, x0, x1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_sampling_equals_plain_diffusers_called_with_the_prompts(guidance, generator, family, folders):
    noise = randn(2, *SHAPE)
    plain = DiffusionPipeline.from_pretrained(folders[family])
    plain.set_progress_bar_config(disable=True)
    generator.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    plain.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    given = LTXPipeline._pack_latents(noise) if family == "ltx" else noise
    prompts = ["a  red circle ", PROMPTS[2]]
    options = {"negative_prompt": "a blue", "latents": given, "max_sequence_length": generator.max_tokens}
    options |= {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 3, "guidance_scale": guidance}
    options |= {"frame_rate": 25} if family == "ltx" else {}
    want = plain(prompts, output_type="np", **options).frames
    condition = generator.condition(generator.encode_prompts(prompts))
    null = generator.condition(generator.encode_prompts(["a blue"])) if guidance > 1 else None
    latents = generator.sample(condition, noise, 3, guidance, null)
    found = generator.decode(latents)  # uint8 (B, T, 3, H, W)
    want = torch.as_tensor(want).mul(255).round().to(torch.uint8).permute(0, 1, 4, 2, 3)
    assert found.shape == (2, 5, 3, 32, 32)
    assert (found.int() - want.int()).abs().max() <= 1  # where rounding is a close call
    final = plain(prompts, output_type="latent", **options).frames
    if family == "ltx":
        final = LTXPipeline._unpack_latents(final, *SHAPE[1:])
    torch.testing.assert_close(latents, final, rtol=0, atol=1e-6)


def test_guidance_without_a_null_embedding_is_refused(wan):
    with pytest.raises(VideoAlignError, match="empty prompt"):
        wan.sample(wan.condition([{"prompt": randn(3, 32)}]), randn(1, *SHAPE), 2, cfg_scale=2.0)


def test_padding_is_zeros_and_masked(generator):
    embeds = [randn(2, 32), randn(5, 32, seed=1)]
    condition = generator.condition([{"prompt": e} for e in embeds])
    assert condition["prompt"].shape == (2, generator.max_tokens, 32)
    for row, mask, e in zip(condition["prompt"], condition["prompt_mask"], embeds):
        assert torch.equal(row[: len(e)], e)
        assert not row[len(e) :].any()
        assert mask.tolist() == [1] * len(e) + [0] * (generator.max_tokens - len(e))


def test_mask_hides_what_stands_behind_a_prompt_of_ltx(folders):
    ltx = load_generator(folders["ltx"])
    condition = ltx.condition([{"prompt": randn(3, 32)}])
    x, t = randn(1, *SHAPE), torch.tensor([0.4])
    want = ltx.velocity(x, t, condition)
    garbage = condition["prompt"].clone()
    garbage[:, 3:] = 50.0
    torch.testing.assert_close(ltx.velocity(x, t, {**condition, "prompt": garbage}), want, rtol=0, atol=0)
    garbage[:, 2] = 50.0
    assert not torch.equal(ltx.velocity(x, t, {**condition, "prompt": garbage}), want)


def test_frame_rate_reaches_the_positions_of_ltx(folders):
    x, t = randn(1, *SHAPE), torch.tensor([0.4])
    slow, fast = (load_generator(folders["ltx"], fps=fps) for fps in (8.0, 25.0))
    condition = slow.condition([{"prompt": randn(3, 32)}])
    assert not torch.equal(slow.velocity(x, t, condition), fast.velocity(x, t, condition))


def test_latents_are_normalised_by_the_familys_own_rule(generator, family):
    frames = torch.randint(0, 256, (2, 5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    vae = generator.vae
    if family == "ltx":  # released ones have statistics in buffers; the miniature's say nothing
        vae.latents_mean.copy_(torch.linspace(-0.5, 0.5, 16)), vae.latents_std.copy_(torch.linspace(0.5, 2, 16))
        vae.register_to_config(scaling_factor=0.7)
    with torch.no_grad():
        raw = vae.encode(frames.transpose(1, 2).float() / 255 * 2 - 1).latent_dist.mean
    columns = []
    for c in range(16):
        if family == "wan":
            mean, scale = vae.config.latents_mean[c], 1 / vae.config.latents_std[c]
        else:
            mean, scale = vae.latents_mean[c].item(), 0.7 / vae.latents_std[c].item()
        columns.append((raw[:, c] - mean) * scale)
    found = generator.encode_video(frames)
    torch.testing.assert_close(found, torch.stack(columns, 1), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        pixels = vae.decode(raw).sample.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).transpose(1, 2)
    assert (generator.decode(found).int() - pixels.int()).abs().max() <= 1


def test_decoder_of_ltx_that_takes_a_time_is_told_a_clean_one(folders):
    ltx = load_generator(folders["ltx"])
    torch.manual_seed(0)
    # one width throughout: diffusers' own blocks that change it take no time
    options = {"timestep_conditioning": True, "decoder_block_out_channels": (16, 16, 16)}
    vae = AutoencoderKLLTXVideo.from_config({**ltx.vae.config, **options}).eval()
    ltx.vae = ltx.pipeline.vae = vae
    latents = randn(1, *SHAPE)
    with torch.no_grad():
        want = vae.decode(latents, torch.zeros(1), return_dict=False)[0]
    want = ((want / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).transpose(1, 2)
    assert torch.equal(ltx.decode(latents), want)


# --- what a generator cannot take -----------------------------------------------------------------


def test_latent_shapes_follow_from_video_shapes(generator):
    assert generator.latent_shape(1, 32, 64) == (16, 1, 4, 8)
    assert generator.latent_shape(17, 64, 32) == (16, 5, 8, 4)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((4, 32, 32), "such as 5"),
        ((0, 32, 32), "such as 1"),
        ((6, 32, 32), "such as 5"),
        ((5, 40, 32), "multiples"),
        ((5, 32, 24), "multiples"),
        ((5, 0, 32), "multiples"),
    ],
)
def test_videos_that_the_autoencoder_cannot_take_are_refused(shape, words, generator):
    with pytest.raises(VideoAlignError, match=words):
        generator.latent_shape(*shape)
    if min(shape):
        with pytest.raises(VideoAlignError, match=words):
            generator.encode_video(torch.zeros(1, shape[0], 3, *shape[1:], dtype=torch.uint8))


def test_long_prompts_are_refused_or_cut(generator):
    short, long = "a red circle", "a red circle " * generator.max_tokens
    with pytest.raises(VideoAlignError, match=rf"a red circle.*at most {generator.max_tokens}.*truncate"):
        generator.encode_prompts([short, long])
    embeds = generator.encode_prompts([short, long], truncate=True)
    assert len(embeds[1]["prompt"]) == generator.max_tokens > len(embeds[0]["prompt"])
    generator.condition(embeds)


def test_whitespace_that_wan_removes_does_not_make_a_prompt_too_long(wan):
    (found,) = wan.encode_prompts(["a red" + "\n \t" * 600 + " circle"], truncate=False)
    (want,) = wan.encode_prompts(["a red circle"])
    torch.testing.assert_close(found["prompt"], want["prompt"], rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(3, 16), (600, 32), (32,)])
def test_prompt_embeddings_of_another_encoder_are_refused(shape, generator):
    with pytest.raises(VideoAlignError, match="another text encoder"):
        generator.condition([{"prompt": randn(*shape)}])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "states no boundary_ratio"),
        ({"boundary_ratio": 0.9}, "states no transformer_2"),
        ({"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 9}, "boundary_ratio is 9, not a"),
        ({"_class_name": "CogVideoXPipeline"}, "CogVideoXPipeline.*WanPipeline, WanImageToVideoPipeline, LTXPipeline"),
    ],
)
def test_foreign_pipelines_are_refused(change, words, folders, tmp_path):
    index = json.loads(open(f"{folders['wan']}/model_index.json").read())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, **change}))
    with pytest.raises(VideoAlignError, match=words):
        load_generator(tmp_path)


def test_a_missing_pipeline_part_or_folder_is_named(folders, tmp_path):
    with pytest.raises(VideoAlignError, match="none: there is no such folder of a generator"):
        load_generator(tmp_path / "none")
    with pytest.raises(VideoAlignError, match=r"'unet'.*transformer, vae"):
        load_generator(folders["wan"], parts=["unet"])
    part = load_generator(folders["wan"], parts=["transformer"])
    with pytest.raises(VideoAlignError, match="without its vae"):
        part.identity()
    with pytest.raises(VideoAlignError, match="without its text_encoder"):
        part.encode_prompts(["a"])
