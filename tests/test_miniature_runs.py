"""Every shipped recipe behind `experiments/miniature.yaml`, from its first step to `videoalign test`."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import videoalign.commands.lightning_cli as experiment
from helpers import FEW_TOKENS, call, flags
from videoalign.alignment import FlowDPO
from videoalign.cli import main
from videoalign.datamodules.shards import ShardSet, ShardWriter
from videoalign.datamodules.video import encode
from videoalign.miniature.networks.pipelines import make_generator
from videoalign.miniature.networks.qwen import make_qwen
from videoalign.models import VideoReward
from videoalign.models.generator_folder import load_generator
from videoalign.models.noisy_reward import NoisyReward, NoisyRewardShape

ROOT = Path(experiment.__file__).parents[1] / "experiments"
FAMILY = {"qwen2vl_2b": "qwen2_vl", "qwen2_5vl_3b": "qwen2_5_vl", "qwen3vl_2b": "qwen3_vl"}
DIMENSIONS = ("VQ", "MQ", "TA")
FEW = ["--trainer.max_steps=2", "--trainer.limit_val_batches=2"]
"""Behind the overlay: two steps in place of ten, and half of the held-out pairs, for the test's time."""
SMALL = "--model.network.sampling={fps: 2.0, max_pixels: 12544, min_pixels: 0}"


def slow(*cases):
    """Cases that only the slow tests run."""
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


def configs(*names):
    return [f"--config={ROOT}/{name}.yaml" for name in (*names, "miniature")]


def logged(run):
    """Tags of scalars, images and texts that a run's TensorBoard files hold."""
    found = EventAccumulator(str(run), {"scalars": 0, "images": 1, "tensors": 1})
    found.Reload()
    return found


def check_run(cli, validated, rates):
    """A run validated, has its last checkpoint, and logged its learning rates."""
    run = Path(cli.trainer.log_dir)
    events = logged(run)
    assert [event.step for event in events.Scalars(validated)] == [1]  # Lightning counts steps from 0 here
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 2
    tags = events.Tags()["scalars"]
    wanted = {f"vitals/learning_rate/{name}" for name in rates} if len(rates) > 1 else {"vitals/learning_rate"}
    assert {tag for tag in tags if tag.startswith("vitals/learning_rate")} == wanted
    assert (run / "export").is_dir()
    return run, events


# --- reward models ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Eight rated pairs with scores and rewards; both videos of a pair begin with the same frame."""
    folder, rng = tmp_path_factory.mktemp("rated") / "pairs", np.random.default_rng(0)
    with ShardWriter(folder, "pairs") as writer:
        for number in range(8):
            first, *films = (rng.integers(0, 255, (frames, 64, 64, 3), np.uint8) for frames in (1, 8, 8))
            clips = {side: encode(np.concatenate([first, film]), 8) for side, film in zip("ab", films)}
            rewards = {side: dict(zip(DIMENSIONS, rng.normal(size=3))) for side in "AB"}
            labels = {d: "A" if rewards["A"][d] > rewards["B"][d] else "B" for d in DIMENSIONS}
            scores = {side: dict(zip(DIMENSIONS, rng.integers(1, 6, 3).tolist())) for side in "AB"}
            record = {"prompt": f"a red circle {number % 2}", "labels": labels, "rewards": rewards, "scores": scores}
            writer.write(f"{number}", clips, record)
    return folder


@pytest.fixture
def recipe(request, tmp_path_factory):
    """A recipe's name and a miniature folder of its architecture."""
    folder = tmp_path_factory.getbasetemp() / f"miniature_{request.param}"
    if not folder.exists():
        make_qwen(folder, FAMILY[request.param], hidden=32, layers=1)
    return request.param, folder


def fit_reward(names, model, pairs):
    sets = [f"--data.train={pairs}", f"--data.val={pairs}"]
    names = [f"videoreward/{name}" for name in names if name]
    return experiment.run(["fit", *configs(*names), *FEW, *model, *sets]), names


@pytest.mark.parametrize(
    ("recipe", "variant"),
    [
        ("qwen2vl_2b", None),
        *slow(*zip(FAMILY, ("bt", "reg", "shared")), ("qwen2_5vl_3b", None), ("qwen3vl_2b", None)),
    ],
    indirect=["recipe"],
)
def test_every_reward_recipe_runs_in_miniature(recipe, variant, pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, backbone = recipe
    model = [f"--model.network.backbone={backbone}", SMALL]
    cli, names = fit_reward(dict.fromkeys(["qwen2vl_2b", name, variant]), model, pairs)
    run, events = check_run(cli, "val/accuracy/VQ", ["language", "vision", "merger", "tokens", "head"])
    assert run.is_relative_to(f"runs/videoreward{f'_{variant}' if variant else ''}/{name}")
    assert any(tag.startswith("val/examples/") for tag in events.Tags()["images"])
    module = cli.trainer.lightning_module
    assert module.network.config.model_type == FAMILY[name]
    assert module.loss == {"bt": "bt", "reg": "reg"}.get(variant, "btt")
    assert module.network.processor.template.separate == (variant is None)
    again = VideoReward.from_pretrained(run / "export")
    trained = module.network.state_dict()
    assert all(torch.equal(again.state_dict()[n], trained[n]) for n in again.trained_names())
    if variant is None:
        path = f"--ckpt_path={run}/checkpoints/last.ckpt"
        assert call("test", *configs(*names), *model, f"--data.val={pairs}", path) == 0


@pytest.mark.slow
def test_a_released_model_trains_on_in_miniature(backbone, sampling, pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    VideoReward(backbone, "plain", sampling).save_pretrained(tmp_path / "released")
    cli, _ = fit_reward(["qwen2vl_2b", "released"], [f"--model.network.folder={tmp_path / 'released'}"], pairs)
    check_run(cli, "val/accuracy/VQ", ["language", "vision", "merger", "tokens", "head"])


# --- generators -------------------------------------------------------------------------------------------------------

ALGORITHMS = {
    "wan_sft": ["wan_sft"],
    "wan_rwr": ["wan_sft", "wan_rwr"],
    "wan_dpo": ["wan_sft", "wan_dpo"],
    "wan_dpo_time": ["wan_sft", "wan_dpo_time"],
    "wan_dpo_ta": ["wan_sft", "wan_dpo", "wan_dpo_ta"],
    "wan_ipo": ["wan_sft", "wan_ipo"],
    "ltx_dpo": ["wan_sft", "wan_dpo", "ltx_dpo"],
    "prfl": ["wan_sft", "prfl"],
    "draft": ["wan_sft", "draft"],
}
REWARDS = {"prfl": "noisy", "draft": "frames"}
"""Recipes that follow a reward's gradient, and the reward of each."""
SIZE = "{num_frames: 9, height: 64, width: 64, fps: 8}"
NEW = {
    "wan22_5b": "wan22-5b",
    "wan22_5b_image": "wan22-5b",
    "wan22_a14b_high": "wan22-a14b",
    "wan22_a14b_low": "wan22-a14b",
    "wan22_a14b_image_high": "wan22-a14b-i2v",
    "wan22_a14b_image_low": "wan22-a14b-i2v",
    "wan_image": "wan-i2v",
    "ltx_image": "ltx-i2v",
    "ltx2": "ltx2",
    "ltx2_image": "ltx2-i2v",
    "hunyuan15": "hunyuan15",
    "hunyuan15_image": "hunyuan15-i2v",
}
"""Recipes of the other generators, each behind any algorithm's, and the miniature family of each."""


def encode_with(recipe, family, pairs, folder):
    """A miniature generator, and latents of the pairs, written by a shipped experiment."""
    make_generator(folder / recipe, family, hidden=48, layers=1, max_tokens=FEW_TOKENS)
    names = {"model.generator": folder / recipe, "data.data": pairs, "data.out": folder / f"{recipe}_latents"}
    options = [f"--{key}={value}" for key, value in names.items()]
    experiment.run(["predict", *configs(f"encode/{recipe}"), *options, f"--data.clip={SIZE}"])
    return folder


@pytest.fixture(scope="module")
def encoded(pairs, tmp_path_factory):
    """Miniature generators, and latents of the pairs, written by the shipped experiments."""
    folder = tmp_path_factory.mktemp("encoded")
    for family in ("wan", "ltx"):
        encode_with(family, family, pairs, folder)
    return folder


def sets(encoded, family):
    """Options for a family's generator and latents."""
    latents = encoded / f"{family}_latents"
    return [f"--model.generator={encoded / family}", f"--data.train={latents}", f"--data.val={latents}"]


@pytest.fixture(scope="module")
def rewards(encoded, backbone, sampling):
    """Folders of a noisy reward of the miniature Wan and of a VideoReward."""
    networks = {
        "noisy": NoisyReward(load_generator(encoded / "wan"), NoisyRewardShape(blocks=1)),
        "frames": VideoReward(backbone, "plain", sampling),
    }
    for name, network in networks.items():
        network.statistics = type(network.statistics)([0.1] * 3, [2.0] * 3)
        network.save_pretrained(encoded / f"reward_{name}")
    return {name: encoded / f"reward_{name}" for name in networks}


@pytest.mark.parametrize("name", ["wan_dpo", *slow(*((name,) for name in ALGORITHMS if name != "wan_dpo"))])
def test_every_algorithm_runs_in_miniature(name, encoded, rewards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = sets(encoded, "ltx" if name == "ltx_dpo" else "wan")
    if name in REWARDS:
        options += [f"--model.reward={rewards[REWARDS[name]]}", "--model.steps=3"]
    recipe = configs(*(f"flow/{c}" for c in ALGORITHMS[name]))
    cli = experiment.run(["fit", *recipe, *FEW, *options])
    run, events = check_run(cli, "val/loss", ["adapters"])
    assert run.is_relative_to(f"runs/flow/{name}")
    if name in REWARDS:
        assert {"train/loss/reward", "val/rewards/overall"} <= set(events.Tags()["scalars"])
        assert ("train/loss" in events.Tags()["scalars"]) == (name == "prfl")  # two steps, one of each kind
    kind = "RewardBackprop" if name in REWARDS else f"Flow{name.split('_')[1].upper()}"
    assert type(cli.trainer.lightning_module).__name__ == kind
    assert (run / "export" / "pytorch_lora_weights.safetensors").exists()
    (index,) = (run / "samples").glob("*/clips.json")
    assert len(json.loads(index.read_text())) == 2 and (run / "samples.html").exists()
    assert any(tag.startswith("val/samples/") for tag in events.Tags()["images"])
    if name in ("wan_dpo", "ltx_dpo"):
        path = f"--ckpt_path={run}/checkpoints/last.ckpt"
        assert call("test", *recipe, options[0], options[2], path) == 0


@pytest.mark.parametrize("name", ["wan22_a14b_low", *slow(*((name,) for name in NEW if name != "wan22_a14b_low"))])
def test_every_generator_encodes_trains_and_guides_by_its_recipes(name, pairs, tmp_path, monkeypatch):
    """Encoding, Flow-DPO with samples of the held-out size, a noisy reward and guidance, by the shipped recipes."""
    monkeypatch.chdir(tmp_path)
    recipe = name.removesuffix("_low").removesuffix("_high")
    folder = encode_with(recipe, NEW[name], pairs, tmp_path)
    chain = ["wan_sft", "wan_dpo", *([f"{recipe}_high"] if name.endswith("_low") else []), name]
    cli = experiment.run(["fit", *configs(*(f"flow/{part}" for part in chain)), *FEW, *sets(folder, recipe)])
    expert = name.split("_")[-1] if "a14b" in name else ""
    run, events = check_run(cli, f"val/loss/{expert}".rstrip("/"), ["adapters"])
    assert run.is_relative_to(f"runs/flow/{name}")
    assert any(tag.startswith("val/samples/") for tag in events.Tags()["images"])
    losses = {tag for tag in events.Tags()["scalars"] if tag.startswith(("train/loss", "val/loss"))}
    assert losses == {f"{stage}/loss/{expert}".rstrip("/") for stage in ("train", "val")}
    if name.endswith("_low"):
        return  # the noisy reward's recipe is the high expert's
    of = recipe.replace("5b_image", "5b")  # one recipe for both uses
    reward = [*configs("nrg/wan", f"nrg/{of}"), *FEW, "--model.shape={blocks: 1, pooling: attention}"]
    cli = experiment.run(["fit", *reward, *sets(folder, recipe)])
    run, _ = check_run(cli, "val/accuracy/VQ", ["blocks", "head"])
    guided_differs(run / "export", folder / recipe, image="image" in name)


def guided_differs(reward, generator, image):
    """Samples at strength 0 are the unguided ones, and others are not."""
    Path("prompts.csv").write_text(f"prompt{',image' * image}\na red circle{',a.png' * image}\n")
    Image.new("RGB", (70, 90), "red").save("a.png")
    size = flags(num_frames=9, height=64, width=64, fps=8, steps=3, device="cpu")
    videos = {}
    for out in ("plain", "0", "100"):
        steer = flags(strength=out, noisy_reward=reward) if out != "plain" else []
        main(["generate", *flags(generator=generator, prompts="prompts.csv", out=out), *size, *steer])
        (videos[out],) = ShardSet(out)
    assert videos["0"].members["mp4"] == videos["plain"].members["mp4"] != videos["100"].members["mp4"]


@pytest.mark.slow
def test_a_win_rate_runs_in_miniature(encoded, backbone, sampling, tmp_path, monkeypatch):
    """Videos are as large as the latents: the recipe names no size."""
    monkeypatch.chdir(tmp_path)
    network = VideoReward(backbone, "plain", sampling)
    network.statistics = type(network.statistics)([0.1] * 3, [2.0] * 3)
    network.save_pretrained(tmp_path / "judge")
    Path("prompts.txt").write_text("a red circle\n")
    recipe, model, held_out = ["flow/wan_sft", "flow/wan_dpo"], *sets(encoded, "wan")[::2]
    cli = experiment.run(["fit", *configs(*recipe), *FEW, *sets(encoded, "wan")])
    judge = ["--trainer.callbacks.reward_model=judge", "--trainer.callbacks.prompts=prompts.txt"]
    options = [*judge, model, held_out, f"--ckpt_path={cli.trainer.log_dir}/checkpoints/last.ckpt"]
    tested = experiment.run(["test", *configs(*recipe, "flow/win_rate"), *options])
    assert (Path(tested.trainer.log_dir) / "win_rate.json").is_file()
    win = next(callback for callback in tested.trainer.callbacks if type(callback).__name__ == "WinRate")
    assert (win.sampling.num_frames, win.sampling.height, win.sampling.width) == (9, 64, 64)


@pytest.mark.parametrize("name", ["wan", *slow(("ltx",), ("clean",))])
def test_every_noisy_reward_runs_in_miniature_and_guides(name, encoded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    family = "ltx" if name == "ltx" else "wan"
    recipe = configs(*(f"nrg/{c}" for c in dict.fromkeys(["wan", name])))
    shape = "--model.shape={blocks: 1, pooling: attention}"
    cli = experiment.run(["fit", *recipe, *FEW, shape, *sets(encoded, family)])
    run, _ = check_run(cli, "val/accuracy/VQ", ["blocks", "head"])
    model, _, held_out = sets(encoded, family)
    assert call("validate", *recipe, shape, model, held_out, f"--ckpt_path={run}/checkpoints/last.ckpt") == 0
    Path("prompts.txt").write_text("a red circle\n")
    size = flags(num_frames=9, height=64, width=64, fps=8, steps=4, device="cpu")

    def generate(out, *options):
        folders = flags(generator=encoded / family, prompts="prompts.txt", out=out)
        return ["generate", *folders, *size, *options]

    videos = {}
    for strength in ("0", "100"):
        main(generate(strength, "--weights=TA=1", *flags(strength=strength, noisy_reward=run / "export")))
        (videos[strength],) = ShardSet(strength)
    main(generate("plain"))
    (plain,) = ShardSet("plain")
    assert videos["0"].members["mp4"] == plain.members["mp4"] != videos["100"].members["mp4"]
    assert videos["100"].record()["guide"]["strength"] == 100


def test_reference_errors_train_without_a_second_forward(encoded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = sets(encoded, "wan")
    data = f"--data.data={encoded / 'wan_latents'}"
    experiment.run(["predict", *configs("reference/wan"), options[0], data, "--data.out=errors"])
    monkeypatch.setattr(FlowDPO, "as_reference", None)
    recipe = configs("flow/wan_sft", "flow/wan_dpo")
    quiet = ["--trainer.callbacks=[]", "--trainer.logger=false", "--trainer.limit_val_batches=0"]
    cli = experiment.run(["fit", *recipe, *FEW, *options[:2], "--data.reference=errors", *quiet])
    assert cli.trainer.global_step == 2


# --- the recipes' own schedule on small sets --------------------------------------------------------------------------

HERE = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto", "--trainer.precision=32-true"]


@pytest.mark.parametrize("names", [["flow/wan_sft", "flow/wan_dpo"], ["nrg/wan"]], ids=lambda n: n[-1])
def test_a_recipe_runs_with_its_own_schedule_on_fewer_pairs_than_a_step(names, encoded, tmp_path, monkeypatch):
    """Batches, accumulation, epochs and intervals are the recipe's; the set has eight pairs."""
    monkeypatch.chdir(tmp_path)
    small = ["--model.shape.blocks=1"] if names[0].startswith("nrg") else ["--trainer.callbacks=[]"]
    recipe = [f"--config={ROOT}/{name}.yaml" for name in names]
    with warnings.catch_warnings(record=True) as caught:
        cli = experiment.run(["fit", *recipe, *HERE, *small, *sets(encoded, "wan")])
    assert cli.trainer.global_step == cli.trainer.max_epochs
    assert "val/loss" in cli.trainer.logged_metrics
    assert not [w for w in caught if "never validate" in str(w.message)]
