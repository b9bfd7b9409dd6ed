"""The oracle: what it sees, what is no clip of the world, its calibration, and the clips that it judges."""

import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchmetrics.functional import spearman_corrcoef

from helpers import CLIP, clips_world, randn
from videoalign import VideoAlignError
from videoalign.datamodules.shards import ShardSet
from videoalign.datamodules.video import decode
from videoalign.miniature.world import measurement, sprites
from videoalign.miniature.world.oracle import FLAWS, Oracle, measure
from videoalign.miniature.world.rendered_sets import GENERATED, generator_prompts, split_prompts
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

# --- oracle: what it sees -------------------------------------------------------------------------


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
    """It lowers no other, as far as they can be told apart.

    What hardly moves has hardly a direction, and large stains hide the sprite.
    """
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
    assert (others[:3] > others[0] - 0.05).all()
    assert (others > others[0] - 0.25).all()


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
    """Clips of the world's simulated generators."""
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
    """This holds wherever the whole sprite is in the picture."""
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
    """It equals a search over start, pace and stop; steady walks, with and without a stop, are even."""
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


# --- oracle: what is no clip of the world ---------------------------------------------------------


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
    assert quality.isfinite().all()
    assert quality[:, 0].max() < 0.05
    assert quality[:, 1].mean() < 0.1 and quality[:, 1].max() < 0.5  # places found by chance seldom make a walk
    assert quality[:, 2].mean() < 0.4


@pytest.mark.parametrize("colour", [(225, 45, 45), (255, 0, 255)])
def test_a_picture_of_one_colour_is_no_clip(colour, judge):
    quality = judge(np.broadcast_to(np.uint8(colour), (2, FRAMES, SIZE, SIZE, 3)), [SCENES[0].prompt] * 2)
    assert quality.isfinite().all()
    assert quality[:, :2].max() < 0.05


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


# --- oracle: its calibration ----------------------------------------------------------------------


def blurred(videos, width=1.0):
    """Roughly what a small autoencoder does to a picture."""
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


# --- the generator's part of the world ------------------------------------------------------------


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
    assert len(other) == len(first)
    assert all(a[1] != b[1] for a, b in zip(first, other))


def test_clips_are_of_the_taught_prompts_and_the_files_name_them(world, clips):
    taught, unseen = ({content.prompt for content in part} for part in generator_prompts(5))
    assert {record["prompt"] for record in clips[1]} == taught
    assert (world / "prompts.txt").read_text().splitlines() == [c.prompt for c in generator_prompts(5)[0]]
    assert set((world / "unseen.txt").read_text().splitlines()) == unseen


def test_clips_state_the_quality_that_they_show(clips, judge):
    videos, records = clips
    true = torch.tensor([record["quality"] for record in records])
    assert true.shape == (48, 3)
    assert true.amin() >= 0
    assert true.amax() <= 1
    assert all(record["fps"] == sprites.FPS and record["num_frames"] == FRAMES for record in records)
    found = judge(videos.movedim(2, -1).numpy(), [record["prompt"] for record in records])
    assert (true.amin(0) < 0.5).all() and (true == 1).any(0).all()  # good ones and bad ones
    assert spearman_corrcoef(found, true).min() > 0.7  # half of them are equal: ties
    assert (found - true).abs().mean(0).max() < 0.1
