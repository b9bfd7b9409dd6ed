"""Generator alignment: the flow's conventions, objectives, preferences in latents, trainings, resumption, several processes."""

import json
import math
import sys
from functools import partial
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace

import lightning as L
import pytest
import safetensors.torch
import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    UniPCMultistepScheduler,
)

sys.path.insert(0, str(Path(__file__).parent))
from forked import forked

from videoalign import VideoAlignError
from videoalign.alignment import CacheReference, FlowDPO, FlowIPO, FlowRWR, FlowSFT, QuadraticBeta
from videoalign.datamodules.latents import NULL, LatentPairs, Weights
from videoalign.datamodules.reference_errors import ReferenceDraws
from videoalign.datamodules.shards import ShardWriter, sha256
from videoalign.miniature.networks.pipelines import make_generator
from videoalign.models.flow import TimeLaw, draw, interpolate, squared_error
from videoalign.models.flow_losses import (
    BetaSchedule,
    ConstantBeta,
    RewardWeights,
    dpo_losses,
    implicit_rewards,
    ipo_losses,
)
from videoalign.models.generator_folder import load_generator
from videoalign.models.lora import LoRA

QUIET = {
    "accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False, "logger": False,
    "num_sanity_val_steps": 0, "log_every_n_steps": 1, "enable_checkpointing": False,
}  # fmt: skip
LN2 = -torch.nn.functional.logsigmoid(torch.zeros(())).item()
SHAPE = (16, 2, 4, 4)
FAMILIES = ("wan", "ltx")
PROMPTS = ["a red circle moves", "a blue square", "a video of the same scene, top to bottom"]
SMALL = LoRA(rank=4, alpha=8, targets=["to_q", "to_k", "to_v", "to_out.0"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("generators")
    for family in FAMILIES:
        make_generator(root / family, family, hidden=48, heads=4)
    return {family: str(root / family) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def generator(family, folders):
    return load_generator(folders[family])


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def graded(i):
    """A record with rewards that prefer A or B, by another margin in each; its labels say the opposite and do not count."""
    a, b = {"VQ": 0.5 * i, "MQ": 1.0, "TA": -0.25}, {"VQ": 0.2, "MQ": 0.3 * i, "TA": 0.5 + i % 2}
    labels = dict.fromkeys(a, "B" if sum(a.values()) > sum(b.values()) else "A")
    return {"prompt": PROMPTS[i % 3], "rewards": {"A": a, "B": b}, "labels": labels}


def write(out, generator, count=8, of="pairs", record=graded, tensors=lambda i, made: made, **index):
    """A latents set of random content; ``tensors`` may change a sample's."""
    sides = {"pairs": ("a", "b"), "videos": ("video",)}[of]
    with ShardWriter(out, "latents", media="safetensors", per_shard=3) as writer:
        writer.index.latents = {**generator.identity(), "of": of, **index}
        for i in range(count):
            made = {side: randn(*SHAPE, seed=100 * i + s) for s, side in enumerate(sides)}
            made["prompt"] = randn(3 + i % 3, 32, seed=100 * i + 50)
            content = safetensors.torch.save(tensors(i, made))
            writer.write(f"k{i}", {"": content}, record(i))
        (writer.path / NULL).write_bytes(safetensors.torch.save({"prompt": randn(1, 32)}))
        writer.index.tables[NULL] = sha256(writer.path / NULL)
    return str(out)


def spoiled(place, i, tensors):
    """For ``tensors`` of :func:`write`: sample ``place`` is damaged."""
    return {**tensors, "a": torch.full(SHAPE, torch.nan)} if i == place else tensors


@pytest.fixture(scope="module")
def pairs(folders, tmp_path_factory):
    root = tmp_path_factory.mktemp("latents")
    return {f: write(root / f, load_generator(folders[f])) for f in FAMILIES}


@pytest.fixture(scope="module")
def wan(folders):
    """Read only."""
    return load_generator(folders["wan"])


@pytest.fixture(scope="module")
def videos(wan, tmp_path_factory):
    """Eight single videos with rewards, seven of three prompts and one of its own."""

    def record(i):
        return {
            "prompt": PROMPTS[i % 3] if i < 7 else "alone",
            "rewards": {"VQ": float(i), "MQ": -0.5 * i * i, "TA": float(i % 2)},
        }

    return write(tmp_path_factory.mktemp("videos") / "set", wan, of="videos", record=record)


def data(train, batch_size=4, **options):
    return LatentPairs(train, **{"batch_size": batch_size, "workers": 0, "shuffle_buffer": 0, **options})


def make(kind, folder, trained=True, **options):
    """A module, the same for the same arguments; ``trained``: policy and reference differ."""
    torch.manual_seed(0)
    options = {"lora": SMALL, "optimizer": partial(torch.optim.SGD, lr=0.1), **options}
    model = kind(generator=folder, **options)
    if trained:
        with torch.no_grad():
            for i, (name, parameter) in enumerate(model.policy.named_parameters()):
                if parameter.requires_grad and ".lora_A" not in name:
                    parameter += 0.03 * randn(*parameter.shape, seed=i)
    return model


class Watch(L.Callback):
    """Gradients of the first step, and what each step logs."""

    def on_after_backward(self, trainer, module):
        if trainer.global_step == 0:
            self.gradients = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}

    def on_train_batch_end(self, trainer, module, *rest):
        self.steps = [*getattr(self, "steps", []), {k: float(v) for k, v in trainer.callback_metrics.items()}]


def fit(model, datamodule, steps=1, callbacks=(), checkpoint=None, **trainer):
    watch = Watch()
    settings = {**QUIET, "max_steps": steps, "limit_val_batches": 0, "callbacks": [watch, *callbacks], **trainer}
    if any(isinstance(c, L.pytorch.callbacks.ModelCheckpoint) for c in callbacks):
        settings["enable_checkpointing"] = True
    L.Trainer(**settings).fit(model, datamodule, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    return watch


def loaded(datamodule, model, stage="fit", world=1, rank=0):
    """The datamodule set up without a trainer of Lightning's."""
    root = SimpleNamespace(root_device=torch.device("cpu"))
    datamodule.trainer = SimpleNamespace(
        world_size=world, accumulate_grad_batches=1, global_rank=rank, lightning_module=model, strategy=root
    )
    datamodule.setup(stage)
    return datamodule


def close(found, want, **tolerance):
    assert found.keys() == want.keys() and found
    for name, tensor in want.items():
        torch.testing.assert_close(found[name], tensor, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


# --- conventions of the flow ------------------------------------------------------------------------------------


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
    condition = generator.condition([randn(3, 32), randn(5, 32)])
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
    found = generator.sample(generator.condition([randn(3, 32)]), noise, 8)
    torch.testing.assert_close(found, truth, rtol=0, atol=2e-2)


def test_training_asks_the_transformer_for_noise_minus_data_at_1000_t(generator, monkeypatch):
    """The sign, the unit of time, and the order of LTX's tokens, in the call that training makes."""
    truth, noise, t, seen = randn(3, *SHAPE), randn(3, *SHAPE, seed=1), torch.tensor([0.05, 0.5, 1.0]), []
    monkeypatch.setattr(generator.transformer, "forward", ideal(generator, truth, seen))
    x = interpolate(truth, noise, t)
    velocity = generator.velocity(x, t, generator.condition([randn(3, 32)] * 3))
    torch.testing.assert_close(velocity, noise - truth, rtol=0, atol=2e-5)
    torch.testing.assert_close(seen[0], torch.tensor([50.0, 500.0, 1000.0]))
    torch.testing.assert_close(x[2], noise[2])  # t = 1 is noise
    assert squared_error(velocity, truth, noise).max() < 1e-9


@pytest.mark.parametrize("fps", [8.0, 25.0])
def test_training_and_sampling_ask_the_same_of_the_transformer(fps, family, folders):
    """One Euler step from t = 1 to 0 is noise - velocity: time, prompt, packing and frame rate as the pipeline has them."""
    generator, noise = load_generator(folders[family], fps=fps), randn(2, *SHAPE)
    condition = generator.condition([randn(3, 32), randn(7, 32)])
    with torch.no_grad():
        want = noise - generator.velocity(noise, torch.ones(2), condition)
    torch.testing.assert_close(generator.sample(condition, noise, 1), want, rtol=0, atol=1e-5)


def test_another_transformer_samples_for_one_call(generator, family, folders, tmp_path):
    make_generator(tmp_path / "other", family, hidden=48, heads=4, seed=1)
    other, noise = load_generator(tmp_path / "other"), randn(1, *SHAPE)
    condition = generator.condition([randn(3, 32)])
    before = generator.sample(condition, noise, 2)
    want = other.sample(condition, noise, 2)
    assert torch.equal(generator.sample(condition, noise, 2, transformer=other.transformer), want)
    assert torch.equal(generator.sample(condition, noise, 2), before) and not torch.equal(before, want)


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
    options = {"frame_rate": 25} if family == "ltx" else {}
    prompts = ["a  red circle ", PROMPTS[2]]
    want = plain(
        prompts,
        negative_prompt="a blue",
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=3,
        guidance_scale=guidance,
        latents=given,
        output_type="np",
        max_sequence_length=generator.max_tokens,
        **options,
    ).frames
    condition = generator.condition(generator.encode_prompts(prompts))
    null = generator.condition(generator.encode_prompts(["a blue"])) if guidance > 1 else None
    latents = generator.sample(condition, noise, 3, guidance, null)
    found = generator.decode(latents)  # uint8 (B, T, 3, H, W)
    want = torch.as_tensor(want).mul(255).round().to(torch.uint8).permute(0, 1, 4, 2, 3)
    assert found.shape == (2, 5, 3, 32, 32)
    assert (found.int() - want.int()).abs().max() <= 1  # where rounding is a close call
    final = plain(
        prompts,
        negative_prompt="a blue",
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=3,
        guidance_scale=guidance,
        latents=given,
        output_type="latent",
        max_sequence_length=generator.max_tokens,
        **options,
    ).frames
    if family == "ltx":
        final = LTXPipeline._unpack_latents(final, *SHAPE[1:])
    torch.testing.assert_close(latents, final, rtol=0, atol=1e-6)


def test_guidance_without_a_null_embedding_is_refused(wan):
    with pytest.raises(VideoAlignError, match="empty prompt"):
        wan.sample(wan.condition([randn(3, 32)]), randn(1, *SHAPE), 2, cfg_scale=2.0)


def test_padding_is_zeros_and_masked(generator):
    embeds = [randn(2, 32), randn(5, 32, seed=1)]
    condition = generator.condition(embeds)
    assert condition["embeds"].shape == (2, generator.max_tokens, 32)
    for row, mask, e in zip(condition["embeds"], condition["mask"], embeds):
        assert torch.equal(row[: len(e)], e) and not row[len(e) :].any()
        assert mask.tolist() == [1] * len(e) + [0] * (generator.max_tokens - len(e))


def test_mask_hides_what_stands_behind_a_prompt_of_ltx(folders):
    ltx = load_generator(folders["ltx"])
    condition = ltx.condition([randn(3, 32)])
    x, t = randn(1, *SHAPE), torch.tensor([0.4])
    want = ltx.velocity(x, t, condition)
    garbage = condition["embeds"].clone()
    garbage[:, 3:] = 50.0
    torch.testing.assert_close(ltx.velocity(x, t, {**condition, "embeds": garbage}), want, rtol=0, atol=0)
    garbage[:, 2] = 50.0
    assert not torch.equal(ltx.velocity(x, t, {**condition, "embeds": garbage}), want)


def test_frame_rate_reaches_the_positions_of_ltx(folders):
    x, t = randn(1, *SHAPE), torch.tensor([0.4])
    slow, fast = (load_generator(folders["ltx"], fps=fps) for fps in (8.0, 25.0))
    condition = slow.condition([randn(3, 32)])
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


# --- what a generator cannot take -------------------------------------------------------------------------------


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
    assert len(embeds[1]) == generator.max_tokens > len(embeds[0])
    generator.condition(embeds)


def test_whitespace_that_wan_removes_does_not_make_a_prompt_too_long(wan):
    (found,) = wan.encode_prompts(["a red" + "\n \t" * 600 + " circle"], truncate=False)
    (want,) = wan.encode_prompts(["a red circle"])
    torch.testing.assert_close(found[: len(want)], want, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(3, 16), (600, 32), (32,)])
def test_prompt_embeddings_of_another_encoder_are_refused(shape, generator):
    with pytest.raises(VideoAlignError, match="another text encoder"):
        generator.condition([randn(*shape)])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "Wan 2.2"),
        ({"expand_timesteps": True}, "Wan 2.2"),
        ({"_class_name": "CogVideoXPipeline"}, "CogVideoXPipeline.*WanPipeline, LTXPipeline"),
    ],
)
def test_foreign_pipelines_are_refused(change, words, folders, tmp_path):
    index = json.loads(open(f"{folders['wan']}/model_index.json").read())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, **change}))
    with pytest.raises(VideoAlignError, match=words):
        load_generator(tmp_path)


def test_a_missing_pipeline_part_or_folder_is_named(folders, tmp_path):
    with pytest.raises(VideoAlignError, match="neither a pipeline folder"):
        load_generator(tmp_path / "none")
    with pytest.raises(VideoAlignError, match=r"'unet'.*transformer, vae"):
        load_generator(folders["wan"], parts=["unet"])
    part = load_generator(folders["wan"], parts=["transformer"])
    with pytest.raises(VideoAlignError, match="without its vae"):
        part.identity()
    with pytest.raises(VideoAlignError, match="without its text_encoder"):
        part.encode_prompts(["a"])


# --- times and objectives ---------------------------------------------------------------------------------------

U = torch.linspace(0.001, 0.999, 400)


def test_uniform_times_are_the_uniform_variables():
    assert torch.equal(TimeLaw()(U), U)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.7, 0.4), (1.0, 2.0)])
def test_logit_normal_times_have_its_quantiles(mean, std):
    want = [1 / (1 + math.exp(-NormalDist(mean, std).inv_cdf(u))) for u in U.double().tolist()]
    found = TimeLaw(law="logit_normal", mean=mean, std=std)(U)
    torch.testing.assert_close(found, torch.tensor(want), rtol=2e-5, atol=1e-6)
    ends = TimeLaw(law="logit_normal", mean=mean, std=std)(torch.tensor([0.0, 1.0]))
    assert ends.isfinite().all() and ends[0] < found[0] and ends[1] > found[-1]


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
    assert noise.mean().abs() < 0.04 and abs(noise.std() - 1) < 0.03
    again = draw(seeds[[7, 3]], torch.Size((4,)), torch.device("cpu"))
    assert torch.equal(again[0], u[[7, 3]]) and torch.equal(again[1], noise[[7, 3]])


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
    """Brute force in float64, each pair by itself, as VideoAlign prints it (with means for norms)."""
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


# --- trainings against sums by hand -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("wan", {}),
        ("ltx", {"gradient_checkpointing": True, "times": TimeLaw(law="logit_normal", shift=3.0)}),
        ("wan", {"lora": None, "gradient_checkpointing": True}),
    ],
    ids=["wan", "ltx-checkpointed", "wan-full"],
    indirect=["family"],
)
def test_dpo_step_equals_the_equation_over_separate_forwards(family, options, folders, pairs):
    """Loss, gradient and what is logged, from four plain calls a pair of the transformer and of an untouched one."""
    model = make(FlowDPO, folders[family], beta=ConstantBeta(60.0), **options)
    datamodule = data(pairs[family])
    watch = fit(model, datamodule, max_epochs=1, accumulate_grad_batches=1)
    model = make(FlowDPO, folders[family], beta=ConstantBeta(60.0), **{**options, "gradient_checkpointing": False})
    reference = load_generator(folders[family])
    batch = next(iter(loaded(data(pairs[family]), model).train_dataloader()))
    u, noise = draw(batch["seeds"], torch.Size(SHAPE), torch.device("cpu"))
    t = model.times(u)
    losses, margins = [], []
    for n, key in enumerate(batch["keys"]):
        a, b = (randn(*SHAPE, seed=100 * int(key[1:]) + s) for s in range(2))
        record = graded(int(key[1:]))["rewards"]
        better = sum(record["A"].values()) > sum(record["B"].values())
        condition = reference.condition([batch["prompts"][n]])
        difference = []
        for video in (a, b) if better else (b, a):
            x = ((1 - t[n]) * video + t[n] * noise[n])[None]
            policy = model.generator.velocity(x, t[n : n + 1], condition)[0]
            with torch.no_grad():
                before = reference.velocity(x, t[n : n + 1], condition)[0]
            target = noise[n] - video
            difference.append((policy - target).pow(2).mean().double() - (before - target).pow(2).mean().double())
        margin = -30.0 * (difference[0] - difference[1])
        losses.append(torch.log(1 + torch.exp(-margin))), margins.append(margin.item())
    loss = sum(losses) / len(losses)
    loss.backward()
    assert max(abs(m) for m in margins) > 0.01
    assert watch.steps[0]["train/loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert watch.steps[0]["train/rewards/margins"] == pytest.approx(sum(margins) / 4, rel=1e-3, abs=1e-4)
    accuracy = sum(m > 0 for m in margins) / 4
    assert watch.steps[0]["train/rewards/accuracies"] == pytest.approx(accuracy)
    want = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    scale = max(g.abs().max() for g in want.values()).item()
    close(watch.gradients, want, rtol=2e-3, atol=2e-4 * scale)


@pytest.mark.parametrize("lora", [SMALL, None], ids=["lora", "full"])
def test_policy_gradient_is_the_same_with_reference_errors_as_constants(lora, family, folders, pairs):
    """Of gradient checkpointing, too: what is recomputed in the backward pass is the policy."""

    def gradients(constants, checkpointing):
        model = make(FlowDPO, folders[family], lora=lora, gradient_checkpointing=checkpointing)
        if constants is not None:
            model.reference_errors = lambda batch, latents: constants
        else:
            kept, compute = [], model.reference_errors
            model.reference_errors = lambda *a: kept.append(compute(*a)) or kept[-1]
        watch = fit(model, data(pairs[family]))
        return watch.gradients, constants if constants is not None else kept[0]

    want, constants = gradients(None, False)
    assert not constants.requires_grad
    close(gradients(constants, False)[0], want, rtol=0, atol=0)
    close(gradients(None, True)[0], want, rtol=1e-5, atol=1e-7)
    assert any(g.abs().max() > 0 for g in want.values())


@pytest.mark.parametrize("lora", [SMALL, None], ids=["lora", "full"])
def test_dpo_begins_at_ln_2_with_no_margin(lora, family, folders, pairs):
    model = make(
        FlowDPO, folders[family], trained=False, lora=lora, gradient_checkpointing=True, beta=ConstantBeta(5000.0)
    )
    steps = fit(model, data(pairs[family]), steps=2).steps
    assert steps[0]["train/loss"] == LN2
    assert steps[0]["train/rewards/margins"] == 0.0 and steps[0]["train/rewards/accuracies"] == 0.5
    for side in ("chosen", "rejected"):
        assert steps[0][f"train/error/{side}"] == steps[0][f"train/error/{side}/reference"] > 0
    assert steps[1]["train/rewards/margins"] != 0.0


def test_dpo_begins_at_ln_2_in_bfloat16(folders, pairs, family):
    model = make(FlowDPO, folders[family], trained=False, dtype="bfloat16")
    steps = fit(model, data(pairs[family]), steps=2).steps
    assert steps[0]["train/loss"] == LN2 and steps[0]["train/rewards/margins"] == 0.0
    assert steps[1]["train/rewards/margins"] != 0.0


def test_adapters_of_a_bfloat16_transformer_are_fp32(folders, pairs, family):
    model = make(FlowDPO, folders[family], trained=False, dtype="bfloat16")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_cached_reference_errors_train_as_computed_ones(folders, pairs, tmp_path):
    """At the same draws: those of the first epoch, again in each epoch."""
    draws = ReferenceDraws(pairs["wan"], str(tmp_path / "cache"), batch_size=3, workers=0)
    L.Trainer(**QUIET).predict(CacheReference(folders["wan"]), draws, return_predictions=False)
    cached, computed = (make(FlowDPO, folders["wan"], beta=ConstantBeta(50.0)) for _ in range(2))
    cached.as_reference = None  # never asked for
    found = fit(cached, data(pairs["wan"], batch_size=8, reference=str(tmp_path / "cache")), steps=2)
    want = fit(computed, data(pairs["wan"], batch_size=8), steps=2)
    close(found.gradients, want.gradients, rtol=1e-4, atol=1e-6)
    assert found.steps[0] == pytest.approx(want.steps[0], rel=1e-4, abs=1e-5)
    key = "train/error/chosen/reference"  # drawn anew in the second epoch, or not
    assert found.steps[1][key] == found.steps[0][key] and want.steps[1][key] != want.steps[0][key]
    other = make(FlowDPO, folders["wan"], times=TimeLaw(shift=3.0))
    with pytest.raises(VideoAlignError, match="other times than this training"):
        fit(other, data(pairs["wan"], reference=str(tmp_path / "cache")))


def test_dpo_learns_the_preferences_it_is_given(folders, pairs):
    model = make(FlowDPO, folders["wan"], trained=False, optimizer=partial(torch.optim.AdamW, lr=3e-3))
    steps = fit(model, data(pairs["wan"], batch_size=7), steps=15).steps
    assert steps[-1]["train/loss"] < 0.5 * LN2 and steps[-1]["train/rewards/accuracies"] == 1.0
    assert steps[-1]["train/rewards/margins"] == pytest.approx(
        steps[-1]["train/rewards/chosen"] - steps[-1]["train/rewards/rejected"], rel=1e-4
    )


def test_sft_is_flow_matching_on_the_preferred_video(folders, pairs):
    model = make(FlowSFT, folders["wan"])
    batch = next(iter(loaded(data(pairs["wan"]), model).train_dataloader()))
    with torch.no_grad():
        u, noise = draw(batch["seeds"], torch.Size(SHAPE), torch.device("cpu"))
        x = interpolate(batch["latents"][0], noise, u)
        v = model.generator.velocity(x, u, model.generator.condition(batch["prompts"]))
        want = (v - (noise - batch["latents"][0])).pow(2).mean()
    steps = fit(model, data(pairs["wan"])).steps
    assert steps[0]["train/loss"] == pytest.approx(want.item(), rel=1e-5)


def test_sft_needs_neither_pairs_nor_rewards(folders, wan, tmp_path):
    path = write(tmp_path / "set", wan, of="videos", record=lambda i: {"prompt": PROMPTS[0]})
    assert fit(make(FlowSFT, folders["wan"]), data(path), steps=2).steps[1]["train/loss"] > 0


@pytest.mark.parametrize("kind", [FlowSFT, FlowDPO, FlowIPO, FlowRWR])
@pytest.mark.parametrize("lora", [SMALL, None], ids=["lora", "full"])
def test_only_what_trains_changes(kind, lora, folders, pairs):
    model = make(kind, folders["wan"], trained=False, lora=lora, optimizer=partial(torch.optim.AdamW, lr=1e-3))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    fit(model, data(pairs["wan"]), steps=3)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert all(("lora_" in n) == (lora is not None) and n.startswith("generator.transformer.") for n in trained)
    assert any(n.startswith("generator.vae.") for n in frozen)
    assert any(n.startswith("reference.") for n in frozen) == (lora is None and kind in (FlowDPO, FlowIPO))
    after = model.state_dict()
    for name in frozen:
        assert torch.equal(after[name], before[name]), name
    for name in trained:
        assert not torch.equal(after[name], before[name]), name


# --- Flow-RWR ---------------------------------------------------------------------------------------------------


def test_rwr_of_equal_rewards_is_sft(folders, wan, tmp_path):
    equal = write(
        tmp_path / "set",
        wan,
        of="videos",
        record=lambda i: {"prompt": PROMPTS[i % 3], "rewards": dict.fromkeys(("VQ", "MQ", "TA"), 1.3)},
    )
    rwr, sft = (fit(make(kind, folders["wan"]), data(equal)) for kind in (FlowRWR, FlowSFT))
    close(rwr.gradients, sft.gradients, rtol=1e-5, atol=1e-7)
    assert rwr.steps[0]["train/loss"] == pytest.approx(sft.steps[0]["train/loss"], rel=1e-6)
    assert rwr.steps[0]["train/weights/effective_sample_size"] == pytest.approx(1.0)


def test_rwr_takes_both_videos_of_a_pair(folders, pairs):
    """Against errors and exp(r), z-scored by prompt, by hand."""
    model = make(FlowRWR, folders["wan"])
    batch = next(iter(loaded(data(pairs["wan"]), model).train_dataloader()))
    with torch.no_grad():
        errors, _ = model.errors(batch["latents"], batch["seeds"], batch["prompts"])
    groups = {}
    kept = [i for i in range(8) if sum(graded(i)["rewards"]["A"].values()) != sum(graded(i)["rewards"]["B"].values())]
    assert len(kept) == 8
    for i in kept:
        for row in graded(i)["rewards"].values():
            groups.setdefault(PROMPTS[i % 3], []).append(sum(row.values()) / 3)

    def weight(prompt, row):
        values = torch.tensor(groups[prompt])
        z = (sum(row.values()) / 3 - values.mean()) / values.std(correction=0)
        return min(math.exp(z), 10.0)

    rows = {(i, side): weight(PROMPTS[i % 3], row) for i in kept for side, row in graded(i)["rewards"].items()}
    mean = sum(rows.values()) / len(rows)
    want = 0.0
    for n, key in enumerate(batch["keys"]):
        i = int(key[1:])
        order = sorted("AB", key=lambda side: -sum(graded(i)["rewards"][side].values()))
        want += sum(rows[i, side] / mean * errors[s, n].item() for s, side in enumerate(order)) / 8
    steps = fit(model, data(pairs["wan"])).steps
    assert steps[0]["train/loss"] == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("least", [2, 4])  # no prompt has four samples: then all of them are the group
@pytest.mark.parametrize(
    "rewards",
    [
        RewardWeights(),
        RewardWeights(temperature=0.3, clip=2.0),
        RewardWeights(normalise=False, temperature=5.0, clip=None),
    ],
    ids=["default", "sharp", "raw"],
)
def test_rwr_weights_have_mean_one_over_the_training_set(rewards, least, folders, videos, monkeypatch):
    monkeypatch.setattr("videoalign.alignment.flow_rwr.LEAST", least)
    model, seen = make(FlowRWR, folders["wan"], rewards=rewards), {}

    class Collect(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.update(zip(batch["keys"], module.weights(batch)[0].tolist()))

    watch = fit(model, data(videos), max_steps=-1, max_epochs=1, callbacks=[Collect()])
    assert len(seen) == 8 and sum(seen.values()) / 8 == pytest.approx(1.0, rel=1e-5)
    scores = [(i - 0.5 * i * i + i % 2) / 3 for i in range(8)]

    def z(i):
        if not rewards.normalise:
            return scores[i]
        group = torch.tensor([scores[j] for j in range(8) if least == 4 or i == 7 or (j < 7 and j % 3 == i % 3)])
        return float((scores[i] - group.mean()) / group.std(correction=0))

    raw = [min(math.exp(z(i) / rewards.temperature), rewards.clip or math.inf) for i in range(8)]
    want = {f"k{i}": w / (sum(raw) / 8) for i, w in enumerate(raw)}
    assert seen == pytest.approx(want, rel=1e-4)
    last = [want[f"k{i}"] for i in range(4, 8)]
    size = sum(last) ** 2 / sum(w * w for w in last) / 4
    assert watch.steps[-1]["train/weights/effective_sample_size"] == pytest.approx(size, rel=1e-4)
    assert watch.steps[-1]["train/weights/max"] == pytest.approx(max(last), rel=1e-4)


@pytest.mark.parametrize("missing", ["all", "one", "dimension"])
def test_rwr_without_rewards_is_refused(missing, folders, wan, tmp_path):
    def record(i):
        made = {**graded(i), "labels": {"VQ": "A", "MQ": "A", "TA": "A"}}
        if missing == "all" or (missing == "one" and i == 5):
            del made["rewards"]
        elif missing == "dimension":
            del made["rewards"]["B"]["TA"]
        return made

    path = write(tmp_path / "set", wan, record=record)
    with pytest.raises(VideoAlignError, match="Flow-RWR weighs videos by their rewards"):
        fit(make(FlowRWR, folders["wan"]), data(path))
    if missing == "dimension":  # which may be missing where it does not count
        fit(make(FlowRWR, folders["wan"]), data(path, weights=Weights(TA=0.0)))


@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("kind", [FlowSFT, FlowRWR, FlowDPO])
def test_a_batch_without_a_usable_sample_is_passed_over(kind, place, folders, wan, tmp_path):
    path = write(tmp_path / "set", wan, tensors=partial(spoiled, place))
    model = make(kind, folders["wan"], optimizer=partial(torch.optim.SGD, lr=1e-4))
    watch = fit(model, data(path, batch_size=1, max_dropped=0.2), max_steps=-1, max_epochs=1)
    assert len(watch.steps) == 8
    logged = [step.get("train/loss") for step in watch.steps]
    assert logged[place] == (logged[place - 1] if place else None)  # nothing is logged of a step without a sample
    assert all(value > 0 for i, value in enumerate(logged) if i != place)


def test_more_unusable_samples_than_allowed_stop_the_training(folders, wan, tmp_path):
    path = write(tmp_path / "set", wan, tensors=partial(spoiled, 3))
    with pytest.raises(VideoAlignError, match=r"1 of 8 samples.*'k3' holds NaN"):
        fit(make(FlowDPO, folders["wan"]), data(path, batch_size=1), steps=8)


def test_unusable_samples_do_not_count_in_the_mean(folders, wan, tmp_path):
    path = write(tmp_path / "set", wan, tensors=partial(spoiled, 3))
    model = make(FlowSFT, folders["wan"])
    batch = next(iter(loaded(data(path, max_dropped=0.2), model).train_dataloader()))
    assert batch["valid"].tolist() == [True, True, True, False]
    with torch.no_grad():
        errors, _ = model.errors(batch["latents"][:1, :3], batch["seeds"][:3], batch["prompts"][:3])
    step = fit(model, data(path, max_dropped=0.2)).steps[0]
    assert step["train/loss"] == step["train/error/chosen"] == pytest.approx(errors.mean().item(), rel=1e-5)


# --- preferences ------------------------------------------------------------------------------------------------


def kept(path, folder, **options):
    """What is used of a set: (A is preferred, margin) by key."""
    datamodule = loaded(data(path, **options), SimpleNamespace(generator=load_generator(folder)))
    return {key: (not judged.swapped, judged.margin) for key, judged in datamodule.sets["train"].judged.items()}


def test_dimension_weights_decide_what_is_preferred(folders, pairs):
    for weights in (Weights(), Weights(2.0, 1.0, 0.0), Weights(0.0, 0.0, 3.0)):
        found = kept(pairs["wan"], folders["wan"], weights=weights)
        for i in range(8):
            rows = graded(i)["rewards"]
            a, b = (sum(getattr(weights, d) * rows[s][d] for d in rows[s]) for s in "AB")
            margin = (a - b) / (weights.VQ + weights.MQ + weights.TA)
            assert found[f"k{i}"] == (margin > 0, pytest.approx(abs(margin), abs=1e-6))


def test_text_alignment_alone_needs_no_other_dimension(folders, wan, tmp_path):
    def record(i):
        return {"prompt": "a", "labels": {}, "rewards": {"A": {"TA": float(i)}, "B": {"TA": 2.5}}}

    path = write(tmp_path / "set", wan, record=record)
    found = kept(path, folders["wan"], weights=Weights(0.0, 0.0, 1.0))
    assert found == {f"k{i}": (i > 2.5, abs(i - 2.5)) for i in range(8)}
    batch = next(
        iter(loaded(data(path, weights=Weights(0.0, 0.0, 1.0)), SimpleNamespace(generator=wan)).train_dataloader())
    )
    for n, key in enumerate(batch["keys"]):  # the better one comes first, and its rewards with it
        i = int(key[1:])
        first, second = randn(*SHAPE, seed=100 * i + (i < 2.5)), randn(*SHAPE, seed=100 * i + (i > 2.5))
        assert torch.equal(batch["latents"][0, n], first) and torch.equal(batch["latents"][1, n], second)
        assert batch["rewards"][:, n, 2].tolist() == [max(i, 2.5), min(i, 2.5)]


def test_pairs_with_rewards_need_no_labels(folders, wan, tmp_path):
    path = write(tmp_path / "set", wan, record=lambda i: {k: v for k, v in graded(i).items() if k != "labels"})
    assert len(kept(path, folders["wan"])) == 8


def test_labels_stand_in_for_rewards(folders, wan, tmp_path):
    words = [
        ("A", "A", "B"),
        ("B", "same", "B"),
        ("same", "same", "same"),
        ("A", "B", "same"),
        ("A", "A", "invalid"),
        ("A", "A", "A"),
        ("same", "B", "same"),
        ("B", "B", "B"),
    ]

    def record(i):
        return {"prompt": "a", "labels": dict(zip(("VQ", "MQ", "TA"), words[i]))}

    path = write(tmp_path / "set", wan, record=record)
    third = pytest.approx(1 / 3)
    assert kept(path, folders["wan"]) == {
        "k0": (True, third),
        "k1": (False, pytest.approx(2 / 3)),
        "k5": (True, 1.0),
        "k6": (False, third),
        "k7": (False, 1.0),
    }
    assert set(kept(path, folders["wan"], min_margin=0.4)) == {"k1", "k5", "k7"}
    assert set(kept(path, folders["wan"], weights=Weights(1.0, 0.0, 0.0))) == {"k0", "k1", "k3", "k4", "k5", "k7"}


def test_pairs_below_the_margin_are_left_out(folders, wan, tmp_path):
    def record(i):
        rows = {"A": dict.fromkeys(("VQ", "MQ", "TA"), 0.25 * (i // 2)), "B": dict.fromkeys(("VQ", "MQ", "TA"), 0.0)}
        return {"prompt": "a", "labels": {}, "rewards": rows}

    path = write(tmp_path / "set", wan, record=record)
    assert set(kept(path, folders["wan"])) == {f"k{i}" for i in range(2, 8)}  # equal ones never count
    assert set(kept(path, folders["wan"], min_margin=0.25)) == {f"k{i}" for i in range(4, 8)}
    datamodule = loaded(data(path, batch_size=1, min_margin=0.25), SimpleNamespace(generator=wan))
    keys = [key for batch in datamodule.train_dataloader() for key in batch["keys"]]
    assert keys == [f"k{i}" for i in range(4, 8)]
    with pytest.raises(VideoAlignError, match=r"no pair has a margin above 0.75"):
        kept(path, folders["wan"], min_margin=0.75)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": (-1.0, 1.0, 1.0)}, "negative"),
        ({"weights": (0.0, 0.0, 0.0)}, "positive"),
        ({"min_margin": -0.1}, "min_margin"),
        ({"min_margin": math.nan}, "min_margin"),
        ({"weights": (math.nan, 1.0, 1.0)}, "weights"),
    ],
)
def test_preference_options_that_mean_nothing_are_refused(options, words):
    with pytest.raises(VideoAlignError, match=words):
        data("none", **{name: Weights(*value) if name == "weights" else value for name, value in options.items()})


@pytest.mark.parametrize("labelled", [False, True], ids=["rewards", "labels"])
def test_swapping_a_and_b_leaves_the_training(labelled, folders, wan, tmp_path):
    opposite = {"A": "B", "B": "A", "same": "same"}

    def record(i, swap):
        if labelled:
            words = ("A", "B", "B") if i % 2 else ("A", "A", "same")
            return {"prompt": "a", "labels": {d: opposite[w] if swap else w for d, w in zip(("VQ", "MQ", "TA"), words)}}
        rows = graded(i)["rewards"]
        return {**graded(i), "rewards": {"A": rows["B"], "B": rows["A"]} if swap else rows}

    runs = []
    for swap in (False, True):
        path = write(
            tmp_path / f"{swap}",
            wan,
            record=partial(record, swap=swap),
            tensors=lambda i, t, swap=swap: {**t, "a": t["b"], "b": t["a"]} if swap else t,
        )
        runs.append(fit(make(FlowDPO, folders["wan"]), data(path), steps=3))
    assert runs[0].steps == runs[1].steps
    close(runs[0].gradients, runs[1].gradients, rtol=0, atol=0)


# --- draws and order --------------------------------------------------------------------------------------------


def test_preferred_and_other_share_time_and_noise(family, folders, pairs, monkeypatch):
    model, calls = make(FlowDPO, folders[family]), []
    batch = next(iter(loaded(data(pairs[family]), model).train_dataloader()))
    monkeypatch.setattr(model.generator, "velocity", lambda x, t, *rest: calls.append((x, t)) or torch.zeros_like(x))
    errors, times = model.errors(batch["latents"], batch["seeds"], batch["prompts"])
    ((x, t),) = calls
    x, t = x.unflatten(0, (2, -1)), t.unflatten(0, (2, -1))
    assert torch.equal(t[0], t[1]) and torch.equal(t[0], times) and len(set(times.tolist())) == 4
    noise = (x - (1 - t.view(2, 4, 1, 1, 1, 1)) * batch["latents"]) / t.view(2, 4, 1, 1, 1, 1)
    torch.testing.assert_close(noise[0], noise[1], rtol=0, atol=1e-3)
    assert (noise[0, 0] - noise[0, 1]).abs().max() > 1
    want = (noise - batch["latents"]).square().flatten(2).mean(2)  # velocity 0
    torch.testing.assert_close(errors, want, rtol=1e-3, atol=1e-3)


def test_draws_depend_on_seed_epoch_and_key_alone(wan, pairs):
    stub = SimpleNamespace(generator=wan)

    def seeds(epoch=0, world=1, **options):
        found = {}
        for rank in range(world):
            loader = loaded(data(pairs["wan"], **options), stub, world=world, rank=rank).train_dataloader()
            loader.epoch = epoch
            for batch in loader:
                found.update(zip(batch["keys"], batch["seeds"].tolist()))
        return found

    want = seeds()
    assert len(want) == 8 == len(set(want.values()))
    assert seeds(batch_size=2) == want
    assert seeds(batch_size=2, world=2) == want
    assert seeds(batch_size=1, workers=2) == want
    assert seeds(shuffle_buffer=5) == want
    for other in (seeds(epoch=1), seeds(seed=1)):
        assert other.keys() == want.keys() and not set(other.values()) & set(want.values())


def test_held_out_samples_keep_their_noise_and_times(folders, pairs):
    """Else val/loss would move while the weights stand still."""
    losses = []

    class Collect(L.Callback):
        def on_validation_end(self, trainer, module):
            losses.append(float(trainer.callback_metrics["val/loss"]))

    model = make(FlowDPO, folders["wan"], optimizer=partial(torch.optim.SGD, lr=0.0))
    datamodule = data(pairs["wan"], val=pairs["wan"], val_batch_size=3)
    fit(model, datamodule, callbacks=[Collect()], max_steps=-1, max_epochs=3, limit_val_batches=1.0)
    assert len(losses) == 3 and losses[0] != LN2 and losses == [losses[0]] * 3


@pytest.mark.parametrize(("kind", "lora"), [(FlowDPO, SMALL), (FlowDPO, None)], ids=["lora", "full"])
def test_resumption_in_the_middle_of_an_epoch_is_exact(kind, lora, folders, pairs, tmp_path):
    """8 pairs in batches of 2: stopped after 6 of 9 steps and resumed, or run through."""

    def run(steps, folder, checkpoint=None):
        model = make(
            kind, folders["wan"], trained=False, lora=lora, optimizer=partial(torch.optim.AdamW, lr=1e-2), warmup=0.3
        )
        if checkpoint:  # of another process, with other random adapters
            with torch.no_grad():
                for p in model.parameters():
                    p += p.requires_grad
        save = L.pytorch.callbacks.ModelCheckpoint(tmp_path / folder, every_n_train_steps=6, save_top_k=-1)
        watch = fit(model, data(pairs["wan"], 2, workers=2, shuffle_buffer=4), steps, [save], checkpoint)
        return model, watch, save.best_model_path

    # the schedule knows the number of steps, so the interrupted run must be told the same one
    through, watch, middle = run(9, "a")
    resumed, rest, _ = run(9, "b", middle)
    content = torch.load(middle, weights_only=True)
    assert content["global_step"] == 6 and len(rest.steps) == 3
    assert rest.steps == watch.steps[6:]
    assert set(content["state_dict"]) == through.trained().keys()
    for name, parameter in through.named_parameters():
        assert torch.equal(resumed.get_parameter(name), parameter), name


# --- what is refused in a training ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        {"lora": None},
        {"lora": LoRA(rank=4, alpha=8, targets=["to_q"])},
        {"lora": LoRA(rank=2, alpha=8, targets=SMALL.targets)},
    ],
    ids=["full", "fewer", "rank"],
)
def test_checkpoint_of_another_model_is_refused(other, folders, pairs, tmp_path):
    save = L.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1)
    fit(make(FlowDPO, folders["wan"]), data(pairs["wan"]), callbacks=[save])
    with pytest.raises(VideoAlignError, match="does not fit"):
        fit(make(FlowDPO, folders["wan"], **other), data(pairs["wan"]), 2, checkpoint=save.best_model_path)


def test_broken_loss_stops_with_the_keys_and_the_last_checkpoint_as_it_was(folders, pairs, tmp_path):
    class Poison(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == 3:
                for p in module.parameters():
                    p.data += torch.nan if p.requires_grad else 0.0

    save = L.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=1, save_last=True)
    with pytest.raises(VideoAlignError, match=r"loss is nan at step 3, samples \['k6', 'k7'\]"):
        fit(make(FlowDPO, folders["wan"]), data(pairs["wan"], 2), 6, [Poison(), save])
    for path in tmp_path.iterdir():
        content = torch.load(path, weights_only=True)
        assert content["global_step"] == 3 and all(t.isfinite().all() for t in content["state_dict"].values())
    fit(make(FlowDPO, folders["wan"]), data(pairs["wan"], 2), 4, checkpoint=str(tmp_path / "last.ckpt"))


@pytest.mark.parametrize("kind", [FlowDPO, FlowIPO])
def test_single_videos_are_no_pairs(kind, folders, videos):
    with pytest.raises(VideoAlignError, match="single videos"):
        fit(make(kind, folders["wan"]), data(videos))


def test_latents_of_another_autoencoder_are_refused(folders, pairs, wan, tmp_path):
    with pytest.raises(VideoAlignError, match=r"another generator.*family: Wan, here LTX"):
        fit(make(FlowDPO, folders["ltx"]), data(pairs["wan"]))
    make_generator(tmp_path / "other", "wan", hidden=48, seed=1)
    with pytest.raises(VideoAlignError, match=r"another generator \(vae: "):
        fit(make(FlowDPO, str(tmp_path / "other")), data(pairs["wan"]))


def test_latents_normalised_with_other_statistics_are_another_autoencoders(generator, family):
    before = generator.identity()
    if family == "wan":
        generator.vae.register_to_config(latents_std=[2.0] * 16)
    else:
        generator.vae.latents_std.fill_(2.0)
    assert generator.identity() != before


def test_two_shapes_do_not_make_a_pair_or_a_batch(folders, wan, tmp_path):
    def one_side(i, t):
        return {**t, "a": t["a"][:, :1].contiguous()} if i == 1 else t

    def both_sides(i, t):
        return {n: v[:, :1].contiguous() if n != "prompt" else v for n, v in t.items()} if i == 1 else t

    inside, between = (write(tmp_path / f.__name__, wan, tensors=f) for f in (one_side, both_sides))
    with pytest.raises(VideoAlignError, match=r"k1.*\(16, 1, 4, 4\), \(16, 2, 4, 4\).*pair"):
        fit(make(FlowDPO, folders["wan"]), data(inside))
    with pytest.raises(VideoAlignError, match=r"several shapes in one batch.*batch_size 1"):
        fit(make(FlowDPO, folders["wan"]), data(between))
    fit(make(FlowDPO, folders["wan"]), data(between, batch_size=1), steps=3)


def test_latents_of_another_text_encoder_are_refused(folders, wan, tmp_path):
    path = write(tmp_path / "set", wan, tensors=lambda i, t: {**t, "prompt": t["prompt"][:, :16].contiguous()})
    with pytest.raises(VideoAlignError, match=r"prompt embeddings of shape \(3, 16\).*another text encoder"):
        fit(make(FlowDPO, folders["wan"]), data(path))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora": LoRA(targets=["q_proj"])}, r"'q_proj'.*There are: .*'to_out.0'.*'to_q'"),
        ({"lora": None, "dtype": "bfloat16"}, "model.dtype: float32"),
        ({"warmup": 1.0}, "warmup"),
        ({"warmup": -0.1}, "warmup"),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused(options, words, family, folders):
    with pytest.raises(VideoAlignError, match=words):
        make(FlowSFT, folders[family], trained=False, **options)


# --- several processes ------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys, torch, lightning as L
from forked import on_ranks
from functools import partial
from lightning.pytorch.strategies import ModelParallelStrategy
from videoalign.alignment import FlowDPO, FlowRWR
from videoalign.datamodules.latents import LatentPairs
from videoalign.models.lora import LoRA
torch.set_num_threads(1)
generator, latents, out = sys.argv[1:]
LORA = LoRA(rank=4, alpha=8, targets=["to_q", "to_k", "to_v", "to_out.0"])

class Watch(L.Callback):
    def __init__(self):
        self.steps = []
    def on_train_batch_end(self, trainer, module, *rest):
        self.steps.append({k: float(v) for k, v in trainer.callback_metrics.items()})

def run(kind):
    devices = 1 if kind == "single" else 2
    result = {}
    for name, algorithm, options in [
        ("dpo-lora", FlowDPO, {"lora": LORA, "gradient_checkpointing": True}),
        ("dpo-full", FlowDPO, {"lora": None, "gradient_checkpointing": True}),
        ("dpo-bfloat16", FlowDPO, {"lora": LORA, "dtype": "bfloat16"}),
        ("rwr-lora", FlowRWR, {"lora": LORA}),
    ]:
        strategy = {"single": "auto", "ddp": "ddp", "fsdp2": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)}[kind]
        L.seed_everything(0)
        model = algorithm(generator=generator, optimizer=partial(torch.optim.SGD, lr=0.05), **options)
        watch = Watch()
        trainer = L.Trainer(accelerator="cpu", devices=devices, strategy=strategy, max_steps=3, limit_val_batches=1.0, val_check_interval=3,
            check_val_every_n_epoch=None, logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
            gradient_clip_val=1.0, enable_checkpointing=False, use_distributed_sampler=False, callbacks=[watch])
        # the same global batch of all 8 pairs in each step
        data = LatentPairs(latents, latents, batch_size=8 // devices, val_batch_size=3, workers=0, shuffle_buffer=0)
        trainer.fit(model, data)
        weights = {}
        for n, p in model.named_parameters():
            if p.requires_grad:
                weights[n] = (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        val = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        result[name] = {"weights": weights, "steps": watch.steps, "val": val}
        torch.save(result, f"{out}/{kind}-{trainer.global_rank}.pt")

for kind in ("single", "ddp", "fsdp2"):
    on_ranks(1 if kind == "single" else 2, partial(run, kind))
"""


@pytest.mark.slow
def test_two_processes_train_as_one(folders, pairs, tmp_path):
    """One process, DDP and FSDP2 agree, and begin at ln 2: noise belongs to the sample and not to the rank."""
    done = forked(SCRIPT, folders["wan"], pairs["wan"], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    results = {
        kind: [
            torch.load(tmp_path / f"{kind}-{rank}.pt", weights_only=True)
            for rank in range(1 if kind == "single" else 2)
        ]
        for kind in ("single", "ddp", "fsdp2")
    }
    for kind, ranks in results.items():
        for rank in ranks:
            for name in ("dpo-lora", "dpo-full", "dpo-bfloat16"):
                assert rank[name]["steps"][0]["train/loss"] == LN2, (kind, name)
                assert rank[name]["steps"][0]["train/rewards/margins"] == 0.0, (kind, name)
                assert rank[name]["steps"][2]["train/rewards/margins"] != 0.0, (kind, name)
    single = results["single"][0]
    for kind in ("ddp", "fsdp2"):
        for name, want in single.items():
            tolerance = {"rtol": 2e-2, "atol": 2e-3} if "bfloat16" in name else {"rtol": 1e-4, "atol": 1e-5}
            close(results[kind][0][name]["weights"], want["weights"], **tolerance)
            mean = sum(rank[name]["steps"][1]["train/loss"] for rank in results[kind]) / 2
            if "rwr" not in name:
                assert mean == pytest.approx(want["steps"][1]["train/loss"], rel=1e-3), (kind, name)
            assert results[kind][0][name]["val"].keys() == want["val"].keys()
            for key, value in want["val"].items():
                relative = {"rel": 0.1, "abs": 0.3} if "bfloat16" in name else {"rel": 1e-3, "abs": 1e-4}
                assert results[kind][0][name]["val"][key] == pytest.approx(value, **relative), (kind, name, key)
