"""Every YAML is parsed; the command in its first line is one that exists; configuration behaves as documented."""

import importlib
import re
import shlex
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch

import videoalign.commands.lightning_cli as experiment
from helpers import flags
from videoalign.alignment import FlowDPO
from videoalign.cli import main
from videoalign.datamodules.shards import ShardSet, ShardWriter
from videoalign.datamodules.video import encode
from videoalign.miniature.networks.pipelines import make_generator
from videoalign.miniature.networks.qwen import make_qwen
from videoalign.models import VideoReward

ROOT = Path(experiment.__file__).parents[1]
EXPERIMENTS = sorted((ROOT / "experiments").rglob("*.yaml"))


def configuration(*args):
    """The merged configuration as `--print_config` gives it, without building anything."""
    with pytest.raises(SystemExit) as done:
        main([*args, "--print_config"])
    return done.value.code


def command_of(path):
    line = path.read_text().splitlines()[0]
    assert line.startswith("# videoalign "), f"{path}: the first line is not the command that runs it"
    words = shlex.split(line.removeprefix("# videoalign "))
    return [str(ROOT / w) if w.startswith("experiments/") else w for w in words]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: str(p.relative_to(ROOT / "experiments")))
def test_every_experiment_parses(path, capsys):
    command = command_of(path)
    assert f"experiments/{path.relative_to(ROOT / 'experiments')}" in path.read_text().splitlines()[0]
    assert configuration(*command) in (0, None)
    printed = capsys.readouterr().out
    if command[0] == "compare":
        assert "sampling:" in printed
        assert "sweeps:" in printed
    else:
        assert re.search(r"class_path: videoalign\.(alignment|miniature\.networks)\.", printed)
        assert re.search(r"class_path: videoalign\.(datamodules|miniature\.networks)\.", printed)


FAMILY = {"qwen2vl_2b": "qwen2_vl", "qwen2_5vl_3b": "qwen2_5_vl", "qwen3vl_2b": "qwen3_vl"}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Two rated pairs with scores."""
    clip = encode(np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3), np.uint8), 4)
    folder = tmp_path_factory.mktemp("rated") / "pairs"
    with ShardWriter(folder, "pairs") as writer:
        for key in "xy":
            writer.write(
                key,
                {"a": clip, "b": clip},
                {
                    "prompt": "a red circle",
                    "labels": {"VQ": "A", "MQ": "B", "TA": "same"},
                    "scores": {"A": {"VQ": 4, "MQ": 2, "TA": 3}, "B": {"VQ": 2, "MQ": 5, "TA": 3}},
                },
            )
    return folder


@pytest.fixture(scope="module", params=FAMILY)
def recipe(request, tmp_path_factory):
    """A recipe's name and a miniature folder of its architecture."""
    folder = tmp_path_factory.mktemp("miniature") / request.param
    make_qwen(folder, FAMILY[request.param], hidden=32, layers=1)
    return request.param, folder


@pytest.mark.parametrize("variant", [None, "bt", "reg", "shared"])
def test_every_recipe_takes_a_step_on_a_miniature_of_its_architecture(recipe, variant, pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, backbone = recipe
    configs = ["qwen2vl_2b", *([name] if name != "qwen2vl_2b" else []), *([variant] if variant else [])]
    cli = experiment.run(
        [
            "fit",
            *(f"--config={ROOT}/experiments/videoreward/{c}.yaml" for c in configs),
            f"--model.network.backbone={backbone}",
            f"--data.train={pairs}",
            "--data.workers=0",
            "--trainer.accelerator=cpu",
            "--trainer.devices=1",
            "--trainer.strategy=auto",
            "--trainer.precision=32-true",
            "--trainer.max_steps=1",
            "--trainer.accumulate_grad_batches=2",
        ]
    )
    model = cli.trainer.lightning_module
    assert cli.trainer.global_step == 1
    assert model.network.config.model_type == FAMILY[name]
    assert model.loss == {"bt": "bt", "reg": "reg"}.get(variant, "btt")
    assert model.network.processor.template.separate == (variant is None)
    assert Path(cli.trainer.log_dir).is_relative_to(f"runs/videoreward{f'_{variant}' if variant else ''}/{name}")
    again = VideoReward.from_pretrained(Path(cli.trainer.log_dir) / "export")
    trained = model.network.state_dict()
    assert all(torch.equal(again.state_dict()[n], trained[n]) for n in again.trained_names())


SMALL = """trainer:
  callbacks:
    - class_path: videoalign.callbacks.ExportGenerator
    - class_path: videoalign.callbacks.SideBySide
      init_args: {prompts: [a red circle], sampling: {num_frames: 9, height: 64, width: 64, fps: 8, steps: 2}}
"""
ALGORITHMS = {
    "wan_sft": ["wan_sft"],
    "wan_rwr": ["wan_sft", "wan_rwr"],
    "wan_dpo": ["wan_sft", "wan_dpo"],
    "wan_dpo_time": ["wan_sft", "wan_dpo_time"],
    "wan_dpo_ta": ["wan_sft", "wan_dpo", "wan_dpo_ta"],
    "wan_ipo": ["wan_sft", "wan_ipo"],
    "ltx_dpo": ["wan_sft", "wan_dpo", "ltx_dpo"],
}


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """Miniature generators, and latents of four judged pairs, written by the shipped experiments."""
    folder, rng = tmp_path_factory.mktemp("encoded"), np.random.default_rng(0)
    with ShardWriter(folder / "pairs", "pairs") as writer:
        for number in range(4):
            clips = {side: encode(rng.integers(0, 255, (9, 64, 64, 3), np.uint8), 8) for side in "ab"}
            rewards = {side: dict(zip(("VQ", "MQ", "TA"), rng.normal(size=3))) for side in "AB"}
            labels = {d: "A" if rewards["A"][d] > rewards["B"][d] else "B" for d in ("VQ", "MQ", "TA")}
            writer.write(
                f"{number}", clips, {"prompt": f"a red circle {number % 2}", "labels": labels, "rewards": rewards}
            )
    for family in ("wan", "ltx"):
        make_generator(folder / family, family, hidden=48, layers=1)
        experiment.run(
            [
                "predict",
                f"--config={ROOT}/experiments/encode/{family}.yaml",
                f"--model.generator={folder / family}",
                f"--data.data={folder / 'pairs'}",
                f"--data.out={folder / f'{family}_latents'}",
                "--data.workers=0",
                "--model.dtype=float32",
                "--data.clip.num_frames=9",
                "--data.clip.height=64",
                "--data.clip.width=64",
                "--data.clip.fps=8",
                "--trainer.accelerator=cpu",
                "--trainer.devices=1",
                "--trainer.strategy=auto",
            ]
        )
    return folder


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_takes_two_steps_on_a_miniature_pipeline(name, encoded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    family = name.split("_")[0]
    Path("small.yaml").write_text(SMALL)
    cli = experiment.run(
        [
            "fit",
            *(f"--config={ROOT}/experiments/flow/{c}.yaml" for c in ALGORITHMS[name]),
            "--config=small.yaml",
            f"--model.generator={encoded / family}",
            f"--data.train={encoded / f'{family}_latents'}",
            f"--data.val={encoded / f'{family}_latents'}",
            "--data.workers=0",
            "--trainer.accelerator=cpu",
            "--trainer.devices=1",
            "--trainer.strategy=auto",
            "--trainer.precision=32-true",
            "--trainer.accumulate_grad_batches=2",
            "--trainer.max_steps=2",
            "--trainer.val_check_interval=1.0",
        ]
    )
    model, run = cli.trainer.lightning_module, Path(cli.trainer.log_dir)
    assert cli.trainer.global_step == 2
    assert run.is_relative_to(f"runs/flow/{name}")
    assert type(model).__name__ == f"Flow{name.split('_')[1].upper()}"
    assert (run / "export" / "pytorch_lora_weights.safetensors").exists()
    assert list((run / "samples").glob("*.gif"))


@pytest.mark.parametrize("name", ["wan", "ltx", "clean"])
def test_every_noisy_reward_takes_two_steps_and_guides(name, encoded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    family = "ltx" if name == "ltx" else "wan"
    latents = encoded / f"{family}_latents"
    cli = experiment.run(
        [
            "fit",
            *(f"--config={ROOT}/experiments/nrg/{c}.yaml" for c in dict.fromkeys(["wan", name])),
            f"--model.generator={encoded / family}",
            f"--data.train={latents}",
            f"--data.val={latents}",
            "--data.workers=0",
            "--trainer.accelerator=cpu",
            "--trainer.devices=1",
            "--trainer.strategy=auto",
            "--trainer.precision=32-true",
            "--trainer.accumulate_grad_batches=1",
            "--trainer.max_steps=2",
            "--model.shape={blocks: 1, pooling: attention}",
        ]
    )
    assert cli.trainer.global_step == 2
    assert {"val/accuracy/VQ", "val/accuracy_at_t/0.9/TA"} <= cli.trainer.logged_metrics.keys()
    Path("prompts.txt").write_text("a red circle\n")
    size = flags(num_frames=9, height=64, width=64, fps=8, steps=4, device="cpu")

    def generate(out, *options):
        folders = flags(generator=encoded / family, prompts="prompts.txt", out=out)
        return ["generate", *folders, *size, *options]

    videos = {}
    for strength in ("0", "100"):
        export = Path(cli.trainer.log_dir) / "export"
        main(generate(strength, "--weights=TA=1", *flags(strength=strength, noisy_reward=export)))
        (videos[strength],) = ShardSet(strength)
    main(generate("plain"))
    (plain,) = ShardSet("plain")
    assert videos["0"].members["mp4"] == plain.members["mp4"] != videos["100"].members["mp4"]
    assert videos["100"].record()["guide"]["strength"] == 100


@pytest.mark.parametrize("family", ["wan"])
def test_reference_errors_train_without_a_second_forward(family, encoded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    device = [
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--trainer.strategy=auto",
        "--trainer.precision=32-true",
    ]
    experiment.run(
        [
            "predict",
            f"--config={ROOT}/experiments/reference/{family}.yaml",
            f"--model.generator={encoded / family}",
            f"--data.data={encoded / f'{family}_latents'}",
            "--data.out=errors",
            "--data.workers=0",
            *device,
        ]
    )
    monkeypatch.setattr(FlowDPO, "as_reference", None)
    cli = experiment.run(
        [
            "fit",
            *(f"--config={ROOT}/experiments/flow/{c}.yaml" for c in ALGORITHMS[f"{family}_dpo"]),
            "--data.reference=errors",
            f"--model.generator={encoded / family}",
            f"--data.train={encoded / f'{family}_latents'}",
            "--data.workers=0",
            *device,
            "--trainer.max_steps=2",
            "--trainer.accumulate_grad_batches=1",
            "--trainer.callbacks=[]",
            "--trainer.logger=false",
        ]
    )
    assert cli.trainer.global_step == 2


def test_short_class_names_resolve(capsys):
    words = "--model RewardModel --model.network VideoReward --model.network.backbone x --data VideoPairs"
    assert configuration("fit", *words.split()) in (0, None)
    assert "class_path: videoalign.alignment.RewardModel" in capsys.readouterr().out


def test_later_values_win_and_interpolation_follows(tmp_path, capsys):
    first = tmp_path / "a.yaml"
    first.write_text(
        "data: {class_path: VideoPairs, init_args: {batch_size: 4, val_batch_size: '${data.init_args.batch_size}'}}\n"
    )
    assert configuration("fit", "--config", str(first), "--data.batch_size", "6") in (0, None)
    printed = capsys.readouterr().out
    assert "batch_size: 6" in printed
    assert "val_batch_size: 6" in printed


def test_checkpoint_values_do_not_override_the_command_line():
    """Lightning would silently prefer a checkpoint's hyper-parameters; see ExperimentCLI._parse_ckpt_path."""
    assert experiment.ExperimentCLI._parse_ckpt_path is not L.pytorch.cli.LightningCLI._parse_ckpt_path
    assert hasattr(L.pytorch.cli.LightningCLI, "_parse_ckpt_path"), "the hook has another name now"


def test_packaged_experiments_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(experiment.packaged("experiments/sprites/reward_btt.yaml")).exists()
    assert experiment.packaged("experiments/none.yaml") == "experiments/none.yaml"


def test_the_algorithm_of_contributing_works_from_yaml(tmp_path, monkeypatch, capsys):
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (tmp_path / "margin.py").write_text(re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1))
    monkeypatch.syspath_prepend(tmp_path)
    words = "--model margin.MarginRewardModel --model.margin 0.25 --model.loss bt"
    network = "--model.network VideoReward --model.network.backbone x"
    assert configuration("fit", *words.split(), *network.split()) in (0, None)
    assert "margin: 0.25" in capsys.readouterr().out
    model = importlib.import_module("margin").MarginRewardModel.__new__(
        importlib.import_module("margin").MarginRewardModel
    )
    torch.nn.Module.__init__(model)
    model.margin = 0.25
    labels, rewards = torch.tensor([[1.0, -1.0, 0.0]]), torch.tensor([[[1.0, 0.0, 3.0]], [[0.0, 2.0, 0.0]]])
    want = -(torch.nn.functional.logsigmoid(torch.tensor([0.75, 1.75]))).mean()
    torch.testing.assert_close(model.pair_losses(rewards, labels, None).mean(), want)
