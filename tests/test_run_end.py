"""The end of a run: what was measured, where it is, and commands that work as they are printed."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import CLIP, call, plain_clip
from videoalign.callbacks.parts_summary import short, summary
from videoalign.callbacks.reports import shown
from videoalign.commands import lightning_cli
from videoalign.commands.run_end import spent, tables
from videoalign.datamodules.shards import ShardWriter

ROOT = Path(lightning_cli.__file__).parents[1]
LABELS = [dict(zip(("VQ", "MQ", "TA"), row)) for row in (("A", "B", "same"), ("B", "A", "A"), ("A", "A", "B"))]
NOISE = r"FLOPs|eval mode|Epoch|Seed set|GPU available|TPU|Tip|/-2|stopped: `max|dirpath|Restoring|weights_only|[Ww]arn"


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Six rated pairs, and a benchmark of three videos."""
    folder = tmp_path_factory.mktemp("sets")
    with ShardWriter(folder / "pairs", "pairs") as writer:
        for i in range(6):
            clips = {"a": plain_clip(40 + i), "b": plain_clip(90 + i)}
            writer.write(f"{i}", clips, {"prompt": f"a red circle {i}", "labels": LABELS[i % 3]})
    with ShardWriter(folder / "rated", "videos") as writer:
        for i in range(3):
            writer.write(f"{i}", {"": plain_clip(40 + i)}, {"prompt": "a red circle"})
        rows = [{"key_A": "0", "key_B": "1", **LABELS[0]}, {"key_A": "1", "key_B": "2", **LABELS[1]}]
        writer.write_table("pairs.csv", rows)
    return folder


@pytest.fixture
def tiny(sets, backbone, tmp_path, monkeypatch):
    """Arguments of a fit that validates twice, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    pairs = sets / "pairs"
    return [
        "--config",
        "experiments/debug/tiny.yaml",
        *(f"--{key}={value}" for key, value in {
            "model.network.backbone": backbone, "data.train": pairs, "data.val": pairs, "data.workers": 0,
            "data.benchmarks": f"{{rated: {sets / 'rated'}}}", "trainer.max_steps": 4,
            "trainer.callbacks": "[ExportReward, videoalign.callbacks.Checkpoint]",
            "trainer.callbacks.every_n_train_steps": 2, "trainer.check_val_every_n_epoch": 1,
            "trainer.val_check_interval": 1.0,
            "trainer.num_sanity_val_steps": 1,
        }.items()),
    ]  # fmt: skip


def printed(capsys, *args, status=0):
    """What a command says, on standard output and standard error."""
    capsys.readouterr()
    ended, said = call(*args), capsys.readouterr()
    assert ended == status, said.err
    return said


def commands(out):
    """Commands of the block by what they are for."""
    found = re.findall(r"^([a-z ]+?)  +((?:videoalign|tensorboard|echo) .*)$", out, re.M)
    return {what: shlex.split(command) for what, command in found}


def test_fit_ends_with_numbers_places_and_commands_that_work(tiny, capsys, tmp_path):
    said = printed(capsys, "fit", *tiny)
    run = "runs/debug/tiny/version_0"
    assert re.search(
        r"^trained RewardModel: 4 steps \(1.33 epochs\) in \d+ s; last train/loss \d+\.\d{3}$", said.out, re.M
    )
    assert re.search(r"^measured at step 3$", said.out, re.M)
    assert re.search(r"^ +VQ +MQ +TA\nval/accuracy +\d\.\d{3} ", said.out, re.M)
    for name, path in {
        "last checkpoint": f"{run}/checkpoints/last.ckpt",
        "export": f"{run}/export",
        "logs": run,
    }.items():
        assert re.search(rf"^{name} +{re.escape(path)}$", said.out, re.M), said.out
        assert Path(path).exists()
    assert re.search(r"^part +class +parameters +trained +dtype\n.*backbone +Qwen2VLModel", said.err)
    assert "on cpu, precision 32-true" in said.err and re.search(r"^step: 4/4", said.err, re.M)
    found = commands(said.out)
    assert found["look at curves"] == ["tensorboard", "--logdir", "runs/debug/tiny"]
    again = printed(capsys, *found["measure again"][1:])
    assert re.search(rf"^tested RewardModel at {run}/checkpoints/last.ckpt in ", again.out, re.M)
    assert re.search(r"^ +VQ +MQ +TA\ntest/accuracy +\d\.\d{3} ", again.out, re.M)
    assert "Test metric" not in again.out, "one table is enough"
    bench = printed(capsys, *found["benchmark it"][1:])
    assert "saved in" in bench.out and Path("runs/bench/rated.json").exists()


def test_two_validations_name_the_lowest_loss_and_a_monitor_its_best_checkpoint(tiny, capsys):
    tiny += [
        "--trainer.max_steps=6",
        "--trainer.callbacks.monitor=val/loss",
        "--trainer.callbacks.every_n_train_steps=null",
    ]
    said = printed(capsys, "fit", *tiny, "--trainer.callbacks.save_top_k=1")
    losses = re.search(r"^measured at step 6; the lowest val/loss was (\d\.\d{3}) at step [36]$", said.out, re.M)
    best = re.search(r"^best checkpoint +(\S+) +\(val/loss (\d\.\d+)\)$", said.out, re.M)
    assert float(best[2]) == pytest.approx(float(losses[1]), abs=6e-4)
    assert Path(best[1]).exists() and best[1] in commands(said.out)["measure again"]


def test_a_run_that_keeps_nothing_says_so(tiny, capsys, tmp_path):
    options = ["--trainer.callbacks=[]", "--trainer.logger=false", "--trainer.enable_checkpointing=false"]
    options += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    said = printed(capsys, "fit", *tiny[:9], "--trainer.max_steps=1", *options)
    assert re.search(r"^checkpoints +none were written$", said.out, re.M)
    assert not commands(said.out) and not said.err
    assert not list(tmp_path.iterdir())


STOP = """
import os, signal
import lightning as L

class Stop(L.Callback):
    def on_train_batch_end(self, trainer, *rest):
        if trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_stopped_run_shows_what_it_has_and_last_goes_on(tiny, capsys, tmp_path, monkeypatch):
    (tmp_path / "stopping_callback.py").write_text(STOP)
    monkeypatch.syspath_prepend(tmp_path)
    at_first = printed(capsys, "fit", *tiny, "--trainer.max_steps=1", "--trainer.logger.name=other", "--ckpt_path=last")
    assert "no checkpoint in runs/debug/other yet: the run starts from its beginning" in at_first.err
    tiny += ["--trainer.max_steps=6", "--ckpt_path=last"]
    said = printed(capsys, "fit", *tiny, "--trainer.callbacks+=stopping_callback.Stop", status=143)
    assert re.search(r"^unfinished training of RewardModel: 4 steps", said.out, re.M) and "val/accuracy" in said.out
    assert not commands(said.out), "the message says how to go on"
    kept = "runs/debug/tiny/version_0/checkpoints/stopped-step=4.ckpt"
    assert said.err.count(f"--ckpt_path {kept} goes on") == 1
    said = printed(capsys, "fit", *tiny)
    assert re.search(r"^trained RewardModel: 6 steps, 4 of them before \(2 epochs\)", said.out, re.M)
    measured = printed(capsys, "validate", *tiny)
    assert "validated RewardModel at runs/debug/tiny/version_1/checkpoints/last.ckpt" in measured.out
    assert call("validate", *tiny, "--trainer.logger.version=mine") == 2, (
        "a run of a given name has its own checkpoints"
    )
    assert "there is no checkpoint in runs/debug/tiny yet" in capsys.readouterr().err
    assert call("validate", *tiny, "--ckpt_path=best") == 2
    assert "--ckpt_path best is known only while a run lasts" in capsys.readouterr().err


def test_an_early_stop_says_why(tiny, capsys):
    callbacks = "[{class_path: EarlyStopping, init_args: {monitor: val/loss, divergence_threshold: 0.0}}]"
    said = printed(capsys, "fit", *tiny, "--trainer.max_steps=9", f"--trainer.callbacks={callbacks}")
    assert re.search(r"^ended early: .*val/loss", said.out, re.M) and ": 3 steps" in said.out


LAPTOP = ["--config", "experiments/miniature.yaml"]
RECIPES = {"flow/wan_sft": ("--lora", []), "nrg/wan": ("--noisy-reward", ["--model.shape.blocks=1"])}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_tuned_generator_is_sampled_by_the_command_that_is_shown(recipe, tmp_path, monkeypatch, capsys, folders):
    monkeypatch.chdir(tmp_path)
    with ShardWriter("videos", "pairs") as writer:
        for i in range(3):
            clips = {side: plain_clip(40 + i, CLIP.num_frames, 64, 64) for side in "ab"}
            rewards = {"A": {"VQ": i, "MQ": 1.0, "TA": 2.0}, "B": {"VQ": -1.0, "MQ": 0.0, "TA": 0.0}}
            writer.write(f"{i}", clips, {"prompt": "a red circle", "labels": LABELS[i], "rewards": rewards})
    generator = f"--model.generator={folders['wan']}"
    clip = f"--data.clip={{num_frames: {CLIP.num_frames}, height: 64, width: 64}}"
    options = [*LAPTOP, generator, clip, "--data.data=videos", "--data.out=latents"]
    encoded = printed(capsys, "predict", "--config", "experiments/encode/wan.yaml", *options)
    assert re.search(r"^predicted with EncodeLatents in \d+ s$", encoded.out, re.M)
    assert re.search(r"^set +latents$", encoded.out, re.M)
    assert call(*commands(encoded.out)["describe it"][1:]) == 0
    option, more = RECIPES[recipe]
    options = [generator, "--data.train=latents", "--data.val=latents", "--trainer.max_steps=2", *more]
    callbacks = "--trainer.callbacks=[ExportReward, videoalign.callbacks.Checkpoint]"
    options.append(callbacks if more else callbacks.replace("ExportReward", "ExportGenerator"))
    said = printed(capsys, "fit", "--config", f"experiments/{recipe}.yaml", *LAPTOP, *options)
    printed(capsys, *commands(said.out)["measure again"][1:])
    echo, text, _, prompts, _, *sample = commands(said.out)["sample videos"]
    assert echo == "echo" and option in sample and sample[sample.index("--num-frames") + 1] == str(CLIP.num_frames)
    Path(prompts).write_text(text)
    printed(capsys, *sample[1:], "--steps", 2)
    assert Path(sample[sample.index("--out") + 1], "index.json").exists()


@pytest.mark.slow
def test_one_of_two_processes_speaks(tiny, tmp_path):
    options = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.callbacks=[ExportReward]"]
    done = subprocess.run(
        [sys.executable, "-m", "videoalign", "fit", *tiny[:8], *options, "--trainer.max_steps=2"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not re.search(NOISE, done.stdout + done.stderr), done.stdout + done.stderr
    assert done.stdout.count("trained RewardModel") == 1 and done.stderr.count("2 x cpu") == 1


# --- the pieces -------------------------------------------------------------------------------------------------------


def test_metrics_with_the_same_columns_are_one_table():
    values = {
        "val/loss": 1.23456,
        "val/a/VQ": 0.5,
        "val/a/TA": 0.25,
        "val/b/VQ": 1.0,
        "val/b/TA": 2.0,
        "bench/x/acc/VQ": 0.1,
    }
    assert tables(values) == (
        "val/loss 1.235\n\n          VQ     TA\nval/a  0.500  0.250\nval/b  1.000  2.000\n\n"
        "                VQ\nbench/x/acc  0.100"
    )
    many = tables({f"val/{i}/VQ": float(i) for i in range(20)})
    assert many.endswith("... and 6 more rows, which the logs hold") and "val/13" in many and "val/14" not in many


@pytest.mark.parametrize(
    "seconds, text", [(0.4, "0 s"), (59.6, "1 min 0 s"), (167, "2 min 47 s"), (11100, "3 h 5 min")]
)
def test_durations(seconds, text):
    assert spent(seconds) == text


@pytest.mark.parametrize(
    "number, text", [(0, "0"), (999, "999"), (1000, "1 K"), (371_200, "371 K"), (999_600, "1 M"), (2.21e9, "2.21 G")]
)
def test_counts(number, text):
    assert short(number) == text


def test_a_model_of_one_part_is_taken_apart():
    inner = torch.nn.ModuleDict({"body": torch.nn.Linear(3, 4), "head": torch.nn.Linear(4, 1).requires_grad_(False)})
    lines = [line.split() for line in summary(torch.nn.ModuleDict({"network": inner})).splitlines()]
    assert lines[1] == ["ModuleDict.body", "Linear", "16", "16", "float32"]
    assert lines[2] == ["ModuleDict.head", "Linear", "5", "-", "float32"]
    assert lines[3] == ["all", "ModuleDict", "21", "16", "float32"]


def test_paths_are_as_short_as_they_can_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shown(tmp_path / "a" / "b") == "a/b" and shown("a") == "a" and shown("/other") == "/other"
