"""What the tests of `videoalign compare` share: a folder of models and prompts, and calls of the command."""

import json

import pytest
import torch
import yaml
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict

from helpers import FEW_TOKENS, call
from videoalign.datamodules.encode_list import ClipSize
from videoalign.datamodules.shards import ShardSet
from videoalign.datamodules.video import decode
from videoalign.miniature.networks.pipelines import make_generator
from videoalign.miniature.world.oracle import Oracle
from videoalign.miniature.world.sprites import SCENES
from videoalign.models import VideoReward
from videoalign.models.generator import Generator
from videoalign.models.generator_folder import load_generator
from videoalign.models.noisy_reward import NoisyReward, NoisyRewardShape
from videoalign.models.video_reward import Statistics

DIMENSIONS = ("VQ", "MQ", "TA")
PROMPTS = [content.prompt for content in SCENES[:2]]
SAMPLES = 2


@pytest.fixture(scope="session")
def world(tmp_path_factory, backbone, sampling):
    """Folder of a generator, adapters, a noisy reward, a reward model, an oracle and prompts. Read only."""
    folder = tmp_path_factory.mktemp("world")
    make_generator(folder / "wan", "wan", PROMPTS, hidden=48, layers=2, max_tokens=FEW_TOKENS)
    generator = load_generator(folder / "wan")
    torch.manual_seed(0)
    reward = NoisyReward(generator, NoisyRewardShape(blocks=2, hidden=16))
    reward.statistics = Statistics([0.1, -0.2, 0.3], [0.5, 0.25, 2.0])
    reward.save_pretrained(folder / "nrg")
    reward.statistics = Statistics([5.1, 4.8, 5.3], [0.5, 0.25, 2.0])  # the same gradient from another zero
    reward.save_pretrained(folder / "moved")
    judge = VideoReward(backbone, template="plain", sampling=sampling, language="full")
    judge.statistics = Statistics([1.0, 2.0, 3.0], [0.5, 2.0, 0.25])
    judge.save_pretrained(folder / "judge")
    Oracle().save(folder / "oracle.json")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    transformer = generator.transformer
    transformer.add_adapter(
        LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    )
    type(generator.pipeline).save_lora_weights(
        folder / "lora",
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        **_collate_lora_metadata({"transformer": transformer}),
    )
    return folder


SHORT = {"num_frames": 9, "height": 32, "width": 32, "fps": 8, "steps": 3, "batch_size": 2, "seed": 4}


def generation(world, out):
    """Options of `videoalign generate` with the settings of a comparison."""
    folders = {"generator": world / "wan", "prompts": world / "prompts.txt", "out": out}
    return {**folders, "samples": SAMPLES, "device": "cpu", **SHORT}


def settings(world, out, reward_model="judge", oracle="oracle.json", **changes):
    judges = {}
    if oracle:
        init = {"calibration": world / oracle}
        judges["oracle"] = {"class_path": "videoalign.miniature.world.oracle.OracleJudge", "init_args": init}
    if reward_model:
        init = {"model": world / reward_model, "batch_size": 2, "workers": 0, "device": "cpu"}
        judges["reward model"] = {"class_path": "videoalign.commands.reward_judge.RewardJudge", "init_args": init}
    return {
        "generator": world / "wan",
        "prompts": world / "prompts.txt",
        "out": out,
        "samples": SAMPLES,
        "sampling": SHORT,
        "judges": judges,
        "device": "cpu",
        **changes,
    }


def compare(path, config, *options):
    """Exit status of the command with a YAML file."""
    path.write_text(yaml.safe_dump(json.loads(json.dumps(config, default=str)), sort_keys=False))
    return call("compare", "--config", path, *options)


def counted(monkeypatch, most=10**9):
    """Number of videos in each call of a generator's sampling, which fails after ``most`` calls."""
    sizes, original = [], Generator.sample

    def sample(self, condition, noise, *args, **kwargs):
        if len(sizes) == most:
            raise RuntimeError("interrupted here")
        sizes.append(len(noise))
        return original(self, condition, noise, *args, **kwargs)

    monkeypatch.setattr(Generator, "sample", sample)
    return sizes


def tree(folder):
    """Every file's content; for the files of videos also when they were written."""
    return {
        str(p.relative_to(folder)): (
            p.read_bytes(),
            p.stat().st_mtime_ns * (p.suffix == ".tar" or p.name == "index.json"),
        )
        for p in folder.rglob("*")
        if p.is_file()
    }


def videos(folder):
    return {content.key: content.read("mp4") for content in ShardSet(folder).contents()}


def records(folder):
    return {content.key: content.record for content in ShardSet(folder).contents()}


def frames(video):
    return decode(video, ClipSize(num_frames=9, height=32, width=32), 1)
