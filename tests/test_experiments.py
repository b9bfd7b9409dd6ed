"""Every YAML is parsed; the command in its first line is one that exists; configuration behaves as documented.

`test_miniature_runs.py` runs every recipe.
"""

import importlib
import re
import shlex
from pathlib import Path

import lightning as L
import pytest
import torch

import videoalign.commands.lightning_cli as experiment
from videoalign.cli import main
from videoalign.commands.config_files import packaged

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
    assert Path(packaged("experiments/sprites/reward_btt.yaml")).exists()
    assert packaged("experiments/none.yaml") == "experiments/none.yaml"


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
