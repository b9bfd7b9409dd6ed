"""Every place that takes a folder takes its name on the hub, and gives the same."""

import json
import time
from pathlib import Path

import pytest
import torch

import import_kit
from helpers import call, flags, json_lines
from hub_kit import forget, point_at
from official_kit import values
from test_hub import closed_port
from videoalign.datamodules.shards import ShardSet
from videoalign.models import VideoReward, load_reward
from videoalign.models.adapters import load_adapters
from videoalign.models.generator_folder import load_generator
from videoalign.models.noisy_reward import NoisyReward, NoisyRewardShape


def fetched(hub) -> set[str]:
    """Files whose content was asked for."""
    return {line.split("/resolve/")[1].partition("/")[2] for line in hub.asked("HEAD") if "/resolve/" in line}


# --- reward models --------------------------------------------------------------------------------------------------


def test_an_official_model_with_its_latest_checkpoint_alone(reached, official_kit, backbone, tmp_path, capsys):
    kit = official_kit
    assert call(*kit.score(kit.folder / "whole", *kit.text)) == 0
    want = values(json_lines(capsys))
    config = json.loads((kit.folder / "whole" / "model_config.json").read_text())
    config["model_config"]["model_name_or_path"] = "ORG/backbone"
    weights = (kit.folder / "whole" / "checkpoint-7" / "model.pth").read_bytes()
    files = {
        "model_config.json": json.dumps(config).encode(),
        "checkpoint-7/model.pth": weights,
        "checkpoint-7/optimizer.pt": b"o" * 100_000,
        "checkpoint-3/model.pth": b"no weights",
        "README.md": b"official",
    }
    reached.add("ORG/official", files)
    reached.add("ORG/backbone", backbone)
    assert call(*kit.score("ORG/official", *kit.text)) == 0
    assert torch.equal(values(json_lines(capsys)), want)
    assert {"checkpoint-7/model.pth", "model_config.json"} <= fetched(reached)
    assert not fetched(reached) & {"checkpoint-7/optimizer.pt", "checkpoint-3/model.pth", "README.md"}
    assert call(*kit.score("ORG/official", *kit.text, "--checkpoint-step", 5)) == 2
    assert "has no checkpoint-5; there are: 3, 7" in capsys.readouterr().err
    assert call("convert", "--from", "ORG/official@main", *kit.text, "--out", tmp_path / "own") == 0
    record = json.loads((tmp_path / "own" / "reward.json").read_text())
    assert record["backbone"] == "ORG/backbone"
    assert record["backbone_revision"] == reached.repos["model", "ORG/backbone"].branches["main"]


def test_a_benchmark_names_the_model_and_its_commit(reached, kit, tmp_path):
    commit = reached.add("ORG/reward", kit / "model")
    given = flags(model="ORG/reward", data=kit / "world", out=tmp_path / "out", device="cpu", workers=0)
    assert call("bench", *given) == 0
    found = json.loads((tmp_path / "out" / "world.json").read_text())
    assert (found["model"], found["model_revision"]) == ("ORG/reward", commit)
    assert (
        call("shards", "encode-frames", kit / "world", *flags(out=tmp_path / "f", model="ORG/reward", workers=1)) == 0
    )
    assert ShardSet(tmp_path / "f").index.media == "safetensors"


def test_a_backbone_by_its_name_is_recorded_by_its_name(reached, backbone, sampling, tmp_path):
    first = reached.add("ORG/backbone", backbone)
    reached.repos["model", "ORG/backbone"].branches["v1"] = first
    network = VideoReward("ORG/backbone@v1", template="plain", sampling=sampling)
    assert (network.backbone_name, network.backbone_revision) == ("ORG/backbone@v1", first)
    network.save_pretrained(tmp_path / "a")
    again = load_reward(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a" / "reward.json").read_text() == (tmp_path / "b" / "reward.json").read_text()
    assert load_reward(tmp_path / "a", backbone=backbone).backbone_revision is None


def test_without_a_network_the_command_to_type_comes_at_once(reached, kit, tmp_path, monkeypatch, capfd):
    point_at(closed_port(), tmp_path / "home", monkeypatch)
    begun = time.monotonic()
    (tmp_path / "v.mp4").write_bytes(b"never read")
    given = ("--video", tmp_path / "v.mp4", "--prompt", "p", "--device", "cpu", "--workers", 0)
    assert call("score", "--model", "ORG/reward@v2", *given) == 2
    said = capfd.readouterr().err
    assert "type: hf download ORG/reward --revision v2" in said and time.monotonic() - begun < 3
    forget()
    assert call("generate", "--generator", "ORG/wan", "--prompts", "p.txt", "--out", tmp_path / "o") == 2
    (tmp_path / "p.txt").write_text("a cat")
    assert call("generate", "--generator", "ORG/wan", "--prompts", tmp_path / "p.txt", "--out", tmp_path / "o") == 2
    assert "type: hf download ORG/wan --revision main" in capfd.readouterr().err and not (tmp_path / "o").exists()


# --- generators -----------------------------------------------------------------------------------------------------


def test_a_generator_is_fetched_by_parts(reached, generators):
    files = {
        p.relative_to(generators / "wan").as_posix(): p.read_bytes()
        for p in (generators / "wan").rglob("*")
        if p.is_file()
    }
    other = {
        "transformer/diffusion_pytorch_model.fp16.safetensors": b"half",
        "wan.safetensors": b"all in one",
        "a.png": b"",
    }
    reached.add("ORG/wan", files | other)
    found = load_generator("ORG/wan", parts=("vae",))
    others = {name for name in fetched(reached) if name.startswith(("transformer/", "text_encoder/"))}
    assert others == {"transformer/config.json"}  # its settings are needed in any case
    assert found.identity() == load_generator(generators / "wan", parts=("vae",)).identity()
    load_generator("hf://ORG/wan@main")
    assert not fetched(reached) & other.keys() and "text_encoder/config.json" in fetched(reached)
    reached.add("ORG/moved", {f"inner/{name}": content for name, content in files.items()})
    assert load_generator("hf://ORG/moved/inner", parts=("vae",)).identity() == found.identity()


def test_another_pipeline_is_refused_before_its_weights_follow(reached):
    files = {
        "model_index.json": b'{"_class_name": "FluxPipeline"}',
        "vae/config.json": b"{}",
        "scheduler/x.json": b"{}",
    }
    reached.add("ORG/flux", files)
    with pytest.raises(Exception, match="generator family 'FluxPipeline' is not one of"):
        load_generator("ORG/flux")
    assert fetched(reached) == {"model_index.json"}


def test_a_noisy_reward_and_adapters_by_name(reached, generators, tmp_path):
    generator = load_generator(generators / "wan")
    reward = NoisyReward(generator, NoisyRewardShape(blocks=1, hidden=16))
    reward.save_pretrained(tmp_path / "noisy")
    reached.add("ORG/noisy", tmp_path / "noisy")
    found = NoisyReward.from_pretrained("ORG/noisy", generator)
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), reward.state_dict().values()))
    layer = next(n for n, m in generator.transformer.named_modules() if n.endswith("attn1.to_q"))
    size = generator.transformer.get_submodule(layer).in_features
    tensors = {
        f"transformer.{layer}.lora_{s}.weight": torch.randn(*shape) for s, shape in (("A", (2, size)), ("B", (size, 2)))
    }
    from safetensors.torch import save

    reached.add(
        "ORG/lora", {"sub/my.safetensors": save(tensors), "other.safetensors": b"", "sub/deep/x.safetensors": b""}
    )
    load_adapters(generator, "hf://ORG/lora/sub")
    load_adapters(load_generator(generators / "wan", parts=("transformer",)), "hf://ORG/lora@main/sub/my.safetensors")
    assert fetched(reached) >= {"sub/my.safetensors"} and not fetched(reached) & {
        "other.safetensors",
        "sub/deep/x.safetensors",
    }


# --- benchmarks -----------------------------------------------------------------------------------------------------


def test_benchmarks_are_imported_from_the_hub(reached, place):
    import_kit.write_csv(place)
    place.videos("src/videos")
    reached.add("ORG/vgrb", Path("src"), "dataset")
    for out, source in (("one", "hf://datasets/ORG/vgrb"), ("two", "ORG/vgrb")):
        assert call("shards", "import-videogen-rewardbench", source, "--out", out) == 0
        import_kit.check_rated(out)
    rows = import_kit.ballot(import_kit.content_and_path)
    files = {
        "video_generation/test-00000-of-00001.parquet": import_kit.parquet(rows),
        "image_generation/test-00000-of-00001.parquet": b"pictures, and many of them",
    }
    reached.add("ORG/genai", files, "dataset")
    assert call("shards", "import-genai-bench", "hf://datasets/ORG/genai", "--out", "genai") == 0
    import_kit.check_voted("genai")
    assert not [name for name in fetched(reached) if name.startswith("image")]
    assert call("shards", "import-genai-bench", "hf://datasets/ORG/none", "--out", "genai") == 2
