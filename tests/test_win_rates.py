"""Win rates of a policy over its reference."""

import json
import math
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

from generator_kit import COLUMNS, events, logger, noise_video, win_rate_config
from helpers import call
from videoalign.datamodules.encode_list import ClipSize
from videoalign.datamodules.prompts import read_prompts
from videoalign.datamodules.video import decode, resample
from videoalign.models import VideoReward
from videoalign.models.flow import draw_seed
from videoalign.models.frame_sampling import FrameSampling
from videoalign.models.generator_folder import load_generator
from videoalign.models.win_rates import half_rates, win_rates

# --- win rates ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 3), (4, 2), (3, 1), (1, 4)])
def test_win_rates_are_those_of_loops(shape):
    torch.manual_seed(sum(shape))
    policy, reference = torch.randint(0, 4, (2, *shape, 4)).float() / 2  # with ties
    found = win_rates(policy, reference, resamples=500)
    won = lambda a, b: 1.0 if a > b else 0.5 if a == b else 0.0  # noqa: E731
    for d, column in enumerate(COLUMNS):
        p, r, row = policy[..., d].tolist(), reference[..., d].tolist(), found[column]
        matched = [won(p[i][n], r[i][n]) for i in range(shape[0]) for n in range(shape[1])]
        apart = [won(p[i][n], r[i][m]) for i in range(shape[0]) for n, m in permutations(range(shape[1]), 2)]
        assert row["win_rate"] == pytest.approx(np.mean(matched)) and row["prompts"] == shape[0]
        assert row["policy"] == pytest.approx(np.mean(p)) and row["reference"] == pytest.approx(np.mean(r))
        if shape[1] > 1:
            assert row["superiority"] == pytest.approx(np.mean(apart))
        else:
            assert math.isnan(row["superiority"])
        for kind in ("win_rate", "superiority")[: 1 + (shape[1] > 1)]:
            low, high = row[f"{kind}_interval"]
            assert low - 1e-9 <= row[kind] <= high + 1e-9 if shape[0] > 1 else math.isnan(low) and math.isnan(high)


def test_a_small_shift_wins_with_the_same_noise_only():
    """Noise spreads by 1 and the policy is better by 0.01: superiority stays near chance, the win rate is 1."""
    torch.manual_seed(0)
    reference = torch.randn(40, 4, 4)
    row = win_rates(reference + 0.01, reference)["VQ"]
    assert row["win_rate"] == 1.0 and row["win_rate_interval"] == (1.0, 1.0)
    assert 0.5 <= row["superiority"] < 0.52
    assert row["superiority_interval"][1] < 0.52


def test_halves_of_the_noises_are_win_rates_of_their_own():
    torch.manual_seed(1)
    policy, reference = torch.randn(2, 3, 5, 4)
    for start, half in enumerate(half_rates(policy, reference)):
        own = win_rates(policy[:, start::2], reference[:, start::2])
        assert half == {c: {kind: own[c][kind] for kind in ("win_rate", "superiority")} for c in COLUMNS}
    assert half_rates(policy[:, :3], reference[:, :3]) == []  # a half of one noise has no other noise


def test_differences_of_halves_tell_the_noise_of_a_win_rate():
    """Their variance is four times that of the whole, over draws of the noise for the same prompts."""
    torch.manual_seed(2)
    shift = 0.4 * torch.randn(8, 1, 1)  # of the prompts
    whole, halves = [], []
    for _ in range(600):
        reference = torch.randn(8, 16, 4, dtype=torch.float64)
        policy = 0.5 * reference + shift + torch.randn(8, 16, 4, dtype=torch.float64)
        whole.append(win_rates(policy, reference, resamples=2)["VQ"]["superiority"])
        a, b = (half["VQ"]["superiority"] for half in half_rates(policy, reference))
        halves.append((a - b) ** 2 / 4)
    assert np.mean(halves) == pytest.approx(np.var(whole, ddof=1), rel=0.2)


def test_equal_rewards_win_half():
    rewards = torch.randn(3, 2, 4)
    for row in win_rates(rewards, rewards).values():
        assert row["win_rate"] == 0.5
        assert row["win_rate_interval"] == (0.5, 0.5)
        assert row["superiority"] == 0.5


def test_win_rate_of_an_untrained_policy_is_one_half(generators, latents, judge, prompts, tmp_path):
    config = win_rate_config(
        tmp_path / "w.yaml", generators / "wan", latents / "wan", judge, prompts, trainer={"logger": logger(tmp_path)}
    )
    assert call("test", "--config", config) == 0
    run = tmp_path / "run" / "version_0"
    saved = json.loads((run / "win_rate.json").read_text())
    assert saved["drift"] == 0
    assert saved["prompts"] == read_prompts(prompts)
    assert saved["samples"] == 2
    for row in saved["columns"].values():
        assert row["win_rate"] == 0.5
        assert row["win_rate_interval"] == [0.5, 0.5]
        assert row["policy"] == row["reference"]
        assert row["superiority"] == 0.5
    assert not tmp_path.joinpath("win_rate.json").exists()


def test_win_rates_end_to_end(won, trained, generators, judge, prompts):
    """Everything is computed again, a video at a time: noise by its seed, sampling, frames, rewards."""
    saved, network = json.loads((won.run / "win_rate.json").read_text()), VideoReward.from_pretrained(judge).eval()
    module, texts = trained["wan"].module.eval(), read_prompts(prompts)
    encoder = load_generator(generators / "wan", parts=("text_encoder",))
    shape, rewards, drifts = torch.Size((16, 2, 4, 4)), {"policy": [], "reference": []}, []
    null = module.generator.condition(encoder.encode_prompts([""]))
    for prompt in texts:
        condition = module.generator.condition(encoder.encode_prompts([prompt]))
        for number in range(2):
            source = torch.Generator().manual_seed(draw_seed(5, prompt, number))
            torch.rand((), generator=source)
            noise = torch.randn(1, *shape, generator=source)
            outputs = {"policy": module.generator.sample(condition, noise, 2, 2.0, null)}
            with module.generator.without_adapters():
                outputs["reference"] = module.generator.sample(condition, noise, 2, 2.0, null)
            for t in (0.125, 0.375, 0.625, 0.875):
                x, time = (1 - t) * outputs["reference"] + t * noise, torch.tensor([t])
                with torch.no_grad():
                    mine = module.generator.velocity(x, time, condition)
                    with module.generator.without_adapters():
                        drifts.append(float((mine - module.generator.velocity(x, time, condition)).square().mean()))
            for name, sample in outputs.items():
                frames = module.generator.decode(sample)[0]
                kept = frames[network.processor.sampling.indices(5, 8.0)]
                with torch.no_grad():
                    row = network.normalise(network(**network.processor([kept], [prompt])))[0]
                rewards[name].append([*row.tolist(), float(row.sum())])
    assert saved["drift"] == pytest.approx(np.mean(drifts), rel=1e-3) and saved["drift"] > 0
    policy, reference = (torch.tensor(rewards[name]).view(3, 2, 4) for name in ("policy", "reference"))
    want = win_rates(policy, reference)
    for column in COLUMNS:
        for key in ("win_rate", "superiority", "policy", "reference"):
            assert saved["columns"][column][key] == pytest.approx(want[column][key], abs=0.02), (column, key)
    assert any(row["policy"] != row["reference"] for row in saved["columns"].values())


def test_win_rates_are_shown_in_tensorboard(won):
    saved, found = json.loads((won.run / "win_rate.json").read_text()), events(won.run)
    scalars = {tag: found.Scalars(tag)[-1].value for tag in found.Tags()["scalars"]}
    for column, row in saved["columns"].items():
        for tag, key in (
            ("win_rate", "win_rate"),
            ("superiority", "superiority"),
            ("reward/policy", "policy"),
            ("reward/reference", "reference"),
        ):
            assert scalars[f"test/{tag}/{column}"] == pytest.approx(row[key], abs=1e-5)
    assert scalars["test/drift"] == pytest.approx(saved["drift"], rel=1e-4)
    text = found.Tensors("test/win_rate/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert all(f"| {column} | {row['win_rate']:.3f}" in text for column, row in saved["columns"].items())
    assert {"test/win_rate", "test/samples/0", "test/samples/2"} <= set(found.Tags()["images"])
    clips = json.loads((won.run / "samples" / "000000" / "clips.json").read_text())
    assert [[side["label"] for side in clip["sides"]] for clip in clips] == [["policy", "reference"]] * 3
    assert clips[0]["table"][0] == ["", *COLUMNS] and clips[0]["prompt"] in saved["prompts"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"samples": 0}, "WinRate.samples must be at least 1"),
        ({"num_frames": 6}, "num_frames is 6"),
        ({"judge": Path("none")}, "none"),
        ({"prompts": Path("none.txt")}, "none.txt"),
    ],
)
def test_win_rate_refuses(options, words, generators, latents, judge, prompts, tmp_path, capfd):
    options = {"judge": judge, "prompts": prompts, **options}
    config = win_rate_config(tmp_path / "w.yaml", generators / "ltx", latents / "ltx", **options)
    assert call("test", "--config", config) == 2
    assert words in capfd.readouterr().err


@pytest.mark.parametrize(
    "sampling",
    [FrameSampling(fps=4.0, min_pixels=0), FrameSampling(fps=None, num_frames=6, min_pixels=0, max_pixels=900)],
)
def test_resample_is_decode_of_a_video_that_was_not_encoded(sampling):
    video = noise_video(3, 14)
    whole = decode(video, ClipSize(num_frames=14, height=40, width=48), 1)  # every frame as the decoder has it
    assert torch.equal(resample(whole, 8, sampling, 4), decode(video, sampling, 4))
