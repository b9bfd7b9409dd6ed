"""The miniature generator: the oracle that judges it, its clips and prompts, its optimizer, autoencoder, training and export."""

import csv
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.functional import spearman_corrcoef

from videoalign import VideoAlignError
from videoalign.alignment import FlowDPO, FlowRWR, FlowSFT
from videoalign.callbacks import ExportGenerator
from videoalign.cli import main
from videoalign.datamodules.encode_list import ClipSize
from videoalign.datamodules.latents import NULL, LatentPairs
from videoalign.datamodules.shards import ShardSet, ShardWriter, sha256
from videoalign.datamodules.video import decode
from videoalign.miniature.networks.autoencoding import Autoencoding
from videoalign.miniature.networks.clips import Clips
from videoalign.miniature.networks.muon import MuonAdamW
from videoalign.miniature.networks.pipelines import make_generator
from videoalign.miniature.world import measurement, sprites
from videoalign.miniature.world.oracle import FLAWS, Oracle, measure
from videoalign.miniature.world.rendered_sets import GENERATED, WorldSize, generator_prompts, split_prompts, write_world
from videoalign.miniature.world.sprites import (
    COLOURS,
    DIRECTIONS,
    FRAMES,
    SCENES,
    SHAPES,
    SIZE,
    SOURCES,
    TA_WEIGHTS,
    Flaws,
    render,
    shown,
)
from videoalign.models.flow import draw
from videoalign.models.generator_folder import load_generator
from videoalign.models.lora import LoRA

SMALLEST = {"train": 1, "val": 1, "benchmark_videos": 8, "benchmark_pairs": 3, "captions": 1}
QUIET = {
    "accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False, "logger": False,
    "num_sanity_val_steps": 0, "log_every_n_steps": 1, "enable_checkpointing": False,
}  # fmt: skip
CLIP = ClipSize(num_frames=FRAMES, height=SIZE, width=SIZE)
LATENT = (16, 3, 4, 4)
SHORT = 16


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(found, want):
    return found.keys() == want.keys() and all(torch.equal(found[name], value) for name, value in want.items())


# --- oracle: what it sees -------------------------------------------------------------------------------------------------


def rendered(flaws, contents=SCENES, seed=0, wrong=(False, False, False)):
    """Clips (N, T, H, W, 3) that should show the contents and do so more or less, and the prompts."""
    rng = np.random.default_rng(seed)
    flaws = flaws if isinstance(flaws, list) else [flaws] * len(contents)
    videos = [
        render(shown(content, tuple(np.logical_or(flaw.wrong, wrong)), rng), flaw, rng)
        for content, flaw in zip(contents, flaws)
    ]
    return np.stack(videos), [content.prompt for content in contents]


def hidden_bar(content):
    """A white bar along its path fills half of its rows, and the ground there is taken for white."""
    return content.colour == "white" and content.shape == "bar" and content.direction in ("to the right", "to the left")


PLAIN = [content for content in SCENES if not hidden_bar(content)]


@pytest.fixture(scope="module")
def judge():
    return Oracle.calibrated()


def test_clean_renders_are_nearly_flawless(judge):
    """Oranges look a little like yellows, which costs their text alignment up to .11; the rest is surer."""
    quality = torch.cat([judge(*rendered(Flaws(), PLAIN, seed)) for seed in range(2)])
    assert (quality.mean(0) > torch.tensor([0.98, 0.98, 0.96])).all()
    assert (quality.amin(0) > torch.tensor([0.94, 0.94, 0.87])).all()
    sure = torch.tensor([content.colour != "orange" for content in PLAIN] * 2)
    assert quality[sure, 2].mean() > 0.97


def test_white_sprites_are_judged_as_others_are(judge):
    white = [content for content in PLAIN if content.colour == "white"]
    assert judge(*rendered(Flaws(), white)).amin() > 0.94


def test_white_bars_that_move_along_themselves_are_judged_as_others_are(judge):
    bars = [content for content in SCENES if hidden_bar(content)]
    assert judge(*rendered(Flaws(), bars)).amin() > 0.85


@pytest.mark.parametrize(("name", "dimension"), [("fade", 0), ("stain", 0), ("freeze", 1), ("jump", 1)])
def test_a_flaw_lowers_its_dimension_as_much_as_it_is_strong(name, dimension, judge):
    """And no other, as far as it can be told apart: what hardly moves has hardly a direction, large stains hide the sprite."""
    strengths = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    means = torch.stack(
        [
            judge(*rendered(Flaws(**{name: strength}), PLAIN[::2], seed)).mean(0)
            for seed, strength in enumerate(strengths)
        ]
    )
    own, others = means[:, dimension], means[:, [d for d in range(3) if d != dimension]]
    assert (own.diff() < -0.05).all()
    torch.testing.assert_close(own, 1 - torch.tensor(strengths), rtol=0, atol=0.12)
    assert (others[:3] > others[0] - 0.05).all() and (others > others[0] - 0.25).all()


def mixed(count, seed=0):
    """Renders with every flaw mixed, and their true qualities."""
    rng = np.random.default_rng(seed)
    contents = [SCENES[i] for i in rng.integers(len(SCENES), size=count)]
    flaws = []
    for _ in range(count):
        fade, stain, freeze, jump = rng.uniform(0, 1, 4) * (rng.random(4) < 0.5)
        flaws.append(Flaws(fade, stain, freeze, jump, tuple(bool(w) for w in rng.random(3) < 0.3)))
    return contents, flaws


def of_sources(count, seed=0):
    """What the world's simulated generators make."""
    rng = np.random.default_rng(seed)
    contents = [SCENES[i] for i in rng.integers(len(SCENES), size=count)]
    return contents, [SOURCES[i % len(SOURCES)].sample(rng) for i in range(count)]


@pytest.mark.parametrize("drawn", [mixed, of_sources])
def test_ranks_follow_the_true_quality(drawn, judge):
    contents, flaws = drawn(240)
    quality = judge(*rendered(flaws, contents, seed=1))
    true = torch.tensor(np.stack([flaw.quality for flaw in flaws]), dtype=torch.float32)
    assert spearman_corrcoef(quality, true).min() > 0.85
    assert (quality - true).abs().mean() < 0.1  # not only the order


@pytest.mark.parametrize("wrong", range(3))
def test_a_wrong_attribute_takes_its_weight_off_text_alignment(wrong, judge):
    flags = tuple(i == wrong for i in range(3))
    quality = judge(*rendered(Flaws(), PLAIN, wrong=flags))
    want = 1 - TA_WEIGHTS[wrong]
    assert quality[:, 2].median().item() == pytest.approx(want, abs=0.02)
    assert (quality[:, 2] - want).abs().max() < 0.13
    assert quality[:, :2].mean() > 0.95


def test_another_prompt_changes_nothing_but_text_alignment(judge):
    videos, prompts = rendered(Flaws(fade=0.3, jump=0.4), PLAIN[:20])
    right, other = judge(videos, prompts), judge(videos, prompts[::-1])
    assert torch.equal(right[:, :2], other[:, :2])
    assert right[:, 2].mean() > other[:, 2].mean() + 0.2


def test_all_attributes_wrong_is_no_alignment(judge):
    assert judge(*rendered(Flaws(), PLAIN, wrong=(True, True, True)))[:, 2].max() < 0.15


def places(monkeypatch, flaws, contents=SCENES):
    """Renders, and the (N, T, 2) pixels of the sprites' middles as they were drawn."""
    drawn, distance = [], sprites.distance

    def spy(shape, dx, dy):
        drawn.append(np.stack([-dx[:, 0, 0], -dy[:, 0, 0]], -1))
        return distance(shape, dx, dy)

    with monkeypatch.context() as patch:
        patch.setattr(sprites, "distance", spy)
        videos, _ = rendered(flaws, contents)
    return videos, torch.tensor(np.stack(drawn), dtype=torch.float32)


@pytest.mark.parametrize("flaws", [Flaws(), Flaws(fade=0.6), Flaws(freeze=0.5), Flaws(jump=0.5), Flaws(jump=1.0)])
def test_paths_are_the_rendered_ones_to_half_a_pixel(flaws, monkeypatch):
    """Wherever the whole sprite is in the picture."""
    videos, true = places(monkeypatch, flaws)
    inside = ((true > 7.5) & (true < SIZE - 8.5)).all(-1)
    error = (measure(videos).paths - true).norm(dim=-1)
    assert inside.float().mean() > 0.5
    assert error[inside].max() < 0.5 and error.median() < 0.3


def test_paths_are_found_behind_stains_mostly(monkeypatch):
    videos, true = places(monkeypatch, Flaws(stain=0.5))
    error = (measure(videos).paths - true).norm(dim=-1)
    assert (error < 0.5).float().mean() > 0.9


def test_unevenness_is_that_of_the_best_walk_with_a_stop():
    """Against a search over start, pace and stop; steady walks, with and without a stop, are even."""
    time = torch.linspace(-1, 1, FRAMES)
    for stop in time[1:]:
        walk = (3.0 + 4.0 * time.clamp(max=float(stop)))[None]
        torch.testing.assert_close(measurement._unevenness(walk), torch.zeros(1), rtol=0, atol=1e-5)
    path = randn(1, FRAMES, seed=3)
    errors = []
    for stop in time[1:]:
        basis = np.stack([np.ones(FRAMES), np.minimum(time.numpy(), float(stop))], 1)
        rest = np.linalg.lstsq(basis, path[0].double().numpy(), rcond=None)[1]
        errors.append(float(rest[0]) / FRAMES)
    assert measurement._unevenness(path).item() == pytest.approx(min(errors) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("leap", [0.0, 1.5, 4.0, 8.0])
def test_leaps_are_measured_from_either_side(leap):
    signs = torch.tensor([[0, 1, 0, -1, 1, 0, 0, -1, 0], [0, 0, 0, 0, 1, 0, 0, 0, 0], [1, -1, 1, -1, 1, 0, 1, 1, -1]])
    torch.testing.assert_close(measurement._leap(2.0 + leap * signs.float()), torch.full((3,), leap))


# --- oracle: what is no clip of the world ---------------------------------------------------------------------------------


def ground(level=40, count=8):
    return np.full((count, FRAMES, SIZE, SIZE, 3), level, np.uint8)


@pytest.mark.parametrize("level", [0, 40, 255])
def test_an_empty_ground_is_no_clip_and_aligned_by_chance_alone(level, judge):
    quality = judge(ground(level), [content.prompt for content in SCENES[::12]])
    chance = float(TA_WEIGHTS @ [1 / len(COLOURS), 1 / len(SHAPES), 1 / len(DIRECTIONS)])
    torch.testing.assert_close(quality, torch.tensor([[0.0, 0.0, chance]]).expand(8, 3), rtol=0, atol=1e-4)


def test_noise_is_no_clip(judge):
    noise = np.random.default_rng(0).integers(0, 256, (24, FRAMES, SIZE, SIZE, 3), dtype=np.uint8)
    quality = judge(noise, [content.prompt for content in SCENES[::4]])
    assert quality.isfinite().all() and quality[:, 0].max() < 0.05
    assert quality[:, 1].mean() < 0.1 and quality[:, 1].max() < 0.5  # places found by chance seldom make a walk
    assert quality[:, 2].mean() < 0.4


@pytest.mark.parametrize("colour", [(225, 45, 45), (255, 0, 255)])
def test_a_picture_of_one_colour_is_no_clip(colour, judge):
    quality = judge(np.broadcast_to(np.uint8(colour), (2, FRAMES, SIZE, SIZE, 3)), [SCENES[0].prompt] * 2)
    assert quality.isfinite().all() and quality[:, :2].max() < 0.05


def test_a_still_picture_does_not_move(judge):
    videos, prompts = rendered(Flaws(), PLAIN[::6])
    quality = judge(np.repeat(videos[:, :1], FRAMES, 1), prompts)
    assert quality[:, 1].max() < 0.05 and quality[:, 0].mean() > 0.9
    assert quality[:, 2].mean().item() == pytest.approx(0.7 + 0.3 / 4, abs=0.05)  # no direction: one of four


@pytest.mark.parametrize("frames", [3, 5])
def test_fewer_frames_are_judged_too(frames, judge):
    videos, prompts = rendered(Flaws(), PLAIN[::6])
    kept = np.linspace(0, FRAMES - 1, frames).astype(int)
    assert judge(videos[:, kept], prompts).mean(0).min() > 0.95


def test_a_prompt_of_another_world_is_refused(judge):
    with pytest.raises(VideoAlignError, match="'a red circle moves sideways' is none of the miniature world"):
        judge(ground(count=2), [SCENES[0].prompt, "a red circle moves sideways"])


@pytest.mark.parametrize("shape", [(9, 16, 16, 3), (9, 32, 32, 1), (2, 32, 32, 3), (9, 3, 32, 32), (32, 32, 3)])
def test_clips_of_another_size_are_refused(shape, judge):
    with pytest.raises(VideoAlignError, match=r"oracle judges \(T, 32, 32, 3\), T at least 3"):
        judge(np.zeros((1, *shape), np.uint8), [SCENES[0].prompt])


def test_a_batch_is_judged_as_its_clips_are(judge):
    contents, flaws = mixed(12, seed=4)
    videos, prompts = rendered(flaws, contents)
    single = torch.cat([judge(videos[i : i + 1], prompts[i : i + 1]) for i in range(12)])
    torch.testing.assert_close(judge(videos, prompts), single, rtol=0, atol=1e-5)


# --- oracle: its calibration ------------------------------------------------------------------------------------------------


def blurred(videos, width=1.0):
    """What a small autoencoder does to a picture, in the rough."""
    kernel = torch.exp(-(torch.arange(-3.0, 4.0) ** 2) / (2 * width**2))
    kernel = kernel / kernel.sum()
    frames = torch.from_numpy(videos).float().permute(0, 1, 4, 2, 3).reshape(-1, 1, SIZE, SIZE)
    frames = F.pad(frames, (3, 3, 3, 3), mode="replicate")
    frames = F.conv2d(F.conv2d(frames, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
    frames = frames.view(len(videos), -1, 3, SIZE, SIZE).permute(0, 1, 3, 4, 2)
    return frames.round().clamp(0, 255).to(torch.uint8).numpy()


def test_calibration_forgives_what_the_autoencoder_does(judge):
    """Blurred clean renders are flawless again, and the worst are the worst."""
    calibrated = Oracle.calibrated(blurred, PLAIN, clips=48)
    videos, prompts = rendered(Flaws(), PLAIN[::2], seed=9)
    before, after = judge(blurred(videos), prompts), calibrated(blurred(videos), prompts)
    assert before[:, 0].mean() < 0.95
    assert after.mean(0).min() > 0.96 and after[:, 0].mean() > 0.985
    for name, dimension in (("fade", 0), ("freeze", 1)):
        worst, prompts = rendered(Flaws(**{name: 1.0}), PLAIN[::4], seed=9)
        assert calibrated(blurred(worst), prompts)[:, dimension].mean() < 0.08


def test_calibration_is_the_seeds():
    few = partial(Oracle.calibrated, clips=8)
    assert few(seed=1) == few(seed=1) != few(seed=2)


def test_strengths_are_offset_scaled_and_bounded():
    scale = dict.fromkeys(FLAWS, (0.0, 1.0)) | {"fade": (0.25, 2.0), "jump": (0.5, -1.0)}
    raw = torch.tensor([[0.5, 2.0, -1.0, 0.25, 0.25, 0.5]])
    found = Oracle(scale).strengths(SimpleNamespace(flaws=raw))
    torch.testing.assert_close(found, torch.tensor([[0.5, 1.0, 0.0, 0.25, 0.25, 0.5]]))


def test_a_saved_oracle_judges_the_same(judge, tmp_path):
    judge.save(tmp_path / "new" / "oracle.json")
    again = Oracle.load(tmp_path / "new" / "oracle.json")
    assert again == judge != Oracle()
    videos, prompts = rendered(Flaws(fade=0.4, jump=0.3), PLAIN[:4])
    assert torch.equal(again(videos, prompts), judge(videos, prompts))


WHOLE = {name: [0.0, 1.0] for name in FLAWS}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        "{}",
        '{"scale": null}',
        '{"scale": {}}',
        json.dumps({"scale": WHOLE | {"jump": None}}),
        json.dumps({"scale": WHOLE | {"jump": ["a", "b"]}}),
        json.dumps({"scale": WHOLE | {"jump": [0.0, None]}}),
        json.dumps({"scale": {name: row for name, row in WHOLE.items() if name != "unlike"}}),
    ],
)
def test_a_damaged_calibration_is_refused(content, tmp_path):
    (tmp_path / "oracle.json").write_text(content)
    with pytest.raises(VideoAlignError, match=r"oracle\.json"):
        Oracle.load(tmp_path / "oracle.json")


@pytest.mark.parametrize("row", ["[0.0]", "[0.0, 1.0, 2.0]", "[]", '"12"', "[NaN, 1.0]", "[0.0, Infinity]"])
def test_a_calibration_that_is_no_two_numbers_is_refused(row, tmp_path):
    content = json.dumps({"scale": WHOLE | {"jump": "ROW"}}).replace('"ROW"', row)
    (tmp_path / "oracle.json").write_text(content)
    with pytest.raises(VideoAlignError, match=r"oracle\.json"):
        Oracle.load(tmp_path / "oracle.json")


def test_a_missing_calibration_is_named(tmp_path):
    with pytest.raises(VideoAlignError, match=r"oracle\.json"):
        Oracle.load(tmp_path / "oracle.json")


# --- the generator's part of the world --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_what_the_generator_is_judged_by_is_new_in_its_combinations_alone(seed):
    taught, unseen = generator_prompts(seed)
    assert (len(set(taught)), len(set(unseen))) == (24, 8)
    assert set(taught) | set(unseen) == set(GENERATED)
    for part in ("colour", "shape", "direction"):
        assert {getattr(content, part) for content in unseen} <= {getattr(content, part) for content in taught}
    splits = split_prompts(seed)
    assert not set(unseen) & {*splits["train"], *splits["val"]}
    assert not set(taught) & {*splits["recent"], *splits["older"]}


def test_the_generators_split_is_the_seeds():
    assert generator_prompts(3) == generator_prompts(3)
    assert len({frozenset(generator_prompts(seed)[1]) for seed in range(12)}) > 1


def clips_world(out, clips=48, seed=5):
    for _ in write_world(out, WorldSize(**SMALLEST, clips=clips), seed):
        pass
    return out


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return clips_world(tmp_path_factory.mktemp("world") / "world")


@pytest.fixture(scope="module")
def clips(world):
    """uint8 (N, T, 3, H, W) as a training sees them, and the records."""
    samples = list(ShardSet(world / "clips", "videos"))
    return torch.stack([decode(raw.members["mp4"], CLIP, 1, raw.name) for raw in samples]), [
        raw.record() for raw in samples
    ]


def test_clips_are_the_seeds(world, tmp_path):
    def content(folder):
        return [(raw.key, raw.members) for raw in ShardSet(folder / "clips")]

    first = content(world)
    assert content(clips_world(tmp_path / "again")) == first
    assert content(clips_world(tmp_path / "less", clips=20)) == first[:20]
    other = content(clips_world(tmp_path / "other", seed=6))
    assert len(other) == len(first) and all(a[1] != b[1] for a, b in zip(first, other))


def test_clips_are_of_the_taught_prompts_and_the_files_name_them(world, clips):
    taught, unseen = ({content.prompt for content in part} for part in generator_prompts(5))
    assert {record["prompt"] for record in clips[1]} == taught
    assert (world / "prompts.txt").read_text().splitlines() == [c.prompt for c in generator_prompts(5)[0]]
    assert set((world / "unseen.txt").read_text().splitlines()) == unseen


def test_clips_state_the_quality_that_they_show(clips, judge):
    videos, records = clips
    true = torch.tensor([record["quality"] for record in records])
    assert true.shape == (48, 3) and true.amin() >= 0 and true.amax() <= 1
    assert all(record["fps"] == sprites.FPS and record["num_frames"] == FRAMES for record in records)
    found = judge(videos.movedim(2, -1).numpy(), [record["prompt"] for record in records])
    assert (true.amin(0) < 0.5).all() and (true == 1).any(0).all()  # good ones and bad ones
    assert spearman_corrcoef(found, true).min() > 0.7  # half of them are equal: ties
    assert (found - true).abs().mean(0).max() < 0.1


# --- the optimizer ----------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A matrix, two convolutions, and what is no matrix: biases, a gain, a row and a kernel of one weight a channel."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.matrix = nn.Linear(6, 4)
            self.flat = nn.Conv2d(3, 4, 3)
            self.deep = nn.Conv3d(2, 3, (3, 1, 2))
            self.gain = nn.Parameter(torch.ones(5))
            self.row = nn.Parameter(randn(1, 7, seed=1))
            self.depthwise = nn.Parameter(randn(4, 1, 1, seed=2))

    @property
    def kernels(self):
        return [self.matrix.weight, self.flat.weight, self.deep.weight]

    @property
    def rest(self):
        kernels = {id(p) for p in self.kernels}
        return [p for p in self.parameters() if id(p) not in kernels]


def give_gradients(parameters, seed):
    for i, p in enumerate(parameters):
        p.grad = randn(*p.shape, seed=1000 * seed + i)


def test_kernels_step_as_muon_on_matrices_and_the_rest_as_adamw():
    """Bit for bit, over several steps."""
    net, twin = Net(), Net()
    options = {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.05}
    optimizer = MuonAdamW(net.parameters(), rest_lr=0.004, betas=(0.8, 0.95), **options)
    matrices = [nn.Parameter(p.detach().reshape(len(p), -1).clone()) for p in twin.kernels]
    muon = torch.optim.Muon(matrices, adjust_lr_fn="original", **options)
    adam = torch.optim.AdamW(twin.rest, lr=0.004, betas=(0.8, 0.95), weight_decay=0.0)
    before = [p.detach().clone() for p in net.parameters()]
    for step in range(3):
        give_gradients(net.kernels, step), give_gradients(net.rest, 10 + step)
        for matrix, kernel in zip(matrices, net.kernels):
            matrix.grad = kernel.grad.reshape(matrix.shape).clone()
        give_gradients(twin.rest, 10 + step)
        optimizer.step(), muon.step(), adam.step()
    assert all(torch.equal(p, m.view_as(p)) for p, m in zip(net.kernels, matrices))
    assert all(torch.equal(p, q) for p, q in zip(net.rest, twin.rest))
    assert not any(torch.equal(p, old) for p, old in zip(net.parameters(), before))


def test_updates_of_kernels_are_nearly_orthogonal():
    """What Muon is for: all singular values of an update are about the learning rate, whatever the gradient's are."""
    net = Net()
    optimizer = MuonAdamW(net.parameters(), lr=0.01, weight_decay=0.0)
    before = net.flat.weight.detach().clone()
    give_gradients(net.parameters(), 0)
    net.flat.weight.grad *= 1e4
    optimizer.step()
    values = torch.linalg.svdvals((net.flat.weight.detach() - before).view(4, -1)) / 0.01
    assert 0.6 < values.min() and values.max() < 1.4


def test_a_closure_is_called_with_gradients():
    net = Net()
    optimizer = MuonAdamW(net.parameters())
    before = net.flat.weight.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in net.parameters())
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses[0] > losses[1] > losses[2] and not torch.equal(before, net.flat.weight)


def test_schedulers_change_both_learning_rates():
    """What is stepped with, not only what is shown: AdamW's first steps are as large as its rate; at 0 nothing moves."""
    factors, steps = (1.0, 0.25, 0.0), []
    for reached in range(3):
        net = Net()
        optimizer = MuonAdamW(net.parameters(), lr=0.02, rest_lr=0.001, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factors[step])
        optimizer.step()  # without gradients
        for _ in range(reached):
            schedule.step()
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([0.02 * factors[reached], 0.001 * factors[reached]])
        before = [p.detach().clone() for p in net.parameters()]
        give_gradients(net.parameters(), 0)
        optimizer.step()
        steps.append(torch.stack([(p.detach() - old).norm() for p, old in zip(net.parameters(), before)]))
    assert (steps[0] > 0).all() and not steps[2].any()
    torch.testing.assert_close(steps[1], 0.25 * steps[0], rtol=1e-3, atol=1e-6)


def test_a_checkpoint_goes_on_bit_for_bit(tmp_path):
    def stepped(net, optimizer, steps):
        for step in steps:
            give_gradients(net.parameters(), step)
            optimizer.step()

    net, again, forgetful = Net(), Net(), Net()
    optimizer = MuonAdamW(net.parameters(), lr=0.03)
    stepped(net, optimizer, range(3))
    optimizer.param_groups[0]["lr"] = 0.01
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint")
    checkpoint = torch.load(tmp_path / "checkpoint", weights_only=True)
    stepped(net, optimizer, range(3, 6))
    for other, loads in ((again, True), (forgetful, False)):
        other.load_state_dict(checkpoint["net"])
        fresh = MuonAdamW(other.parameters(), lr=0.03)
        if loads:
            fresh.load_state_dict(checkpoint["optimizer"])
            assert [group["lr"] for group in fresh.param_groups] == [0.01, 2e-3]
        stepped(other, fresh, range(3, 6))
    assert same(again.state_dict(), net.state_dict())
    assert not any(torch.equal(p, q) for p, q in zip(forgetful.parameters(), net.parameters()))


def test_zero_grad_clears():
    """After it nothing moves, however the state stands."""
    net = Net()
    optimizer = MuonAdamW(net.parameters())
    give_gradients(net.parameters(), 0)
    optimizer.step()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.zero_grad()
    assert all(p.grad is None for p in net.parameters())
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before))


@pytest.mark.parametrize("only", ["kernels", "rest"])
def test_parameters_of_one_sort_are_refused(only):
    with pytest.raises(ValueError, match="wants matrices and other parameters"):
        MuonAdamW(getattr(Net(), only))


class Tiny(L.LightningModule):
    """A network of convolutions under Lightning."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))

    def training_step(self, batch, index):
        return 100 * self.net(batch).square().mean()

    def train_dataloader(self):
        return torch.utils.data.DataLoader(randn(8, 3, 8, 8), batch_size=4)

    def configure_optimizers(self):
        return MuonAdamW(self.parameters())


@pytest.mark.parametrize("steps", [1, 2])
def test_gradients_of_kernels_are_clipped(steps):
    """experiments/sprites set gradient_clip_val: the norm is that of all parameters."""
    model = Tiny()
    L.Trainer(**QUIET, max_steps=steps, gradient_clip_val=0.01).fit(model)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    assert norm == pytest.approx(0.01, rel=1e-3)


# --- generators with short prompts --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By family and length of prompts (None: the family's own)."""
    root = tmp_path_factory.mktemp("generators")
    for family in ("wan", "ltx"):
        for length in (None, SHORT):
            make_generator(
                root / f"{family}-{length}",
                family,
                hidden=48,
                layers=1,
                max_tokens=length,
                corpus=[content.prompt for content in GENERATED],
            )
    return {(f, n): str(root / f"{f}-{n}") for f in ("wan", "ltx") for n in (None, SHORT)}


@pytest.mark.parametrize(("family", "own"), [("wan", 512), ("ltx", 128)])
def test_prompts_are_padded_to_max_tokens(family, own, folders):
    for length in (None, SHORT):
        generator = load_generator(folders[family, length])
        assert generator.max_tokens == (length or own)
        embeds = generator.encode_prompts([content.prompt for content in GENERATED])
        condition = generator.condition(embeds)
        assert condition["embeds"].shape == (len(GENERATED), length or own, 32)
        assert condition["mask"].sum(1).tolist() == [len(e) for e in embeds]
        assert all(
            torch.equal(row[: len(e)], e) and not row[len(e) :].any() for row, e in zip(condition["embeds"], embeds)
        )


@pytest.mark.parametrize("family", ["wan", "ltx"])
def test_longer_prompts_are_refused(family, folders):
    generator, long = load_generator(folders[family, SHORT]), "a red bar " * 40
    with pytest.raises(VideoAlignError, match=f"at most {SHORT}"):
        generator.encode_prompts([long])
    (cut,) = generator.encode_prompts([long], truncate=True)
    assert len(cut) == SHORT
    with pytest.raises(VideoAlignError, match=f"at most {SHORT} x 32"):
        generator.condition([randn(SHORT + 1, 32)])
    generator.condition([randn(SHORT, 32)])


@pytest.mark.parametrize("family", ["wan", "ltx"])
def test_max_tokens_changes_no_weight_and_nothing_where_padding_is_masked(family, folders):
    """Wan's text encoder masks the padding, LTX's does not; its transformer does, and Wan's does not."""
    own, short = (load_generator(folders[family, length]) for length in (None, SHORT))
    assert same(short.transformer.state_dict(), own.transformer.state_dict())
    prompts = [content.prompt for content in GENERATED[:3]]
    if family == "wan":
        for a, b in zip(own.encode_prompts(prompts), short.encode_prompts(prompts)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    else:
        x, t = randn(3, *LATENT), torch.tensor([0.2, 0.5, 0.8])
        embeds = own.encode_prompts(prompts)
        with torch.no_grad():
            velocities = [generator.velocity(x, t, generator.condition(embeds)) for generator in (own, short)]
        torch.testing.assert_close(*velocities, rtol=1e-4, atol=1e-5)


def test_more_tokens_than_the_family_takes_are_not_promised(tmp_path):
    make_generator(tmp_path / "wan", "wan", hidden=48, layers=1, max_tokens=4096)
    assert load_generator(tmp_path / "wan").max_tokens == 512


# --- the autoencoder ----------------------------------------------------------------------------------------------------------


def experiment(path, generator, data, out, steps, optimizer, batch_size=4):
    """A YAML file as a user writes it."""
    path.write_text(f"""
seed_everything: 0
trainer:
  accelerator: cpu
  devices: 1
  max_steps: {steps}
  log_every_n_steps: 1
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  logger:
    class_path: lightning.pytorch.loggers.CSVLogger
    init_args: {{save_dir: {path.parent}, name: log}}
model:
  class_path: videoalign.miniature.networks.autoencoding.Autoencoding
  init_args:
    generator: {generator}
    out: {out}
    optimizer: {optimizer}
data:
  class_path: videoalign.miniature.networks.clips.Clips
  init_args:
    data: {data}
    clip: {{num_frames: {FRAMES}, height: {SIZE}, width: {SIZE}}}
    batch_size: {batch_size}
    workers: 0
""")
    return ["fit", "--config", str(path)]


MUON = "{class_path: videoalign.miniature.networks.muon.MuonAdamW, init_args: {lr: 0.02, rest_lr: 2.0e-3, weight_decay: 0.0}}"
STILL = "{class_path: torch.optim.SGD, init_args: {lr: 0.0}}"


def metrics(folder):
    """Loss by step."""
    (path,) = Path(folder).glob("log/*/metrics.csv")
    return [float(row["train/loss"]) for row in csv.DictReader(path.open()) if row["train/loss"]]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Sixteen clips."""
    return clips_world(tmp_path_factory.mktemp("small") / "world", clips=16) / "clips"


@pytest.fixture(scope="module")
def encoder(folders, small, tmp_path_factory):
    """A run's folder, with the pipeline that it wrote under ``out``."""
    root = tmp_path_factory.mktemp("encoder")
    main(experiment(root / "ae.yaml", folders["wan", SHORT], small, root / "out", 16, MUON))
    return root


def frames(folder):
    return torch.stack([decode(raw.members["mp4"], CLIP, 1, raw.name) for raw in ShardSet(folder)])


def deviations(generator, videos):
    rows = generator.encode_video(videos).transpose(0, 1).flatten(1)  # (C, numbers)
    return rows.mean(1), rows.std(1, correction=0)


def error(generator, videos):
    return (generator.decode(generator.encode_video(videos)).float() - videos.float()).square().mean().item()


def test_an_autoencoder_learns_and_is_written_as_a_pipeline(encoder, folders, small):
    losses = metrics(encoder)
    assert len(losses) == 16 and sum(losses[-5:]) < 0.5 * sum(losses[:2]) * 5 / 2
    before, after = load_generator(folders["wan", SHORT]), load_generator(encoder / "out")
    videos = frames(small)
    assert error(after, videos) < 0.5 * error(before, videos)
    assert same(after.transformer.state_dict(), before.transformer.state_dict())
    assert after.max_tokens == SHORT
    assert torch.equal(after.encode_prompts(["a red bar"])[0], before.encode_prompts(["a red bar"])[0])
    _, deviation = deviations(after, videos)  # weights moved while the moments were taken
    assert 0.3 < deviation.min() and deviation.max() < 3 and 0.7 < deviation.mean() < 1.5


def test_latents_have_mean_0_and_deviation_1_where_nothing_moves(folders, small, tmp_path):
    """At a learning rate of 0, over one whole epoch, exactly; weights are the generator's own."""
    main(experiment(tmp_path / "ae.yaml", folders["wan", SHORT], small, tmp_path / "out", 4, STILL))
    before, after = load_generator(folders["wan", SHORT]), load_generator(tmp_path / "out")
    assert same(after.vae.state_dict(), before.vae.state_dict())
    mean, deviation = deviations(after, frames(small))
    torch.testing.assert_close(mean, torch.zeros(16), rtol=0, atol=1e-3)
    torch.testing.assert_close(deviation, torch.ones(16), rtol=0, atol=1e-3)
    assert deviations(before, frames(small))[1].max() < 0.5


def test_an_output_in_the_way_is_refused_before_training(folders, small, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        main(experiment(tmp_path / "ae.yaml", folders["wan", SHORT], small, tmp_path / "out", 1, STILL))
    assert stop.value.code == 2 and "exists already" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    assert not list(tmp_path.glob("log/*/metrics.csv"))


def test_an_earlier_autoencoder_is_replaced(encoder, folders, small, tmp_path):
    make_generator(tmp_path / "out", "wan", hidden=48, layers=1)
    (tmp_path / "out" / "stale").write_text("")
    main(experiment(tmp_path / "ae.yaml", str(encoder / "out"), small, tmp_path / "out", 1, STILL))
    assert same(load_generator(tmp_path / "out").vae.state_dict(), load_generator(encoder / "out").vae.state_dict())
    assert not (tmp_path / "out" / "stale").exists() and not list(tmp_path.glob(".out*"))


def test_an_autoencoder_of_another_kind_is_refused(folders, tmp_path):
    with pytest.raises(VideoAlignError, match="only autoencoders of Wan's kind"):
        Autoencoding(folders["ltx", None], str(tmp_path / "out"))


def test_damaged_clips_stop_the_training(folders, tmp_path, capsys):
    with ShardWriter(tmp_path / "clips", "videos", per_shard=4) as writer:
        for i in range(4):
            writer.write(
                f"k{i}", {"": b"no video"}, {"prompt": "a red bar moves upwards", "fps": 8, "num_frames": FRAMES}
            )
    with pytest.raises(SystemExit) as stop:
        main(experiment(tmp_path / "ae.yaml", folders["wan", SHORT], tmp_path / "clips", tmp_path / "out", 1, STILL))
    assert stop.value.code == 2 and "could not be used" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_finished_training_that_is_resumed_stays_finished(folders, small, tmp_path):
    data = {"clip": CLIP, "batch_size": 4, "workers": 0}

    def made():
        return Autoencoding(folders["wan", SHORT], str(tmp_path / "out"))

    trainer = L.Trainer(**QUIET, max_steps=1)
    trainer.fit(made(), Clips(str(small), **data))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    L.Trainer(**QUIET, max_steps=1).fit(
        made(), Clips(str(small), **data), ckpt_path=tmp_path / "last.ckpt", weights_only=True
    )
    assert load_generator(tmp_path / "out").vae is not None


# --- prompts that are left out --------------------------------------------------------------------------------------------------


def write(out, generator, of="videos", count=8):
    """A latents set of random content; pairs' labels prefer A."""
    with ShardWriter(out, "latents", media="safetensors", per_shard=3) as writer:
        writer.index.latents = {**generator.identity(), "of": of}
        for i in range(count):
            made = {
                side: randn(*LATENT, seed=100 * i + s) for s, side in enumerate(("video",) if of == "videos" else "ab")
            }
            made["prompt"] = randn(3 + i % 3, 32, seed=100 * i + 50)
            labels = {"labels": dict.fromkeys(("VQ", "MQ", "TA"), "A")} if of == "pairs" else {}
            writer.write(f"k{i}", {"": safetensors.torch.save(made)}, {"prompt": "a red bar", **labels})
        (writer.path / NULL).write_bytes(safetensors.torch.save({"prompt": randn(1, 32, seed=7)}))
        writer.index.tables[NULL] = sha256(writer.path / NULL)
    return str(out)


@pytest.fixture(scope="module")
def latents(folders, tmp_path_factory):
    root, generator = tmp_path_factory.mktemp("latents"), load_generator(folders["wan", SHORT])
    return {of: write(root / of, generator, of) for of in ("videos", "pairs")}


def sft(folder, kind=FlowSFT, **options):
    torch.manual_seed(0)
    return kind(generator=folder, **{"lora": None, "optimizer": partial(torch.optim.SGD, lr=0.1), **options})


class Watch(L.Callback):
    """Each step's prompts as the transformer is asked, by their samples' seeds, and the losses."""

    def on_fit_start(self, trainer, module):
        self.null, self.asked, self.given, self.losses = trainer.datamodule.null, {}, {}, []
        errors = module.errors

        def spy(latents, seeds, prompts, net=None):
            self.asked |= dict(zip(seeds.tolist(), prompts))
            return errors(latents, seeds, prompts, net)

        module.errors = spy

    def on_train_batch_start(self, trainer, module, batch, *rest):
        self.given |= dict(zip(batch["seeds"].tolist(), batch["prompts"]))

    def on_train_batch_end(self, trainer, module, *rest):
        self.losses.append(trainer.callback_metrics["train/loss"].item())

    @property
    def without(self):
        """Seeds of the samples whose prompt was the empty one; all others had their own."""
        without = {seed for seed, prompt in self.asked.items() if torch.equal(prompt, self.null)}
        assert all(torch.equal(self.asked[s], self.given[s]) for s in self.asked.keys() - without)
        return without


def fit(model, data, steps=2, callbacks=(), batch_size=4, seed=0, **trainer):
    watch = Watch()
    module = LatentPairs(data, batch_size=batch_size, workers=0, shuffle_buffer=0, seed=seed)
    settings = {**QUIET, "limit_val_batches": 0, "max_steps": steps, "callbacks": [watch, *callbacks], **trainer}
    L.Trainer(**settings).fit(model, module)
    return watch


def test_samples_seeds_alone_say_which_prompts_are_left_out(folders, latents):
    """Not the batch that they are in, nor the random state, nor the order."""
    folder = folders["wan", SHORT]
    watches = [
        fit(sft(folder, null_share=0.5), latents["videos"], steps, batch_size=size)
        for size, steps in ((4, 6), (2, 12), (8, 3))
    ]
    assert watches[0].asked.keys() == watches[1].asked.keys() == watches[2].asked.keys()
    assert watches[0].without == watches[1].without == watches[2].without
    assert 4 <= len(watches[0].without) <= 20 and len(watches[0].asked) == 24  # each epoch anew
    other = fit(sft(folder, null_share=0.5), latents["videos"], 6, seed=1)
    assert not other.asked.keys() & watches[0].asked.keys()


@pytest.fixture(scope="module")
def large(folders):
    """Which of 4,000 samples lose their prompts, by share."""
    model, null = sft(folders["wan", SHORT]), randn(1, 32)
    model.trainer = SimpleNamespace(datamodule=SimpleNamespace(null=null))
    prompts = [randn(3, 32)] * 4000
    seeds = torch.randint(0, 2**62, (4000,), generator=torch.Generator().manual_seed(0))

    def without(share):
        model.null_share = share
        return {i for i, prompt in enumerate(model._some_without(prompts, seeds)) if prompt is null}

    return without


def test_about_the_share_of_the_prompts_is_left_out(large):
    for share in (0.01, 0.1, 0.25, 0.5, 0.9):
        spread = (share * (1 - share) / 4000) ** 0.5
        assert len(large(share)) / 4000 == pytest.approx(share, abs=4 * spread)
    assert large(0.1) < large(0.25) < large(0.9)  # the same samples and more
    assert not large(0.0)


def test_left_out_prompts_do_not_follow_the_times(folders, latents, large):
    """The draw is another one than that of the noise and the time: both halves of the times lose as many."""
    model = sft(folders["wan", SHORT])
    seeds = torch.randint(0, 2**62, (4000,), generator=torch.Generator().manual_seed(0))
    uniform, _ = draw(seeds, (1, 1, 1, 1), torch.device("cpu"))
    early = (model.times(uniform) < 0.5).tolist()
    lost = large(0.5)
    share = sum(early[i] for i in lost) / len(lost)
    assert share == pytest.approx(sum(early) / 4000, abs=0.045)


def test_no_share_changes_nothing(folders, latents):
    """The prompts are the batch's own, and what is trained is what was trained before there was a share."""
    models = [sft(folders["wan", SHORT], **options) for options in ({}, {"null_share": 0.0}, {"null_share": 0.5})]
    watches = [fit(model, latents["videos"]) for model in models]
    assert not watches[0].without and not watches[1].without and watches[2].without
    assert same(models[1].policy.state_dict(), models[0].policy.state_dict())
    assert not same(models[2].policy.state_dict(), models[0].policy.state_dict())


def test_the_loss_is_that_of_the_empty_prompt(folders, latents):
    """Times and noise stay as they were: a step equals the errors at the prompts, computed apart."""
    model, twin = sft(folders["wan", SHORT], null_share=0.5), sft(folders["wan", SHORT])
    module = LatentPairs(latents["videos"], batch_size=8, workers=0, shuffle_buffer=0)

    class Keep(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, *rest):
            self.batch = batch

    keep, watch = Keep(), Watch()
    L.Trainer(**QUIET, limit_val_batches=0, max_steps=1, callbacks=[watch, keep]).fit(model, module)
    batch = keep.batch
    prompts = [watch.null if s in watch.without else p for s, p in zip(batch["seeds"].tolist(), batch["prompts"])]
    assert 0 < len(watch.without) < 8
    with torch.no_grad():
        errors, _ = twin.errors(batch["latents"][:1], batch["seeds"], prompts)
        own, _ = twin.errors(batch["latents"][:1], batch["seeds"], batch["prompts"])
    assert watch.losses[0] == pytest.approx(errors.mean().item(), rel=1e-5)
    assert abs(watch.losses[0] - own.mean().item()) > 1e-6


def test_validation_keeps_every_prompt(folders, latents):
    values = []
    for share in (0.0, 0.9):
        trainer = L.Trainer(**QUIET)
        module = LatentPairs(latents["videos"], latents["videos"], batch_size=4, workers=0)
        (row,) = trainer.validate(sft(folders["wan", SHORT], null_share=share), module, verbose=False)
        values.append(row)
    assert values[0] == values[1] and values[0]["val/loss"] > 0


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5, float("nan")])
@pytest.mark.parametrize("kind", [FlowSFT, FlowRWR, FlowDPO])
def test_what_is_no_share_is_refused(kind, share, folders):
    with pytest.raises(VideoAlignError, match=r"null_share is a share .*\[0, 1\)"):
        sft(folders["wan", SHORT], kind, null_share=share)


def test_dpo_leaves_no_prompts_out(folders):
    """Policy and reference would be asked with different prompts, and the loss would not begin at ln 2."""
    with pytest.raises(VideoAlignError, match="null_share: FlowDPO compares with a reference"):
        sft(folders["wan", SHORT], FlowDPO, null_share=0.5)


def test_dpo_with_every_prompt_begins_at_ln_2(folders, latents):
    watch = fit(sft(folders["wan", SHORT], FlowDPO), latents["pairs"], steps=1, batch_size=8)
    assert watch.losses[0] == pytest.approx(np.log(2), abs=1e-6)


# --- the pipeline that a training writes ------------------------------------------------------------------------------------------


def test_the_exported_pipeline_holds_the_trained_transformer(folders, latents, tmp_path):
    model, before = sft(folders["wan", SHORT], null_share=0.1), load_generator(folders["wan", SHORT])
    fit(model, latents["videos"], callbacks=[ExportGenerator(str(tmp_path / "out"), pipeline=True)])
    after = load_generator(tmp_path / "out")
    assert same(after.transformer.state_dict(), model.policy.state_dict())
    assert not same(after.transformer.state_dict(), before.transformer.state_dict())
    assert after.identity() == before.identity() and after.max_tokens == SHORT
    prompts = ["a red bar moves upwards", ""]
    embeds = after.encode_prompts(prompts)
    assert all(torch.equal(a, b) for a, b in zip(embeds, before.encode_prompts(prompts)))
    noise, condition = randn(1, *LATENT), after.condition(embeds[:1])
    model.eval()
    sampled = [
        g.sample(condition, noise, 2, 2.0, after.condition(embeds[1:])) for g in (after, model.generator, before)
    ]
    torch.testing.assert_close(sampled[0], sampled[1], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(sampled[0], sampled[2], atol=1e-4)


def test_an_earlier_export_is_replaced_and_nothing_else(folders, latents, tmp_path):
    make_generator(tmp_path / "out", "wan", hidden=48, layers=1, seed=3)
    model = sft(folders["wan", SHORT])
    fit(model, latents["videos"], 1, [ExportGenerator(str(tmp_path / "out"), pipeline=True)])
    assert same(load_generator(tmp_path / "out").transformer.state_dict(), model.policy.state_dict())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")  # by which a lone transformer's export would be known
    with pytest.raises(VideoAlignError, match="exists already"):
        fit(sft(folders["wan", SHORT]), latents["videos"], 1, [ExportGenerator(str(tmp_path / "mine"), pipeline=True)])


def test_adapters_are_no_pipeline(folders, latents, tmp_path):
    model = sft(folders["wan", SHORT], lora=LoRA(rank=2, alpha=2, targets=["to_q"]))
    with pytest.raises(VideoAlignError, match=r"pipeline writes a fully trained transformer.*lora: null"):
        fit(model, latents["videos"], 1, [ExportGenerator(str(tmp_path / "out"), pipeline=True)])
    assert not (tmp_path / "out").exists()
