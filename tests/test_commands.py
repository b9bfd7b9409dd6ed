"""The commands that a practitioner calls, on real files: import, check, train, export, score, benchmark."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from helpers import call, flags, json_lines
from videoalign import models
from videoalign.datamodules.video import decode, encode
from videoalign.models import VideoReward


@pytest.fixture(scope="module")
def project(tmp_path_factory, backbone):
    """A CSV of rated pairs with its videos, imported, and a reward model trained on it for some steps."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "videos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        (folder / "videos" / f"{i}.mp4").write_bytes(encode(rng.integers(0, 255, (9, 48, 64, 3), dtype=np.uint8), 8))
    with open(folder / "ratings.csv", "w", newline="") as file:
        writer = csv.writer(file)
        scores = [f"MOS_{side}_{d}" for side in "AB" for d in ("VQ", "MQ", "TA")]
        writer.writerow(["path_A", "path_B", "prompt", "VQ", "MQ", "TA", "Overall", "A_model", "B_model", *scores])
        for i, labels in enumerate(["A,B,same,A", "B,invalid,A,", "same,A,B,same", "A,A,,B"]):
            paths = [f"videos/{i}.mp4", f"./videos/{i + 2}.mp4"]
            models = ("old", "new") if i < 2 else ("new", "old")  # videos 2 and 3 were B before
            writer.writerow([*paths, f"prompt {i}", *labels.split(","), *models, *[1 + i % 4] * 6])
    for name, kind in (("pairs", "pairs"), ("bench", "videos")):
        options = flags(videos=folder, out=folder / name, kind=kind, workers=1)
        assert call("shards", "import-csv", folder / "ratings.csv", *options) == 0
    config = yaml.safe_load((Path(__file__).parents[1] / "experiments/debug/tiny.yaml").read_text())
    config["trainer"] |= {"max_steps": 2, "default_root_dir": str(folder), "enable_progress_bar": False}
    config["trainer"]["logger"]["init_args"]["save_dir"] = str(folder / "runs")
    config["model"]["init_args"]["network"]["init_args"]["backbone"] = str(backbone)
    config["data"]["init_args"] |= {"train": str(folder / "pairs"), "val": str(folder / "pairs"), "workers": 0}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    assert call("fit", "--config", folder / "tiny.yaml") == 0
    return folder


@pytest.fixture
def model(project):
    return project / "runs" / "tiny" / "version_0" / "export"


def test_import_keeps_ratings_scores_and_sources(project, capsys):
    assert call("shards", "verify", project / "pairs") == 0 and call("shards", "verify", project / "bench") == 0
    capsys.readouterr()
    assert call("shards", "info", project / "bench") == 0
    printed = capsys.readouterr().out
    assert "6 videos" not in printed  # a video rated for two prompts is scored for each
    assert "8 videos" in printed
    assert "4 rated pairs" in printed
    assert "Overall" in printed
    from videoalign.datamodules.shards import ShardSet

    records = [raw.record() for raw in sorted(ShardSet(project / "pairs"), key=lambda raw: raw.key)]
    assert [r["labels"]["VQ"] for r in records] == ["A", "B", "same", "A"]
    assert records[2]["scores"] == {s: dict.fromkeys(("VQ", "MQ", "TA"), 3.0) for s in "AB"}
    assert records[0]["sources"] == {"A": "old", "B": "new"} and records[0]["num_frames"] == {"A": 9, "B": 9}


def test_score_is_the_network_on_the_frames(project, model, capsys):
    videos = [project / "videos" / f"{i}.mp4" for i in range(3)]
    arguments = [a for i, v in enumerate(videos) for a in ("--video", v, "--prompt", f"prompt {i}")]
    assert call("score", "--model", model, *arguments, "--raw", "--device", "cpu", "--workers", 0) == 0
    raw = json_lines(capsys)
    assert call("score", "--model", model, *arguments, "--device", "cpu", "--batch-size", 1, "--workers", 0) == 0
    normal = json_lines(capsys)
    network = VideoReward.from_pretrained(model)
    for i, (video, r, n) in enumerate(zip(videos, raw, normal)):
        frames = decode(video, network.processor.sampling, network.processor.factor)
        with torch.no_grad():
            want = network(**network.processor([frames], [f"prompt {i}"]))
        assert [r[d] for d in ("VQ", "MQ", "TA")] == pytest.approx(want[0].tolist(), abs=1e-5)
        assert [n[d] for d in ("VQ", "MQ", "TA")] == pytest.approx(network.normalise(want)[0].tolist(), abs=1e-4)
        assert r["video"] == str(video) and r["prompt"] == f"prompt {i}"
        assert n["Overall"] == pytest.approx(n["VQ"] + n["MQ"] + n["TA"])


def test_score_reads_a_list_and_reports_what_it_cannot_read(project, model, tmp_path, capsys):
    (tmp_path / "broken.mp4").write_bytes((project / "videos" / "0.mp4").read_bytes()[:300])
    (tmp_path / "good.mp4").write_bytes((project / "videos" / "0.mp4").read_bytes())
    (tmp_path / "list.csv").write_text("path,prompt\nbroken.mp4,a\ngood.mp4,b\n")
    assert call("score", "--model", model, "--csv", tmp_path / "list.csv", "--device", "cpu", "--workers", 0) == 1
    captured = capsys.readouterr()
    assert [json.loads(x)["prompt"] for x in captured.out.splitlines() if x.startswith("{")] == ["b"]
    assert "broken.mp4" in captured.err


def test_bench_prints_and_saves(project, model, tmp_path, capsys):
    assert call("bench", *flags(model=model, data=project / "bench", out=tmp_path, device="cpu", workers=0)) == 0
    assert "tie floor" in capsys.readouterr().out
    saved = json.loads((tmp_path / "bench.json").read_text())["accuracies"]
    assert saved["VQ"]["pairs"] == 4
    assert saved["VQ"]["decided"] == 3
    assert saved["TA"]["pairs"] == 3


def test_export_of_a_checkpoint_equals_the_export_at_the_end(project, model, tmp_path):
    checkpoint = model.parent / "checkpoints" / "last.ckpt"
    assert call("export", "--checkpoint", checkpoint, "--out", tmp_path / "again", "--with-backbone") == 0
    one, other = VideoReward.from_pretrained(model), VideoReward.from_pretrained(tmp_path / "again")
    for name, parameter in one.named_parameters():
        torch.testing.assert_close(other.get_parameter(name), parameter, rtol=0, atol=0, msg=name)


@pytest.mark.slow
def test_an_export_is_of_the_average_under_the_checkpoints_own_configuration(project, tmp_path, capsys):
    """A run that goes on in its folder leaves a second configuration there; its checkpoints are of that one."""
    config = yaml.safe_load((project / "tiny.yaml").read_text())
    config["trainer"]["logger"]["init_args"]["version"] = "averaged"
    config["trainer"]["callbacks"].append({"class_path": "videoalign.callbacks.EMA", "init_args": {"decay": 0.5}})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    run = project / "runs" / "tiny" / "averaged"
    assert call("fit", "--config", tmp_path / "c.yaml") == 0
    checkpoint = run / "checkpoints" / "last.ckpt"
    shutil.copytree(run / "export", tmp_path / "first")
    shutil.copy(checkpoint, run / "checkpoints" / "first.ckpt")
    config["trainer"]["max_steps"] = 3
    config["model"]["init_args"]["network"]["init_args"]["sampling"]["fps"] = 4.0
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    assert call("fit", "--config", tmp_path / "c.yaml", "--ckpt_path", checkpoint) == 0
    assert (run / "config-2.yaml").exists()
    assert f"--config {run / 'config-2.yaml'}" in capsys.readouterr().out
    for name, fps in (("first", 2.0), ("last", 4.0)):
        made = run / "checkpoints" / f"{name}.ckpt"
        assert call("export", "--checkpoint", made, "--out", tmp_path / f"of {name}", "--with-backbone") == 0
        assert "the average of the weights (EMA) is exported" in capsys.readouterr().err
        found = VideoReward.from_pretrained(tmp_path / f"of {name}")
        assert found.processor.sampling.fps == fps
        average = torch.load(made, weights_only=True)["callbacks"]["EMA"]["average"]
        for parameter, value in average.items():
            torch.testing.assert_close(found.get_parameter(parameter.removeprefix("network.")), value, rtol=0, atol=0)
    first = VideoReward.from_pretrained(tmp_path / "first")
    again = VideoReward.from_pretrained(tmp_path / "of first")
    assert first.statistics == again.statistics
    for name, parameter in first.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name


def test_frames_of_the_model_are_encoded_once(project, model, tmp_path):
    out = tmp_path / "frames"
    assert call("shards", "encode-frames", project / "pairs", "--out", out, "--model", model, "--workers", 1) == 0
    assert call("shards", "verify", out) == 0
    fit = (
        "fit",
        "--config",
        project / "tiny.yaml",
        "--trainer.logger",
        "false",
        "--trainer.callbacks",
        "[]",
        "--trainer.default_root_dir",
        tmp_path,
        "--trainer.enable_checkpointing",
        "false",
    )
    assert call(*fit, "--data.train", out, "--data.val", out) == 0
    assert call(*fit, "--data.train", out, "--data.val", out, "--model.network.sampling.max_pixels", 1024) == 2


def test_validate_and_test_need_no_training(project, capsys):
    for command, stage in (("validate", "val"), ("test", "test")):
        options = ["--config", project / "tiny.yaml", "--trainer.logger=false", "--trainer.callbacks=[]"]
        assert call(command, *options) == 0
        printed = capsys.readouterr().out
        assert re.search(rf"^ +VQ +MQ +TA +Overall\n{stage}/accuracy +0\.\d+ ", printed, re.M)


def test_broken_weights_are_refused_and_broken_rewards_reported(project, model, tmp_path, monkeypatch, capsys):
    video = ("--video", project / "videos" / "0.mp4", "--prompt", "p", "--device", "cpu", "--workers", 0)
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    tensors = load_file(copy / "trained.safetensors")
    save_file({**tensors, "head.weight": tensors["head.weight"] * torch.nan}, copy / "trained.safetensors")
    assert call("score", "--model", copy, *video) == 2
    assert "SHA-256" in capsys.readouterr().err
    record = json.loads((copy / "reward.json").read_text())
    (copy / "reward.json").write_text(json.dumps({k: v for k, v in record.items() if k != "sha256"}))
    assert call("score", "--model", copy, *video) == 2
    assert "NaN" in capsys.readouterr().err
    forward = VideoReward.forward
    monkeypatch.setattr(VideoReward, "forward", lambda self, **inputs: forward(self, **inputs) * torch.nan)
    assert call("score", "--model", model, *video) == 2
    captured = capsys.readouterr()
    assert "not finite" in captured.err
    assert "{" not in captured.out
    assert call("bench", *flags(model=model, data=project / "bench", out=tmp_path / "out", device="cpu")) == 2
    assert "not finite" in capsys.readouterr().err
    assert not (tmp_path / "out" / "bench.json").exists()
    assert not any(file.read_bytes() for file in (tmp_path / "out" / "bench").glob("rewards.*"))


def test_pairs_of_videos_that_are_not_there_are_refused(project, model, tmp_path, capsys):
    shutil.copytree(project / "bench", tmp_path / "bench")
    table = tmp_path / "bench" / "pairs.csv"
    table.write_text(table.read_text().replace("000000,", "999999,", 1))
    assert call("bench", *flags(model=model, data=tmp_path / "bench", out=tmp_path / "out", device="cpu")) == 2
    assert "1 of its pairs' videos are not in its shards, such as ['999999']" in capsys.readouterr().err


def test_export_does_not_overwrite_what_is_not_a_reward_model(model, tmp_path, capsys):
    checkpoint = model.parent / "checkpoints" / "last.ckpt"
    (tmp_path / "notes.txt").write_text("precious")
    assert call("export", "--checkpoint", checkpoint, "--out", tmp_path) == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "precious"


def test_an_output_in_the_way_is_refused_before_training(project, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("precious")
    export = f"[{{class_path: videoalign.callbacks.ExportReward, init_args: {{out: {tmp_path}}}}}]"
    fit = ("fit", "--config", project / "tiny.yaml", "--trainer.logger", "false", "--trainer.callbacks", export)
    assert call(*fit) == 2
    captured = capsys.readouterr()
    assert "exists already" in captured.err
    assert "stopped" not in captured.err


def test_commands_that_need_no_network_do_not_wait_for_one():
    """Annotation, checks and imports load neither transformers nor peft nor Lightning, which take seconds."""
    script = """
import sys
import videoalign.annotation.serving, videoalign.datamodules.import_benchmarks, videoalign.datamodules.verify
print(*{"transformers", "peft", "diffusers", "lightning"} & sys.modules.keys())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_names_of_models_are_there_when_asked_for():
    assert set(models._HOMES) == set(models.__all__)
    assert all(hasattr(models, name) for name in models.__all__)
    assert not hasattr(models, "Nothing")
