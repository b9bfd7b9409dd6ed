"""Shipped rewards: a reward model on frames, the noisy reward on latents, a function, the miniature world's judge."""

import inspect
import json
import sys

import jsonargparse
import numpy as np
import pytest
import torch

from compare_kit import PROMPTS
from generator_kit import noise_video
from helpers import CLIP, FEW_TOKENS, call, json_lines, randn
from videoalign import VideoAlignError
from videoalign.datamodules.contracts import ScoresVideos, missing
from videoalign.datamodules.encode_list import ClipSize
from videoalign.datamodules.video import decode
from videoalign.datamodules.video_scores import VideoRewardScores
from videoalign.miniature.networks.pipelines import make_generator
from videoalign.miniature.world.oracle import Oracle, OracleScores
from videoalign.miniature.world.sprites import SCENES, Flaws, render
from videoalign.models import VideoReward
from videoalign.models.function_scores import FunctionScores
from videoalign.models.generator_folder import load_generator
from videoalign.models.http_scores import HTTPScores
from videoalign.models.noisy_reward import NoisyReward, NoisyRewardShape
from videoalign.models.noisy_scores import NoisyRewardScores
from videoalign.models.scoring import rated_latents, scored

DIMENSIONS = ("VQ", "MQ", "TA")
SHIPPED = (VideoRewardScores, NoisyRewardScores, FunctionScores, HTTPScores, OracleScores)
TEXTS = ["a red circle moves left to right", "a blue square", "a yellow circle moves downwards, very slowly"]


@pytest.mark.parametrize("kind", SHIPPED)
def test_every_shipped_reward_fulfils_the_contract_and_explains_its_settings(kind):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=ScoresVideos)
    required = {name: "http://host" for name, p in inspect.signature(kind).parameters.items() if p.default is p.empty}
    required |= {"fps": 8.0} if "fps" in required else {}
    spec = {"class_path": f"{kind.__module__}.{kind.__name__}", "init_args": required}
    found = parser.instantiate(parser.parse_args(["--reward", json.dumps(spec)])).reward
    assert type(found) is kind and not missing(found, ScoresVideos)
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "x", fail_untyped=False)
    assert all((a.help or "").strip() for a in parser._actions if a.dest.startswith("x.") and ".help" not in a.dest)


# --- a reward model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Video files, and all of their frames."""
    folder = tmp_path_factory.mktemp("films")
    files = [folder / f"{number}.mp4" for number in range(3)]
    for number, file in enumerate(files):
        file.write_bytes(noise_video(number, frames=11, height=40, width=72))
    whole = ClipSize(num_frames=11, height=40, width=72)
    return files, torch.stack([decode(file, whole, 1) for file in files])


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("batch_size", [2, 8])
def test_rewards_are_those_of_the_same_frames_in_files(judge, films, raw, batch_size, capsys):
    files, frames = films
    given = [word for file, text in zip(files, TEXTS) for word in ("--video", file, "--prompt", text)]
    settings = ("--model", judge, "--batch-size", batch_size, "--device", "cpu", "--workers", 0)
    assert call("score", *given, *settings, *(["--raw"] if raw else [])) == 0
    want = json_lines(capsys)
    reward = VideoRewardScores(str(judge), fps=8.0, raw=raw, batch_size=batch_size)
    reward.check(TEXTS)
    found = scored({"judge": reward}, frames, None, TEXTS, list("abc"))
    for dimension in DIMENSIONS:
        assert found[f"judge/{dimension}"].tolist() == [line[dimension] for line in want]


def test_features_are_what_the_head_reads(judge, films):
    """Three videos in batches of two: rewards are the head's of the features, and rated_latents hands them on."""
    reward = VideoRewardScores(str(judge), fps=8.0, raw=True, batch_size=2)
    rated = rated_latents(
        {"judge": reward}, lambda x, names: films[1][x.long()], torch.arange(3), TEXTS, list("abc"), 3,
        torch.device("cpu"),
    )  # fmt: skip
    features = rated.features["judge"]
    assert features.shape[0] == 3 and torch.equal(features, reward.features)
    head = reward.network.head
    rewards = head(features.unflatten(1, (-1, head.weight.shape[1])))
    torch.testing.assert_close(rewards, torch.stack([rated.scores[f"judge/{d}"].float() for d in DIMENSIONS], 1))
    reward(films[1][:1], TEXTS[:1])
    assert reward.features.shape == features[:1].shape


def test_the_frame_rate_chooses_the_frames(judge, films):
    """A clip of twice the rate is half as long, and half as many of its frames are sampled."""
    _, frames = films
    rates = [VideoRewardScores(str(judge), fps=fps)(frames, TEXTS)["MQ"] for fps in (8.0, 16.0)]
    assert not torch.equal(*rates)


def test_a_reward_model_is_released_and_placed_again(judge, films):
    _, frames = films
    reward = VideoRewardScores(str(judge), fps=8.0)
    before = reward(frames, TEXTS)
    assert not any(p.requires_grad for p in reward.network.parameters()) and not reward.network.training
    reward.place(torch.device("meta"))
    assert {p.device.type for p in reward.network.parameters()} == {"meta"}
    elsewhere = VideoRewardScores(str(judge), fps=8.0, device="meta")  # its own device, not the run's
    elsewhere.place(torch.device("cpu"))
    assert {p.device.type for p in elsewhere.network.parameters()} == {"meta"}
    again = VideoRewardScores(str(judge), fps=8.0)
    again.place(torch.device("cpu"))
    again.check(TEXTS)
    again.place(None)
    assert torch.equal(again(frames, TEXTS)["VQ"], before["VQ"])


@pytest.mark.parametrize(
    ("videos", "prompts", "words"),
    [
        (torch.zeros(1, 4, 3, 32, 32), ["a"], "videos are torch.float32"),
        (torch.zeros(1, 3, 4, 32, 32, dtype=torch.uint8), ["a"], r"not uint8 \(B, T, 3, H, W\)"),
        (torch.zeros(1, 1, 3, 32, 32, dtype=torch.uint8), ["a"], "video 1: it has 1 frame"),
        (torch.zeros(1, 4, 3, 2, 500, dtype=torch.uint8), ["a"], "video 1: .*aspect ratio"),
    ],
)
def test_videos_that_the_model_cannot_see_are_refused(judge, videos, prompts, words):
    with pytest.raises(VideoAlignError, match=rf"reward judge \(reward model .*\) cannot rate first: .*{words}"):
        scored({"judge": VideoRewardScores(str(judge), fps=8.0)}, videos, None, prompts, ["first"])


def test_models_and_prompts_that_do_not_fit_are_refused_beforehand(backbone, sampling, judge, tmp_path):
    never = VideoReward(backbone, template="plain", sampling=sampling, language="full")
    never.save_pretrained(tmp_path / "never")
    with pytest.raises(VideoAlignError, match="has no statistics"):
        VideoRewardScores(str(tmp_path / "never"), fps=8.0).check([])
    VideoRewardScores(str(tmp_path / "never"), fps=8.0, raw=True).check([])
    with pytest.raises(VideoAlignError, match="more than 4096"):
        VideoRewardScores(str(judge), fps=8.0).check(["word " * 5000])
    shown = VideoReward(backbone, template="plain_image", sampling=sampling, language="full")
    shown.save_pretrained(tmp_path / "shown")
    with pytest.raises(VideoAlignError, match="is shown the image"):
        VideoRewardScores(str(tmp_path / "shown"), fps=8.0).check([])
    for wrong in ({"fps": 0.0}, {"fps": float("nan")}, {"fps": float("inf")}, {"batch_size": 0}):
        with pytest.raises(VideoAlignError, match=f"reward model .*: {next(iter(wrong))} must be"):
            VideoRewardScores(str(judge), **{"fps": 8.0, **wrong})
    with pytest.raises(VideoAlignError, match="device 'gpu7'"):
        VideoRewardScores(str(judge), fps=8.0, device="gpu7")
    with pytest.raises(VideoAlignError, match="device is cuda:99, and this machine has"):
        VideoRewardScores(str(judge), fps=8.0, device="cuda:99").check([])


# --- a noisy reward ---------------------------------------------------------------------------------------------------


def test_latents_are_rated_as_the_noisy_reward_does_at_time_0(world):
    generator = load_generator(world / "wan")
    network = NoisyReward.from_pretrained(world / "nrg", generator)
    latents = randn(3, *generator.latent_shape(9, 32, 32))
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    condition = generator.condition(generator.encode_prompts(prompts))
    want = network.normalise(network(latents, torch.zeros(3), condition))
    reward = NoisyRewardScores(str(world / "nrg"), str(world / "wan"), batch_size=2)
    reward.check(PROMPTS)
    found = scored({"own": reward}, None, latents, prompts, list("abc"))
    for number, dimension in enumerate(DIMENSIONS):
        torch.testing.assert_close(found[f"own/{dimension}"], want[:, number], rtol=1e-5, atol=1e-6)
    assert reward.network.generator.transformer is None  # of the generator only the copied blocks are kept
    reward.place(None)
    again = scored({"own": reward}, None, latents, prompts, list("abc"))
    assert all(torch.equal(again[name], found[name]) for name in found)
    raw = NoisyRewardScores(str(world / "nrg"), str(world / "wan"), raw=True)(latents, prompts)
    torch.testing.assert_close(raw["VQ"] * 2 - 0.2, found["own/VQ"], rtol=1e-4, atol=1e-4)  # mean 0.1, deviation 0.5


def test_prompts_are_embedded_once(world, monkeypatch):
    reward = NoisyRewardScores(str(world / "nrg"), str(world / "wan"), batch_size=1)
    embedded, encode = [], type(reward.network.generator).encode_prompts

    def counting(self, prompts, truncate=False):
        embedded.extend(prompts)
        return encode(self, prompts, truncate)

    monkeypatch.setattr(type(reward.network.generator), "encode_prompts", counting)
    reward.check([*PROMPTS, PROMPTS[0]])
    latents = randn(2, *reward.network.generator.latent_shape(5, 32, 32))
    reward(latents, [PROMPTS[0], "another one"])
    assert embedded == [*PROMPTS, "another one"]


def test_noisy_rewards_that_do_not_fit_are_refused(world, tmp_path):
    make_generator(tmp_path / "other", "wan", PROMPTS, hidden=48, layers=2, seed=1, max_tokens=FEW_TOKENS)
    with pytest.raises(VideoAlignError, match="belongs to another generator"):
        NoisyRewardScores(str(world / "nrg"), str(tmp_path / "other")).check([])
    never = NoisyReward(load_generator(world / "wan"), NoisyRewardShape(blocks=1, hidden=16))
    never.save_pretrained(tmp_path / "never")
    with pytest.raises(VideoAlignError, match="has no statistics"):
        NoisyRewardScores(str(tmp_path / "never"), str(world / "wan")).check([])
    with pytest.raises(VideoAlignError, match="batch_size"):
        NoisyRewardScores(str(world / "nrg"), str(world / "wan"), batch_size=0)
    reward = NoisyRewardScores(str(world / "nrg"), str(world / "wan"))
    with pytest.raises(VideoAlignError, match=r"own .* cannot rate a: latents of 3 channels"):
        scored({"own": reward}, None, randn(1, 3, 2, 4, 4), PROMPTS[:1], ["a"])


# --- a function -------------------------------------------------------------------------------------------------------

FUNCTIONS = """
import numpy as np

def light(videos, prompts, scale=1.0):
    return scale * videos.float().mean((1, 2, 3, 4))

def several(videos, prompts):
    return {"longest": [max(map(len, p.split())) for p in prompts], "array": np.ones(len(prompts), "int64")}

def nothing(videos, prompts):
    pass

def short(videos, prompts):
    return [1.0]

def odd(videos, prompts):
    return {"a": ["good", "bad"]}

constant = 3
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_rewards", None)


def by_function(name, **options):
    videos = torch.stack([torch.full((2, 3, 4, 4), shade, dtype=torch.uint8) for shade in (10, 30)])
    reward = FunctionScores(f"my_rewards:{name}", **options)
    reward.check([])
    return scored({"f": reward}, videos, videos.float() / 10, ["a bb ccc", "dddd"], ["x", "y"])


def test_a_function_is_a_reward(functions):
    assert by_function("light")["f/score"].tolist() == [10, 30]
    assert by_function("light", args={"scale": 0.5})["f/score"].tolist() == [5, 15]
    assert by_function("light", needs="latents")["f/score"].tolist() == [1, 3]
    found = by_function("several")
    assert found["f/longest"].tolist() == [3, 4] and found["f/array"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", "cannot rate x, y: score is no list of numbers"),
        ("short", r"torch.float32 \(1,\) under score for 2 samples"),
        ("odd", "cannot rate x, y: a is no list of numbers"),
        ("constant", "my_rewards:constant is a int, but must be a function"),
        ("absent", "my_rewards:absent cannot be imported"),
    ],
)
def test_functions_that_give_no_numbers_are_refused(functions, name, words):
    with pytest.raises(VideoAlignError, match=words):
        by_function(name)


# --- the miniature world's judge --------------------------------------------------------------------------------------


def test_the_oracle_is_a_reward(tmp_path):
    Oracle().save(tmp_path / "oracle.json")
    rng = np.random.default_rng(0)
    clips = np.stack([render(scene, Flaws(), rng) for scene in SCENES[:3]])
    prompts = [scene.prompt for scene in SCENES[:3]]
    reward = OracleScores(str(tmp_path / "oracle.json"))
    reward.check(prompts)
    found = scored({"true": reward}, torch.from_numpy(clips).permute(0, 1, 4, 2, 3), None, prompts, list("abc"))
    assert torch.equal(torch.stack([found[f"true/{d}"] for d in DIMENSIONS], 1), Oracle()(clips, prompts))
    with pytest.raises(VideoAlignError, match="none of the miniature world"):
        reward.check(["a real video"])
    with pytest.raises(VideoAlignError, match="the oracle judges"):
        scored({"true": reward}, torch.zeros(1, CLIP.num_frames, 3, 8, 8).byte(), None, prompts[:1], ["a"])
