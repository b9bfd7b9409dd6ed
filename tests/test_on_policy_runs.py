"""Every on-policy recipe behind `experiments/miniature_on_policy.yaml`: two iterations, export, going on."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import videoalign.commands.lightning_cli as experiment
from helpers import FEW_TOKENS
from videoalign.miniature.networks.pipelines import make_generator

ROOT = Path(experiment.__file__).parents[1] / "experiments"
RECIPES = {
    "wan_on_policy": ("OnlineDPO", ["rewards/margins", "rewards/accuracies"]),
    "wan_nft": ("DiffusionNFT", ["optimality", "drift", "kl"]),
    "wan_awm": ("AWM", ["ratio", "clipped", "kl", "kl_average"]),
    "wan_grpo": ("FlowGRPO", ["ratio", "clipped", "kl"]),
    "wan_grpo_mix": ("FlowGRPO", ["ratio", "clipped", "log_ratio/max"]),
    "wan_grpo_fast": ("FlowGRPO", ["ratio", "clipped", "log_ratio/max"]),
    "wan_grpo_guard": ("FlowGRPO", ["ratio", "clipped", "kl"]),
}
"""Class and metrics of each recipe."""


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generator") / "wan"
    make_generator(folder, "wan", hidden=48, layers=1, max_tokens=FEW_TOKENS)
    return folder


def arguments(name, generator, *more):
    chain = ["wan_on_policy", *(["wan_grpo"] if name.startswith("wan_grpo") else []), name]
    names = [*(f"flow/{part}" for part in dict.fromkeys(chain)), "miniature_on_policy"]
    Path("prompts.txt").write_text("a red circle\na blue square\nwaves at night\n")
    options = [f"--model.generator={generator}", "--data.prompts=prompts.txt"]
    return ["fit", *(f"--config={ROOT}/{part}.yaml" for part in names), *options, *more]


@pytest.mark.parametrize(
    "name", ["wan_nft", *(pytest.param(n, marks=pytest.mark.slow) for n in RECIPES if n != "wan_nft")]
)
def test_every_on_policy_recipe_takes_two_iterations(name, generator, tmp_path, monkeypatch, recwarn):
    monkeypatch.chdir(tmp_path)
    cli = experiment.run(arguments(name, generator))
    warned = [*recwarn]
    kind, metrics = RECIPES[name]
    module, run = cli.trainer.lightning_module, Path(cli.trainer.log_dir)
    assert type(module).__name__ == kind and run.is_relative_to(f"runs/flow/{name}")
    updates = 2 if name.startswith("wan_grpo") else 1
    assert module.updates == updates and cli.trainer.global_step == 2 * updates
    events = EventAccumulator(str(run), {"scalars": 0, "images": 1})
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {f"train/{metric}" for metric in ("loss", *metrics)} <= {*tags}
    logged = [event.value for event in events.Scalars("reward/judge/bright/mean")]
    assert len(logged) == 2 * updates
    assert (run / "export" / "pytorch_lora_weights.safetensors").exists()
    images = events.Tags()["images"]
    assert {tag.split()[0] for tag in images} >= {"samples/group", "val/samples/0", "val/samples/1"}
    assert (run / "samples.html").exists()
    assert not [str(w.message) for w in warned if "SideBySide" in str(w.message)]  # an iteration is its validation
    if name == "wan_nft":  # one more iteration from the last checkpoint
        last = run / "checkpoints" / "last.ckpt"
        held = torch.load(last, weights_only=True)["further_tensors"]["behaviour"]
        assert held.keys() == module.trained().keys()
        again = experiment.run(arguments(name, generator, f"--ckpt_path={last}", "--trainer.max_epochs=3"))
        assert again.trainer.global_step == 3 and again.trainer.lightning_module.rollout.iteration == 2


class Fading:
    """A held-out judge that likes each iteration's samples less than the last one's."""

    name, needs = "fading", "latents"

    def __init__(self):
        self.asked = 0

    def check(self, prompts: Sequence[str]) -> None:
        pass

    def __call__(self, videos: torch.Tensor, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        self.asked += 1
        return {"Overall": torch.full((len(videos),), -float(self.asked))}

    def place(self, device: torch.device | None) -> None:
        pass


def test_a_held_out_judge_stops_a_run_where_it_no_longer_rises(generator, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stop = "{class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {monitor: reward/held_out/Overall/mean, "
    stop += "mode: max, patience: 2, check_on_train_epoch_end: true}}"
    more = [
        f"--model.rewards.held_out={__name__}.Fading",
        f"--trainer.callbacks+={stop}",
        "--trainer.max_epochs=9",
    ]
    cli = experiment.run(arguments("wan_nft", generator, *more))
    # the first iteration is the best one, two more are waited for
    assert cli.trainer.current_epoch == cli.trainer.global_step == 3
    assert set(cli.trainer.lightning_module.rollout.scores) == {"judge/bright", "held_out/Overall"}


def test_the_page_on_hacking_shows_what_stops_a_run(generator, tmp_path, monkeypatch):
    """Its overlay, with a judge that falls in place of a reward model: a run of nine iterations ends after three."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT.parent / "docs/howto/on_policy.md").read_text()
    (block,) = [part for part in re.findall("```yaml\n(.*?)```", page, re.DOTALL) if "HeldOutPrompts" in part]
    overlay = yaml.safe_load(block)
    look, stop = (one["init_args"] for one in overlay["trainer"]["callbacks+"])
    look |= {"rewards": {"other": {"class_path": f"{__name__}.Fading"}}, "every": 1}
    look["sampling"]["steps"] = 2
    assert stop["monitor"] == "held_out/win_rate/other/MQ"
    stop |= {"monitor": "held_out/reward/policy/other/Overall", "patience": 2}
    (tmp_path / "held_out.txt").write_text("a green square\nsnow at dusk\n")
    (tmp_path / "held_out.yaml").write_text(yaml.safe_dump(overlay))
    cli = experiment.run(
        arguments("wan_nft", generator, f"--config={tmp_path / 'held_out.yaml'}", "--trainer.max_epochs=9")
    )
    assert cli.trainer.current_epoch == 3
    events = EventAccumulator(cli.trainer.log_dir)
    events.Reload()
    assert {"held_out/win_rate/other/Overall", "held_out/reward/reference/judge/bright", "held_out/drift"} <= {
        *events.Tags()["scalars"]
    }
