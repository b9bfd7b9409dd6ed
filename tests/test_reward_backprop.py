"""Trainings along a reward's gradient: PRFL, DRaFT-K and ReFL, in turn with flow matching."""

import warnings
from functools import partial

import lightning as L
import pytest
import torch

import videoalign.models.reward_gradients as reward_gradients
from flow_kit import PROMPTS, SHAPE, close, data, fit, loaded, make, write
from forked import forked
from helpers import QUIET, randn
from videoalign import VideoAlignError
from videoalign.alignment import FlowSFT, Generate, LastSteps, PredictedEnd, RandomStep, RewardBackprop
from videoalign.datamodules.judgements import Weights, without_image
from videoalign.miniature.networks.pipelines import make_generator
from videoalign.models import VideoReward
from videoalign.models.flow import draw
from videoalign.models.frame_sampling import FrameSampling
from videoalign.models.generator_folder import load_generator
from videoalign.models.guidance import Guidance
from videoalign.models.memory import Memory
from videoalign.models.noisy_reward import NoisyReward, NoisyRewardShape
from videoalign.models.search import BestOfN
from videoalign.models.whole import shapes_only


@pytest.fixture(scope="module")
def rewards(folders, backbone, tmp_path_factory):
    """Folders of a noisy reward and of a VideoReward, both random, with statistics of their own."""
    root = tmp_path_factory.mktemp("rewards")
    torch.manual_seed(0)
    noisy = NoisyReward(load_generator(folders["wan"]), NoisyRewardShape(blocks=1, hidden=16))
    frames = VideoReward(backbone, "plain", FrameSampling(fps=8.0, min_pixels=0))
    for name, reward in (("noisy", noisy), ("frames", frames)):
        with torch.no_grad():
            for parameter in reward.head.parameters():
                parameter *= 3
        reward.statistics = type(reward.statistics)([0.1, -0.2, 0.3], [0.1, 0.2, 0.1])
        reward.save_pretrained(root / name)
    return {name: str(root / name) for name in ("noisy", "frames")}


def backprop(folders, rewards, through="noisy", **options):
    options = {"steps": 3, "matching": 0.0, "target": None, "scale": 1.0, "fps": 8.0, **options}
    return make(RewardBackprop, folders["wan"], reward=rewards[through], through=through, **options)


KINDS = {
    "prfl": {"through": "noisy", "route": RandomStep()},
    "draft": {"through": "frames", "route": LastSteps(1)},
    "refl": {"through": "frames", "route": PredictedEnd(2)},
    "clean": {"through": "noisy", "route": LastSteps(2)},
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def batch_of(path, model, **options):
    return next(iter(loaded(data(path, **options), model).train_dataloader()))


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["prfl", "draft"])
def test_gradients_are_those_of_finite_differences(name, folders, rewards, pairs, monkeypatch):
    """Along the gradient itself, over the whole way from the adapters to the rewards; roundings are left out."""
    monkeypatch.setattr(reward_gradients, "as_uint8", lambda values: values)
    route = {"prfl": RandomStep(0, 0), "draft": LastSteps(2)}[name]  # no step of theirs has no gradient
    model = backprop(folders, rewards, **{**KINDS[name], "route": route}, steps=2)
    batch, trained = batch_of(pairs["wan"], model), list(model.trained().values())
    gradients = torch.autograd.grad(model._reward_step(batch, "train"), trained)
    norm = sum(g.double().square().sum() for g in gradients).sqrt().item()
    assert norm > 1e-2
    ends = []
    with torch.no_grad():
        for step in (1, -2):
            for parameter, gradient in zip(trained, gradients):
                parameter += 0.05 / norm * step * gradient
            ends.append(model._reward_step(batch, "train").item())
    assert (ends[0] - ends[1]) / 0.1 == pytest.approx(norm, rel=0.03)


def test_every_route_reaches_all_adapters(kind, folders, rewards, pairs):
    watch = fit(backprop(folders, rewards, **kind, gradient_checkpointing=True), data(pairs["wan"]))
    model = backprop(folders, rewards, **kind)
    plain = fit(model, data(pairs["wan"]))
    assert watch.gradients.keys() == model.trained().keys()
    assert all(g.any() for g in watch.gradients.values())
    close(watch.gradients, plain.gradients, rtol=1e-3, atol=1e-6)
    assert watch.steps[0]["train/rewards/overall"] == pytest.approx(
        sum(watch.steps[0][f"train/rewards/{d}"] for d in ("VQ", "MQ", "TA")) / 3, rel=1e-4
    )
    assert watch.steps[0]["train/loss/reward"] == pytest.approx(-watch.steps[0]["train/rewards/overall"], rel=1e-5)


def test_the_loss_is_the_equation_of_prfl(folders, rewards, pairs):
    """By hand: an Euler step at the drawn place, the noisy reward behind it, and the bound at the target."""
    model = backprop(folders, rewards, scale=0.1, target=0.4, weights=Weights(1.0, 0.0, 3.0), steps=4)
    batch, generator = batch_of(pairs["wan"], model), load_generator(folders["wan"])
    reward = NoisyReward.from_pretrained(rewards["noisy"], generator)
    u, noise = draw(batch["seeds"], torch.Size(SHAPE), torch.device("cpu"))
    times, wanted = torch.cat([torch.linspace(1, 0.001, 5)[:-1], torch.zeros(1)]), []
    with torch.no_grad():
        for n in range(len(u)):
            condition, x = generator.condition([batch["conditions"][n]]), noise[n : n + 1]
            for i in range(int(u[n] * 3) + 1):
                x = x + (times[i + 1] - times[i]) * model.generator.velocity(x, times[i : i + 1], condition)
            raw = reward(x, times[i + 1 : i + 2], condition)[0]
            r = (raw - torch.tensor([0.1, -0.2, 0.3])) / torch.tensor([0.1, 0.2, 0.1])
            wanted.append(0.1 * max(0.0, 0.4 - (r[0] + 3 * r[2]).item() / 4))
        assert 0 < sum(w > 0 for w in wanted)
        found = model._reward_step(batch, "train").item()
    assert found == pytest.approx(sum(wanted) / len(wanted), rel=1e-3, abs=1e-6)
    assert len({int(v * 3) for v in u}) > 1


def test_samples_do_not_depend_on_their_batch(kind, folders, rewards, pairs):
    """So ranks and micro-batches make no difference: each sample has its own noise and its own step."""
    model = backprop(folders, rewards, **kind)
    whole, halves = batch_of(pairs["wan"], model), loaded(data(pairs["wan"], 2), model).train_dataloader()
    with torch.no_grad():
        want = dict(zip(whole["keys"], model.rewards_of(whole)))
        found = {k: r for half, _ in zip(halves, range(2)) for k, r in zip(half["keys"], model.rewards_of(half))}
    assert found.keys() == want.keys()
    for key, row in found.items():
        torch.testing.assert_close(row, want[key], rtol=1e-3, atol=1e-3)


# --- trainings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["prfl", "draft"])
def test_the_reward_rises(name, folders, rewards, pairs):
    adam = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.0)
    model = backprop(folders, rewards, **KINDS[name], optimizer=adam)
    before = {n: p.clone() for n, p in model.reward.reward.state_dict().items()}
    with torch.no_grad():
        batch = batch_of(pairs["wan"], model, batch_size=8)
        first = model.rewards_of(batch).mean().item()
        fit(model, data(pairs["wan"], 8), steps=12)
        last = model.rewards_of(batch).mean().item()
    assert last > first + 0.3
    after = model.reward.reward.state_dict()
    assert all(torch.equal(after[n], tensor) for n, tensor in before.items())


def test_videos_above_the_target_change_nothing(folders, rewards, pairs):
    adam = partial(torch.optim.AdamW, lr=0.1, weight_decay=0.0)
    model = backprop(folders, rewards, target=-1e4, optimizer=adam)
    before = {n: p.detach().clone() for n, p in model.trained().items()}
    watch = fit(model, data(pairs["wan"]), steps=2)
    assert watch.steps[-1]["train/rewards/capped"] == 1
    assert watch.steps[-1]["train/loss/reward"] == 0
    assert all(torch.equal(p, before[n]) for n, p in model.trained().items())


def test_steps_of_flow_matching_are_those_of_sft(folders, rewards, pairs):
    """A rate of 0 in the first step: the second step's gradient is that of SFT on the second batch."""

    class Second(L.Callback):
        def on_after_backward(self, trainer, module):
            if trainer.global_step == 1:
                self.gradients = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}

    found, still = [], partial(torch.optim.SGD, lr=0.0)
    models = backprop(folders, rewards, matching=0.5, optimizer=still), make(FlowSFT, folders["wan"], optimizer=still)
    for model in models:
        second = Second()
        watch = fit(model, data(pairs["wan"]), steps=2, callbacks=[second])
        found.append((second.gradients, watch.steps[1]["train/loss"]))
    close(found[0][0], found[1][0], rtol=0, atol=0)
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize(("share", "kinds"), [(0.0, "rrrrrr"), (0.5, "rmrmrm"), (0.25, "rrrmrr"), (2 / 3, "rmmrmm")])
def test_the_two_kinds_of_steps_take_turns(share, kinds, folders, rewards):
    model = backprop(folders, rewards, matching=share)
    assert "".join("rm"[model.matches(step)] for step in range(6)) == kinds


def test_micro_batches_of_a_step_are_of_one_kind(folders, rewards, pairs):
    model = backprop(folders, rewards, matching=0.5)
    seen = []

    class See(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            seen.append(module.matches(module.global_step))

    fit(model, data(pairs["wan"], 2), steps=2, callbacks=[See()], accumulate_grad_batches=2)
    assert seen == [False, False, True, True]


def test_a_continued_training_is_the_whole_one(folders, rewards, pairs, tmp_path):
    def run(steps, checkpoint=None, every=2):
        save = L.pytorch.callbacks.ModelCheckpoint(tmp_path / f"{steps}", every_n_train_steps=every, save_top_k=-1)
        model = backprop(folders, rewards, matching=0.5, optimizer=partial(torch.optim.AdamW, lr=1e-2))
        watch = fit(model, data(pairs["wan"], 2), steps, [save], checkpoint, max_epochs=-1)
        return model, watch

    whole, watch = run(5)
    middle = str(next((tmp_path / "5").glob("*step=2.ckpt")))
    content = torch.load(middle, weights_only=True)
    assert set(content["state_dict"]) == whole.trained().keys()
    resumed, rest = run(5, middle)
    assert rest.steps[-1] == watch.steps[-1]
    for name, parameter in whole.trained().items():
        assert torch.equal(resumed.trained()[name], parameter), name


def test_held_out_samples_show_rewards_and_errors(kind, folders, rewards, pairs):
    trainer = L.Trainer(**QUIET)
    model = backprop(folders, rewards, **kind)
    (row,) = trainer.validate(model, data(pairs["wan"], val=pairs["wan"]), verbose=False)
    assert {"val/loss", "val/loss/reward", "val/rewards/VQ", "val/rewards/overall"} <= row.keys()
    (sft,) = trainer.validate(make(FlowSFT, folders["wan"]), data(pairs["wan"], val=pairs["wan"]), verbose=False)
    assert row["val/loss"] == sft["val/loss"]


def test_guidance_samples_with_the_empty_prompt(folders, rewards, pairs):
    found = [
        fit(backprop(folders, rewards, cfg_scale=scale), data(pairs["wan"])).steps[0]["train/rewards/overall"]
        for scale in (1.0, 4.0)
    ]
    assert abs(found[0] - found[1]) > 1e-3


def test_adapters_train_in_fp32_beside_weights_in_bf16(folders, rewards, pairs):
    model = backprop(
        folders, rewards, **KINDS["draft"], dtype="bfloat16", optimizer=partial(torch.optim.AdamW, lr=5e-6)
    )
    before = {n: p.detach().clone() for n, p in model.trained().items()}
    fit(model, data(pairs["wan"]), precision="bf16-mixed")
    for name, parameter in model.trained().items():
        assert parameter.dtype == torch.float32
        assert (parameter != before[name]).float().mean() > 0.9, name  # most would not move in bf16


# --- several processes ----------------------------------------------------------------------------

SCRIPT = """
import sys, torch, lightning as L
from functools import partial
from forked import THREE_STEPS, on_ranks, strategy
from videoalign.alignment import RewardBackprop
from videoalign.datamodules.latents import LatentPairs
from videoalign.models.lora import LoRA
torch.set_num_threads(1)
generator, reward, latents, out = sys.argv[1:]

def run(kind):
    devices = 1 if kind == "single" else 2
    L.seed_everything(0, verbose=False)
    lora = LoRA(rank=4, alpha=8, targets=["to_q", "to_k", "to_v", "to_out.0"])
    model = RewardBackprop(reward, steps=5, matching=0.5, target=None, scale=1.0, generator=generator, lora=lora,
                           optimizer=partial(torch.optim.SGD, lr=0.05))
    trainer = L.Trainer(devices=devices, strategy=strategy(kind), **THREE_STEPS)
    data = LatentPairs(latents, latents, batch_size=4 // devices, val_batch_size=3, workers=0, shuffle_buffer=0)
    trainer.fit(model, data)
    weights = {}
    for n, p in model.named_parameters():
        if p.requires_grad:
            weights[n] = (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
    logged = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
    torch.save({"weights": weights, "val": logged}, f"{out}/{kind}-{trainer.global_rank}.pt")

for kind in ("single", "ddp", "fsdp2"):
    on_ranks(1 if kind == "single" else 2, partial(run, kind))
"""


@pytest.mark.slow
def test_two_processes_train_as_one(folders, rewards, pairs, tmp_path):
    """Also where ranks draw different steps of a sharded transformer, whose weights they gather together."""
    done = forked(SCRIPT, folders["wan"], rewards["noisy"], pairs["wan"], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    single = torch.load(tmp_path / "single-0.pt", weights_only=True)
    for kind in ("ddp", "fsdp2"):
        found = torch.load(tmp_path / f"{kind}-0.pt", weights_only=True)
        close(found["weights"], single["weights"], rtol=1e-3, atol=1e-5)
        assert found["val"] == pytest.approx(single["val"], rel=1e-3, abs=1e-3)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"through": "frames", "route": RandomStep()}, r"RandomStep ends at noisy latents.*LastSteps or PredictedEnd"),
        ({"through": "frames"}, "RandomStep ends at noisy latents"),
        ({"route": RandomStep(0, 3)}, "steps 0 to 3 are not among the 3 of model.steps"),
        ({"steps": 0}, "model.steps 0"),
        ({"cfg_scale": 0.5}, "cfg_scale 0.5"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"target": float("nan")}, "target finite or null"),
        ({"matching": 1.0}, r"share of the steps in \[0, 1\)"),
        ({"latent_frames": 1}, "under model.through: frames"),
        ({**KINDS["draft"], "latent_frames": 0}, "at least 1"),
        ({**KINDS["draft"], "memory": Memory(group_offload=("vae",))}, "leave it out, or decode less"),
        (
            {"memory": Memory(layerwise_casting="float8_e4m3fn"), "gradient_checkpointing": True},
            "leave memory.quantization",
        ),
        ({**KINDS["draft"], "parts": ("transformer",)}, "loaded without its vae"),
        ({"null_share": 1.0}, "null_share"),
    ],
    ids=str,
)
def test_options_that_cannot_work_together_are_refused(options, words, folders, rewards):
    with pytest.raises(VideoAlignError, match=words):
        backprop(folders, rewards, **options)


def test_plan_says_that_it_does_not_count_this(folders, rewards):
    with shapes_only(), pytest.raises(VideoAlignError, match="plan counts one pass of the generator"):
        backprop(folders, rewards, trained=False)


def test_rewards_of_the_wrong_kind_are_refused(folders, rewards, tmp_path):
    with pytest.raises(VideoAlignError, match=r"noisy_reward.json"):
        make(RewardBackprop, folders["wan"], reward=rewards["frames"])
    with pytest.raises(VideoAlignError, match=r"reward.json"):
        make(RewardBackprop, folders["wan"], reward=rewards["noisy"], through="frames", route=LastSteps())
    make_generator(tmp_path / "other", "wan", hidden=48, heads=4, seed=1)
    with pytest.raises(VideoAlignError, match="belongs to another generator"):
        make(RewardBackprop, str(tmp_path / "other"), reward=rewards["noisy"])


def test_frames_of_another_rate_are_told(folders, rewards, tmp_path):
    latents = write(tmp_path / "set", load_generator(folders["wan"]), fps=16.0)
    words = "model.fps is 8, and the latents are of videos of 16 frames per second"
    with pytest.warns(UserWarning, match=words):
        fit(backprop(folders, rewards, **KINDS["draft"]), data(latents))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=words)
        warnings.filterwarnings("error", message="model.fps is 16")
        fit(backprop(folders, rewards, **KINDS["draft"], fps=16.0), data(latents))
        fit(backprop(folders, rewards, **KINDS["prfl"]), data(latents))  # no frame is seen


def test_a_reward_without_statistics_is_refused(folders, backbone, tmp_path):
    VideoReward(backbone, "plain", FrameSampling(fps=8.0, min_pixels=0)).save_pretrained(tmp_path / "r")
    with pytest.raises(VideoAlignError, match="has no statistics"):
        make(RewardBackprop, folders["wan"], reward=str(tmp_path / "r"), through="frames", route=LastSteps())
    NoisyReward(load_generator(folders["wan"]), NoisyRewardShape(blocks=1, hidden=8)).save_pretrained(tmp_path / "n")
    with pytest.raises(VideoAlignError, match=r"n has no statistics .* strengths and targets have no unit"):
        make(RewardBackprop, folders["wan"], reward=str(tmp_path / "n"))
    for options in ({}, {"search": BestOfN(candidates=2)}):
        with pytest.raises(VideoAlignError, match="n has no statistics"):
            Generate(folders["wan"], 5, 32, 32, noisy_reward=str(tmp_path / "n"), **options)
    Generate(folders["wan"], 5, 32, 32, noisy_reward=str(tmp_path / "n"), guide=Guidance(strength=0.0))


def test_two_experts_are_trained_through_noisy_latents_of_the_high_one(tmp_path):
    make_generator(tmp_path / "g", "wan22-a14b", hidden=48, layers=1)
    torch.manual_seed(0)
    reward = NoisyReward(load_generator(tmp_path / "g", expert="high"), NoisyRewardShape(blocks=1, hidden=8))
    reward.statistics = type(reward.statistics)([0.1, -0.2, 0.3], [0.1, 0.2, 0.1])
    reward.save_pretrained(tmp_path / "r")
    options = {"reward": str(tmp_path / "r"), "steps": 10, "target": None}
    model = make(RewardBackprop, str(tmp_path / "g"), expert="high", **options)
    latents = {"latents": randn(1, 2, *SHAPE), "seeds": torch.tensor([3, 4]), "texts": PROMPTS[:2]}
    batch = {**latents, "conditions": [{"prompt": randn(3, 32)}] * 2}
    model.rewards_of(batch).sum().backward()
    assert all(p.grad.any() for n, p in model.trained().items() if "lora_B" in n)
    for more in ({"expert": "low"}, {"expert": "high", "route": LastSteps()}):
        with pytest.raises(VideoAlignError, match="need both experts"):
            make(RewardBackprop, str(tmp_path / "g"), **options, **more)


def test_prompts_are_read_without_the_checksum_of_an_image():
    assert without_image("a red circle\n" + "0a" * 32) == "a red circle"
    assert without_image("two\nlines") == "two\nlines"
