"""What holds for every family of generators: loading, the flow's conventions, samples as plain diffusers', sizes."""

import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from families_kit import (
    BEGINNING,
    EXPERTS,
    FAMILIES,
    FRAMES,
    PROMPTS,
    SHAPES,
    SIDE,
    TOKENS,
    WITH_IMAGE,
    encoded,
    forward_of_truth,
    nothing,
    picture,
    plain,
    plainly,
    shorten,
    without_ftfy,
)
from helpers import randn
from videoalign import VideoAlignError
from videoalign.miniature.networks.pipelines import BUILDERS, make_generator
from videoalign.miniature.registration import GENERATORS
from videoalign.models.flow import interpolate, squared_error
from videoalign.models.generator import PARTS
from videoalign.models.generator_folder import load_generator
from videoalign.models.guidance import Guidance, steering
from videoalign.models.noisy_reward import NoisyReward, NoisyRewardShape

every_family = pytest.mark.parametrize("name", FAMILIES)
RATIO = {name: 16 if SHAPES[name][3] == 2 else 8 for name in FAMILIES}
"""Pixels along each side of a latent."""
MULTIPLE = {name: 32 if name.startswith(("ltx", "wan22-5b")) else 16 for name in FAMILIES}
"""Number of pixels that the sides of videos are multiples of."""


# --- miniatures and loading -----------------------------------------------------------------------


def test_the_command_offers_every_miniature():
    assert GENERATORS == tuple(BUILDERS)


@pytest.mark.parametrize("name", ["wan-i2v", "wan22-a14b", "ltx2", "hunyuan15-i2v"])
def test_the_same_seed_writes_the_same_bytes(name, miniatures, tmp_path):
    options = {"hidden": 48, "layers": 2, "max_tokens": TOKENS}
    make_generator(tmp_path / "same", name, **options)
    make_generator(tmp_path / "other", name, seed=1, **options)
    files = [path.relative_to(tmp_path / "same") for path in (tmp_path / "same").rglob("*") if path.is_file()]
    bytes_of = {f: [(Path(root) / f).read_bytes() for root in (miniatures[name], tmp_path / "same")] for f in files}
    assert all(one == other for one, other in bytes_of.values())
    weights = [f for f in files if f.suffix == ".safetensors"]
    assert all((tmp_path / "other" / f).read_bytes() != bytes_of[f][0] for f in weights)


def loaded_with(generator):
    """Names of the parts that have weights, with the one of :data:`PARTS` that they are loaded with."""
    index = {part: part for part in PARTS} | {m: part for part, more in generator.further_parts.items() for m in more}
    index |= {"transformer_2": "transformer"} if generator.boundary else {}
    return {part: by for part, by in index.items() if getattr(generator.pipeline, part) is not None}


@every_family
def test_every_tensor_of_a_folder_is_loaded(name, miniatures, of_family):
    generator = of_family(name)
    have = {path.parent.name for path in Path(miniatures[name]).rglob("*.safetensors")}
    assert have == loaded_with(generator).keys() | ({*generator.left_out} & {"audio_vae", "vocoder"})
    for part in loaded_with(generator):
        (path,) = (Path(miniatures[name]) / part).glob("*.safetensors")
        stored = sorted(float(t.double().sum()) for t in safetensors.torch.load_file(path).values())
        module = getattr(generator.pipeline, part)
        held = {t.data_ptr(): t for t in module.state_dict().values()}  # tied ones are stored once
        assert sorted(float(t.double().sum()) for t in held.values()) == stored
        parameters = [p for p in module.parameters() if part != "transformer"]
        assert not any(p.requires_grad for p in parameters) and not module.training


@every_family
def test_a_tensor_that_lacks_is_missed_in_every_part(name, miniatures, of_family, tmp_path):
    folder = Path(shutil.copytree(miniatures[name], tmp_path / name))
    for part, by in loaded_with(of_family(name)).items():
        (path,) = (folder / part).glob("*.safetensors")
        whole = path.read_bytes()
        tensors = safetensors.torch.load(whole)
        lost = max(tensors, key=lambda key: (tensors[key].ndim > 1, key))
        del tensors[lost]
        path.write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))
        with pytest.raises(VideoAlignError, match=f"the {part} of generator"):
            load_generator(folder, parts=[by])
        path.write_bytes(whole)


@pytest.mark.parametrize("name", WITH_IMAGE)
def test_what_reads_images_comes_with_the_text_encoder(name, miniatures, of_family):
    generator = load_generator(miniatures[name], parts=["vae"])
    needed = [part for part in generator.further_parts.get("text_encoder", ()) if part == "image_encoder"]
    if needed and getattr(of_family(name).pipeline, "image_encoder", None) is not None:
        with pytest.raises(VideoAlignError, match=r"without its image_encoder.*name text_encoder"):
            generator.encode_images(picture(), FRAMES)
    else:
        assert generator.encode_images(picture(), FRAMES)[0].keys() == {"image"}


@pytest.mark.parametrize("name", EXPERTS)
def test_one_expert_is_loaded_without_the_other_and_cannot_sample_alone(name, miniatures, of_family):
    both = of_family(name)
    for expert, kept in (("high", both.transformer), ("low", both.other)):
        generator = load_generator(miniatures[name], expert=expert)
        assert generator.other is None
        assert all(map(torch.equal, generator.transformer.parameters(), kept.parameters()))
        with pytest.raises(VideoAlignError, match="needs both experts"):
            generator.sample(generator.condition(encoded(both)), randn(2, *SHAPES[name]), 4)


@pytest.mark.parametrize("name", ["hunyuan15", "hunyuan15-i2v"])
def test_a_distilled_hunyuan_is_refused(name, miniatures, tmp_path):
    folder = Path(shutil.copytree(miniatures[name], tmp_path / name))
    path = folder / "transformer" / "config.json"
    path.write_text(path.read_text().replace('"use_meanflow": false', '"use_meanflow": true'))
    with pytest.raises(VideoAlignError, match=r"distilled .*use_meanflow"):
        load_generator(folder, parts=[])


# --- conventions of the flow ----------------------------------------------------------------------


@pytest.fixture
def known(monkeypatch):
    """A function that lets a generator's transformers know the data; gives condition, data and the times they see."""

    def teach(generator, name, batch=2):
        prompts = [PROMPTS[i % 2] for i in range(batch)]
        condition, seen = generator.condition(encoded(generator, prompts)), []
        truth = generator.with_image(randn(batch, *SHAPES[name]), condition)
        for net in (generator.transformer, generator.other):
            if net is not None:
                monkeypatch.setattr(net, "forward", forward_of_truth(truth, seen))
        return condition, truth, seen

    return teach


@every_family
@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (7, 3.0), (30, 5.0)])
def test_exact_velocity_is_integrated_back_to_the_data(name, steps, shift, of_family, known, monkeypatch):
    generator = of_family(name)
    condition, truth, _ = known(generator, name)
    monkeypatch.setattr(generator.pipeline, "scheduler", FlowMatchEulerDiscreteScheduler(shift=shift))
    found = generator.sample(condition, randn(2, *SHAPES[name], seed=1), steps)
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-5)


@every_family
def test_the_folders_own_scheduler_integrates_it_too(name, of_family, known):
    generator = of_family(name)
    condition, truth, _ = known(generator, name)
    # UniPC's time steps are whole numbers while its sigmas are not: 1e-3 of a time step at most
    close = 2e-2 if isinstance(generator.pipeline.scheduler, UniPCMultistepScheduler) else 1e-5
    found = generator.sample(condition, randn(2, *SHAPES[name], seed=1), 8)
    torch.testing.assert_close(found, truth, rtol=0, atol=close)


@every_family
def test_moments_lie_where_the_autoencoder_computes(name, of_family, monkeypatch):
    """Offloaded, it computes on a device that its root's own buffers never come to."""
    generator = of_family(name)
    monkeypatch.setattr(type(generator.vae), "device", torch.device("meta"))
    assert {part.device.type for part in generator.moments()} == {"meta"}


@every_family
def test_training_asks_for_noise_minus_data_at_1000_t(name, of_family, known):
    """This tests the sign, the unit of time and the order of tokens in the call that training makes."""
    generator, t = of_family(name), torch.tensor([0.05, 0.5, 1.0])
    condition, truth, seen = known(generator, name, 3)
    noise, clean = randn(3, *SHAPES[name], seed=1), generator.clean_frames(condition)
    x = generator.with_image(interpolate(truth, noise, t), condition)
    velocity = generator.velocity(x, t, condition)
    torch.testing.assert_close(velocity[:, :, clean:], (noise - truth)[:, :, clean:], rtol=0, atol=2e-5)
    assert torch.equal(x[2, :, clean:], noise[2, :, clean:])  # t = 1 is noise
    assert squared_error(velocity, truth, noise, clean).max() < 1e-9
    (times,) = seen
    assert clean == (name in BEGINNING)
    if clean:  # the image's tokens are at time 0
        per_frame = times.unflatten(1, (SHAPES[name][1], -1))
        assert not per_frame[:, 0].any()
        times = per_frame[:, 1:].flatten(1).unique(dim=1).squeeze(1)
    torch.testing.assert_close(times, torch.tensor([50.0, 500.0, 1000.0]), rtol=0, atol=0)


@every_family
def test_training_and_sampling_ask_the_same_of_the_transformer(name, of_family, monkeypatch):
    """One Euler step from t = 1 to 0 is noise - velocity: time, prompt, packing and frame rate are the pipeline's."""
    generator = of_family(name)
    monkeypatch.setattr(generator, "fps", 8.0)
    monkeypatch.setattr(generator.pipeline, "scheduler", FlowMatchEulerDiscreteScheduler())
    condition = generator.condition(encoded(generator))
    noise = generator.with_image(randn(2, *SHAPES[name]), condition)
    with torch.no_grad():
        want = generator.with_image(noise - generator.velocity(noise, torch.ones(2), condition), condition)
    torch.testing.assert_close(generator.sample(condition, noise, 1), want, rtol=0, atol=1e-5)


@every_family
def test_another_transformer_samples_for_one_call(name, of_family, tmp_path):
    generator, noise = of_family(name), randn(2, *SHAPES[name])
    make_generator(tmp_path / "other", name, hidden=48, seed=1)
    other = load_generator(tmp_path / "other", parts=["transformer"]).transformer
    condition = generator.condition(encoded(generator))
    before, found = generator.sample(condition, noise, 2), generator.sample(condition, noise, 2, transformer=other)
    assert torch.equal(generator.sample(condition, noise, 2), before)
    assert not torch.allclose(found, before, atol=1e-3)


@every_family
def test_what_is_not_adaptable_is_what_gets_no_gradient(name, miniatures, of_family):
    generator = load_generator(miniatures[name], parts=["transformer"])
    shorten(generator.pipeline)
    condition = generator.condition(encoded(of_family(name)))
    x = generator.with_image(randn(2, *SHAPES[name]), condition)
    net = generator.transformer.requires_grad_(True)
    generator.velocity(x, torch.tensor([0.2, 0.7]), condition).square().mean().backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    unread = {name for name in gradients if not generator.adaptable(name)}
    assert {name for name, gradient in gradients.items() if gradient is None} <= unread
    assert not any(gradients[name].any() for name in unread if gradients[name] is not None)
    assert bool(unread) == name.startswith(("ltx2", "hunyuan15"))


# --- samples --------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_samples_are_those_of_plain_diffusers(name, guidance, miniatures, of_family, monkeypatch):
    """Bit for bit, but for Wan2.2-TI2V-5B without an image: there we give one time for all tokens, which rounds another
    way and takes far less memory."""
    without_ftfy(monkeypatch)
    generator, noise = of_family(name), randn(2, *SHAPES[name])
    condition, null = generator.condition(encoded(generator)), nothing(generator) if guidance > 1 else None
    low = guidance - 1 if guidance > 1 else None
    found = generator.sample(condition, noise, 3, guidance, null, cfg_scale_2=low if name in EXPERTS else None)
    start = generator.with_image(noise, condition)
    want = plainly(plain(miniatures[name], name), name, noise, start, guidance=guidance)
    torch.testing.assert_close(found, want, rtol=0, atol=5e-6 if name == "wan22-5b" else 0)


@every_family
def test_frames_are_those_of_plain_diffusers(name, miniatures, of_family, monkeypatch):
    without_ftfy(monkeypatch)
    generator, noise, prompts = of_family(name), randn(1, *SHAPES[name]), PROMPTS[1:]
    condition = generator.condition(encoded(generator, prompts))
    found = generator.decode(generator.sample(condition, noise, 3))  # uint8 (B, T, 3, H, W)
    start = generator.with_image(noise, condition)
    want = plainly(plain(miniatures[name], name), name, noise, start, prompts, output="np")
    want = want.mul(255).round().to(torch.uint8).permute(0, 1, 4, 2, 3)
    assert found.shape == (1, FRAMES, 3, SIDE, SIDE)
    assert (found.int() - want.int()).abs().max() <= 1  # where rounding is a close call


@every_family
def test_guidance_without_a_null_embedding_is_refused(name, of_family):
    generator = of_family(name)
    with pytest.raises(VideoAlignError, match="empty prompt"):
        generator.sample(generator.condition(encoded(generator)), randn(2, *SHAPES[name]), 2, cfg_scale=2.0)


@every_family
def test_a_reward_of_strength_0_leaves_samples_as_they_are(name, of_family):
    generator, noise = of_family(name), randn(2, *SHAPES[name])
    condition, null = generator.condition(encoded(generator)), nothing(generator)
    torch.manual_seed(0)
    reward = NoisyReward(generator, NoisyRewardShape(blocks=1, hidden=16)).eval().requires_grad_(False)

    def sampled(**options):
        steer = steering(reward, Guidance(**options), condition) if options else None
        return generator.sample(condition, noise, 3, 2.0, null, steer=steer)

    free, guided = sampled(), sampled(strength=50.0)
    assert torch.equal(sampled(strength=0.0), free)
    clean = generator.clean_frames(condition)
    assert not torch.allclose(guided[:, :, clean:], free[:, :, clean:], atol=1e-4)
    assert torch.equal(guided[:, :, :clean], free[:, :, :clean])


def test_a_generator_with_an_optional_image_is_the_one_with_a_required_image(of_family):
    """Wan2.2-TI2V-5B is published as a text-to-video pipeline, whose weights also begin with an image."""
    text, image = of_family("wan22-5b"), of_family("wan22-5b-i2v")
    with_image = encoded(image)
    without = [{"prompt": one["prompt"]} for one in with_image]
    noise = randn(2, *SHAPES["wan22-5b"])
    samples = [g.sample(g.condition(with_image), noise, 2) for g in (text, image)]
    assert torch.equal(*samples)
    assert torch.equal(samples[0][:, :, :1], torch.stack([one["image"] for one in with_image]))
    assert not torch.equal(text.sample(text.condition(without), noise, 2), samples[0])
    assert text.encode_images(picture(), FRAMES)[0].keys() == {"image"}


# --- what samples are conditioned on --------------------------------------------------------------


@every_family
def test_padding_is_zeros_and_masked(name, of_family):
    generator = of_family(name)
    parts = encoded(generator)
    condition = generator.condition(parts)
    for part, (most, width) in generator.prompt_shapes().items():
        assert condition[part].shape == (2, most, width)
        for row, mask, one in zip(condition[part], condition[f"{part}_mask"], parts):
            n = len(one[part])
            assert torch.equal(row[:n], one[part]) and not row[n:].any()
            assert mask.tolist() == [1] * n + [0] * (most - n)


@every_family
def test_long_prompts_are_refused_or_cut(name, of_family):
    generator = of_family(name)
    short, long = "a red", "a red circle " * TOKENS
    assert generator.max_tokens == TOKENS
    with pytest.raises(VideoAlignError, match=rf"a red circle.*at most {TOKENS}.*truncate"):
        generator.encode_prompts([short, long])
    one, other = generator.encode_prompts([short, long], truncate=True)
    assert len(other["prompt"]) == TOKENS >= len(one["prompt"])
    assert (len(one["prompt"]) == TOKENS) == name.startswith("ltx2")  # whose connectors fill the padding


@pytest.mark.parametrize("name", ["hunyuan15", "hunyuan15-i2v"])
def test_words_in_quotes_are_a_second_part(name, of_family):
    plain_words, quoted, other = of_family(name).encode_prompts(["a red", 'a "red"', 'a "blue"'])
    assert len(plain_words["prompt_2"]) == 0 < len(quoted["prompt_2"]) < len(other["prompt_2"])


@every_family
@pytest.mark.parametrize("shape", [(3, 16), (600, 32), (32,)])
def test_prompts_of_another_encoder_are_refused(name, shape, of_family):
    generator = of_family(name)
    wrong = [one | {"prompt": randn(*shape)} for one in encoded(generator)]
    with pytest.raises(VideoAlignError, match="another text encoder"):
        generator.condition(wrong)


@every_family
def test_images_are_asked_for_or_refused(name, of_family):
    generator = of_family(name)
    parts, other = encoded(generator), encoded(of_family("wan22-5b-i2v"))
    if name in WITH_IMAGE:
        with pytest.raises(VideoAlignError, match="from images, but these samples have none"):
            generator.condition([{k: v for k, v in one.items() if not k.startswith("image")} for one in parts])
        with pytest.raises(VideoAlignError, match="1 of 2 samples of a batch have no image"):
            generator.condition([parts[0], {k: v for k, v in parts[1].items() if not k.startswith("image")}])
    elif generator.image == "none":
        with pytest.raises(VideoAlignError, match="takes no images, but these samples have some"):
            generator.condition([one | {"image": other[0]["image"]} for one in parts])
        with pytest.raises(VideoAlignError, match="takes no images"):
            generator.encode_images(picture(), FRAMES)


# --- the autoencoder ------------------------------------------------------------------------------


def by_hand(name, vae, raw):
    """Latents that are normalised by the family's own rule, channel by channel."""
    columns = []
    for c in range(raw.shape[1]):
        mean, scale = 0.0, vae.config.get("scaling_factor", 1.0)
        if name.startswith("wan"):
            mean, scale = vae.config.latents_mean[c], 1 / vae.config.latents_std[c]
        elif name.startswith("ltx"):
            mean, scale = vae.latents_mean[c].item(), 0.7 / vae.latents_std[c].item()
        columns.append((raw[:, c] - mean) * scale)
    return torch.stack(columns, 1)


@every_family
def test_latents_are_normalised_by_the_familys_own_rule(name, miniatures):
    generator = load_generator(miniatures[name], parts=["vae"])
    frames = torch.randint(0, 256, (2, FRAMES, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(0)).byte()
    vae = generator.vae
    if name.startswith("ltx"):  # released ones have statistics in buffers; the miniature's say nothing
        vae.latents_mean.copy_(torch.linspace(-0.5, 0.5, 16)), vae.latents_std.copy_(torch.linspace(0.5, 2, 16))
        vae.register_to_config(scaling_factor=0.7)
    pixels = frames.transpose(1, 2).float() / 255 * 2 - 1
    with torch.no_grad():
        raw = torch.cat([vae.encode(one[None]).latent_dist.mean for one in pixels])
        decoded = torch.cat([vae.decode(one[None]).sample for one in raw])
    found = generator.encode_video(frames)
    assert found.shape == (2, *SHAPES[name]) == (2, *generator.latent_shape(FRAMES, SIDE, SIDE))
    torch.testing.assert_close(found, by_hand(name, vae, raw), rtol=1e-5, atol=2e-5)
    want = decoded.add(1).mul(127.5).round().clamp(0, 255).byte().transpose(1, 2)
    assert (generator.decode(found).int() - want.int()).abs().max() <= 1


@every_family
def test_latent_shapes_follow_from_video_shapes(name, of_family):
    generator, ratio = of_family(name), RATIO[name]
    assert generator.latent_shape(1, 32, 64) == (SHAPES[name][0], 1, 32 // ratio, 64 // ratio)
    assert generator.latent_shape(17, 64, 32) == (SHAPES[name][0], 5, 64 // ratio, 32 // ratio)
    assert load_generator_without_weights(generator).latent_shape(17, 64, 32) == generator.latent_shape(17, 64, 32)


def load_generator_without_weights(generator):
    """The same pipeline with settings alone."""
    return load_generator(generator.pipeline.config._name_or_path, parts=[])


@every_family
@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((4, 32, 32), "such as 5"),
        ((0, 32, 32), "such as 1"),
        ((6, 32, 32), "such as 5"),
        ((7, 32, 32), "such as 9"),
        ((5, 44, 32), {16: "such as 48 x 32", 32: "such as 32 x 32"}),
        ((5, 32, 90), {16: "such as 32 x 96", 32: "such as 32 x 96"}),
        ((5, 3, 32), {16: "such as 16 x 32", 32: "such as 32 x 32"}),
        ((5, 0, 32), {16: "such as 16 x 32", 32: "such as 32 x 32"}),
    ],
)
def test_the_nearest_good_size_is_named(name, shape, words, of_family):
    generator = of_family(name)
    words = words if isinstance(words, str) else words[MULTIPLE[name]]
    with pytest.raises(VideoAlignError, match=words):
        generator.latent_shape(*shape)
    if min(shape):
        with pytest.raises(VideoAlignError, match=words):
            generator.encode_video(torch.zeros(1, shape[0], 3, *shape[1:], dtype=torch.uint8))
        if generator.image != "none" and shape[0] == FRAMES:
            with pytest.raises(VideoAlignError, match=words):
                generator.encode_images(torch.zeros(1, 3, *shape[1:], dtype=torch.uint8), FRAMES)
