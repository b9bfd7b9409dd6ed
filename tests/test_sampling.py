"""Frames and sizes that the reward model sees, against the released model's preprocessing."""

import dataclasses
import itertools
import json
import math
import random

import pytest
from transformers.models.qwen2_vl.video_processing_qwen2_vl import smart_resize

from videoalign import VideoAlignError
from videoalign.models import FrameSampling
from videoalign.models.benchmark_protocols import PROTOCOLS

FACTOR = 28


# --- frames ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "fps", "count"),
    [
        (126, 24, 10),
        (120, 24, 10),
        (132, 24, 12),  # 11 wanted: halves go to the even number of pairs
        (156, 24, 12),  # 13 wanted
        (97, 24, 8),
        (81, 16, 10),
        (49, 8, 12),
        (48, 24, 4),
        (30, 30, 4),  # the least
        (7, 24, 4),
        (5, 24, 4),
        (4, 8, 4),
        (3, 24, 2),  # fewer than the least
        (2, 8, 2),
        (150, 29.97, 10),
        (20000, 24, 768),  # the most
    ],
)
def test_two_frames_a_second(total, fps, count):
    indices = FrameSampling().indices(total, fps)
    assert len(indices) == count
    assert (indices[0], indices[-1]) == (0, total - 1)


def test_frames_are_evenly_spaced_by_index():
    assert FrameSampling().indices(126, 24) == [0, 14, 28, 42, 56, 69, 83, 97, 111, 125]
    assert FrameSampling().indices(7, 24) == [0, 2, 4, 6]
    assert FrameSampling().indices(3, 24) == [0, 2]


@pytest.mark.parametrize(
    "sampling",
    [
        FrameSampling(),
        FrameSampling(fps=8.0),
        FrameSampling(fps=0.3, min_frames=2),
        FrameSampling(max_frames=6),
        FrameSampling(fps=None, num_frames=6),
    ],
)
def test_frames_are_even_in_number_ascending_and_span_the_clip(sampling):
    for total, fps in itertools.product([*range(2, 60), 121, 500, 1999], (7.5, 8, 24, 60)):
        indices = sampling.indices(total, fps)
        assert len(indices) % 2 == 0
        assert len(indices) >= 2
        assert all(a < b for a, b in itertools.pairwise(indices))
        assert (indices[0], indices[-1]) == (0, total - 1)
        gaps = [b - a for a, b in itertools.pairwise(indices)]
        assert max(gaps) - min(gaps) <= 1


def test_every_frame_but_an_odd_one_at_the_clips_own_rate(sampling):
    assert sampling.indices(8, 8.0) == list(range(8))
    assert len(sampling.indices(9, 8.0)) == 8


@pytest.mark.parametrize(("most", "count"), [(4, 4), (6, 6), (10, 10), (100, 20)])
def test_long_clips_are_sampled_more_sparsely(most, count):
    indices = FrameSampling(max_frames=most).indices(240, 24)
    assert len(indices) == count
    assert indices[-1] == 239


def test_least_number_of_frames_is_a_setting():
    assert len(FrameSampling(min_frames=12).indices(24, 24)) == 12
    assert len(FrameSampling(min_frames=2).indices(24, 24)) == 2


def test_sampling_by_count_needs_no_frame_rate():
    sampling = FrameSampling(fps=None, num_frames=6)
    assert sampling.indices(100, None) == [0, 20, 40, 59, 79, 99]
    assert sampling.indices(5, None) == [0, 1, 3, 4]
    assert sampling.indices(3, 24) == [0, 2]


@pytest.mark.parametrize("total", [0, 1])
def test_a_still_is_refused(total):
    for sampling in (FrameSampling(), FrameSampling(fps=None, num_frames=2)):
        with pytest.raises(VideoAlignError, match=f"{total} frame"):
            sampling.indices(total, 24)


@pytest.mark.parametrize("fps", [None, 0, -24.0, math.nan, math.inf])
def test_a_clip_without_frame_rate_is_refused(fps):
    with pytest.raises(VideoAlignError, match="no frame rate"):
        FrameSampling().indices(48, fps)


# --- sizes ----------------------------------------------------------------------------------------

VIDEOS = [
    (384, 672), (480, 832), (512, 512), (576, 1024), (720, 1280), (768, 1408), (1080, 1920), (1280, 720), (320, 512),
]  # fmt: skip


@pytest.mark.parametrize(
    ("size", "max_pixels", "want"),
    [
        ((752, 1360), 12544, (56, 140)),
        ((720, 1280), 12544, (84, 140)),
        ((720, 1280), 448 * 448, (336, 588)),
        ((480, 832), 448 * 448, (336, 588)),
        ((320, 512), 256 * 256, (196, 308)),
        ((448, 448), 448 * 448, (448, 448)),
    ],
)
def test_known_sizes(size, max_pixels, want):
    assert FrameSampling(max_pixels=max_pixels).size(*size, FACTOR) == want


@pytest.mark.parametrize("factor", [16, 28, 32])
@pytest.mark.parametrize("max_pixels", [12544, 256 * 256, 448 * 448, 10**7])
def test_sizes_keep_the_budget_the_factor_and_the_aspect(factor, max_pixels):
    for height, width in VIDEOS:
        h, w = FrameSampling(max_pixels=max_pixels, min_pixels=0).size(height, width, factor)
        assert h % factor == 0
        assert w % factor == 0
        assert factor**2 <= h * w <= max_pixels
        assert (h - factor) / (w + factor) < height / width < (h + factor) / (w - factor)


@pytest.mark.parametrize("max_pixels", [12544, 256 * 256, 448 * 448])
@pytest.mark.parametrize("min_pixels", [1, 3136, 128 * 28 * 28])
def test_sizes_are_the_released_preprocessings(max_pixels, min_pixels):
    sampling = FrameSampling(max_pixels=max_pixels, min_pixels=min_pixels)
    for height, width in [*VIDEOS, (32, 32), (64, 90), (100, 300), (201, 333)]:
        want = smart_resize(height, width, FACTOR, min_pixels, max_pixels)
        assert sampling.size(height, width, FACTOR) == want


def by_the_rule(height, width, least, most, factor=FACTOR):
    """The released preprocessing's rule: round, then reduce to the budget, or else enlarge to the least area."""
    sides = [max(factor, round(side / factor) * factor) for side in (height, width)]
    area = height * width
    if math.prod(sides) > most:
        return tuple(math.floor(side / math.sqrt(area / most) / factor) * factor for side in (height, width))
    if math.prod(sides) < least:
        return tuple(math.ceil(side * math.sqrt(least / area) / factor) * factor for side in (height, width))
    return tuple(sides)


@pytest.mark.parametrize("seed", range(3))
def test_genai_bench_follows_the_released_rule(seed):
    """This holds although its budget of 256 x 256 is below the least area, so that frames are enlarged beyond it."""
    draw, sampling = random.Random(seed), PROTOCOLS["genai-bench"].sampling
    sizes = [(draw.randint(100, 1100), draw.randint(100, 1100)) for _ in range(2000)]
    enlarged = 0
    for height, width in [*sizes, *((draw.randint(200, 280), draw.randint(200, 280)) for _ in range(300))]:
        want = by_the_rule(height, width, 128 * 28 * 28, 256 * 256)
        assert sampling.size(height, width, FACTOR) == want
        enlarged += math.prod(want) > 256 * 256
    assert enlarged > 200
    assert sampling.size(256, 256, FACTOR) == (336, 336) and sampling.size(320, 512, FACTOR) == (196, 308)


def test_genai_bench_within_its_budget_is_an_option():
    sampling = dataclasses.replace(PROTOCOLS["genai-bench"].sampling, min_pixels=0)
    assert sampling.size(256, 256, FACTOR) == (252, 252) and sampling.size(320, 512, FACTOR) == (196, 308)


def test_small_frames_are_enlarged():
    assert FrameSampling().size(32, 32, FACTOR) == (336, 336)
    h, w = FrameSampling().size(120, 200, FACTOR)
    assert h * w >= FrameSampling().min_pixels
    assert h % FACTOR == w % FACTOR == 0
    assert (h - FACTOR) / w < 120 / 200 < h / (w - FACTOR)


def test_no_least_area_keeps_small_frames_small(sampling):
    assert sampling.size(32, 32, 16) == (32, 32)
    assert sampling.size(40, 70, 16) == (32, 64)  # 2.5 patches go to the even number
    assert sampling.size(5, 100, 16) == (16, 96)  # never nothing


def test_extreme_aspects_are_refused(sampling):
    assert sampling.size(10, 2000, 16)[0] == 16
    for size in ((10, 2001), (2001, 10)):
        with pytest.raises(VideoAlignError, match="aspect ratio"):
            sampling.size(*size, 16)


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fps": None}, "exactly one"),
        ({"num_frames": 8}, "exactly one"),
        ({"fps": 0.0}, "fps must be positive"),
        ({"fps": -1.0}, "fps must be positive"),
        ({"fps": math.nan}, "fps must be positive"),
        ({"fps": math.inf}, "fps must be positive"),
        ({"fps": None, "num_frames": 7}, "num_frames must be an even number"),
        ({"fps": None, "num_frames": 0}, "num_frames must be an even number"),
        ({"min_frames": 3}, "min_frames must be an even number"),
        ({"min_frames": 0}, "min_frames must be an even number"),
        ({"max_frames": 5}, "max_frames must be an even number"),
        ({"max_frames": -2}, "max_frames must be an even number"),
        ({"min_frames": 8, "max_frames": 6}, "min_frames 8 exceeds max_frames 6"),
        ({"max_pixels": 0}, "max_pixels"),
        ({"min_pixels": -1}, "min_pixels"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(VideoAlignError, match=message):
        FrameSampling(**settings)


def test_settings_survive_json():
    for sampling in (FrameSampling(fps=3.5, max_pixels=1000), FrameSampling(fps=None, num_frames=8)):
        assert FrameSampling(**json.loads(json.dumps(sampling.to_dict()))) == sampling
