"""Symmetries of the miniature world: what they do to pixels and prompts, and that the oracle rates the result alike."""

import random

import numpy as np
import pytest
import torch

from videoalign import VideoAlignError
from videoalign.miniature.world.oracle import Oracle
from videoalign.miniature.world.sprites import BY_PROMPT, SCENES, SIZE, SOURCES, Flaws, render, shown
from videoalign.miniature.world.symmetries import Symmetries, transformed


@pytest.fixture(scope="module")
def clips():
    """Clips (N, T, 3, H, W) of every scene by every source, and their prompts."""
    rng = np.random.default_rng(0)
    videos = []
    for number, scene in enumerate(SCENES):
        flaws = SOURCES[number % len(SOURCES)].sample(rng)
        videos.append(render(shown(scene, flaws.wrong, rng), flaws, rng))
    return torch.from_numpy(np.stack(videos)).permute(0, 1, 4, 2, 3), [scene.prompt for scene in SCENES]


@pytest.fixture(scope="module")
def oracle():
    return Oracle.calibrated()


class Drawn(random.Random):
    """Gives numbers that a test has chosen: mirror left-right, up-down, turn, shifts of both clips along x and y."""

    def __init__(self, *numbers):
        super().__init__(0)
        self.numbers = list(numbers)

    def random(self):
        return self.numbers.pop(0)


def changed(clips, right=False, down=False, turned=False, x=0, y=0):
    """All clips under one change, and their prompts."""
    symmetries, found, prompts = Symmetries(shift=3), [], []
    for video, prompt in zip(*clips):
        heads = (0.0 if head else 0.9 for head in (right, down, turned))
        place = (x + 3.5) / 7, (y + 3.5) / 7
        rng = Drawn(*heads, *place, *place)
        (first, second), text = symmetries((video, video), prompt, rng)
        assert torch.equal(first, second) and not rng.numbers
        found.append(first)
        prompts.append(text)
    return torch.stack(found), prompts


def rated(oracle, videos, prompts):
    return oracle(videos.permute(0, 1, 3, 4, 2).numpy(), prompts)


def test_prompts_stay_in_the_world_and_say_what_is_seen():
    def text(prompt, **change):
        return transformed(BY_PROMPT[prompt], **change).prompt

    assert text("a red bar moves upwards", turned=True) == "a red pole moves to the left"
    assert text("a red pole moves to the right", turned=True) == "a red bar moves downwards"
    assert text("a blue circle moves to the left", right=True, down=True) == "a blue circle moves to the right"
    assert text("a blue circle moves to the left", right=True, turned=True) == "a blue circle moves downwards"
    for change in ({"right": True}, {"down": True}, {"turned": True}, {"right": True, "down": True, "turned": True}):
        assert {transformed(scene, **change).prompt for scene in SCENES} == set(BY_PROMPT)  # one to one


@pytest.mark.parametrize("right, down", [(True, False), (False, True), (True, True)])
def test_a_mirrored_clip_is_rated_as_before(right, down, clips, oracle):
    before, after = rated(oracle, *clips), rated(oracle, *changed(clips, right, down))
    torch.testing.assert_close(after, before, atol=1e-4, rtol=0)


def test_a_turned_clip_is_rated_as_before_but_for_its_ground(clips, oracle):
    """The oracle takes the ground of a row for one colour; turned, the gradient lies along the rows."""
    before, after = rated(oracle, *clips), rated(oracle, *changed(clips, turned=True))
    assert (after - before).abs().mean(0).tolist() == pytest.approx([0.0, 0.0, 0.0], abs=0.05)
    assert (after - before)[:, 1:].abs().mean() < 0.01
    assert all(np.corrcoef(a, b)[0, 1] > 0.92 for a, b in zip(after.T.numpy(), before.T.numpy()))


@pytest.mark.parametrize("x, y", [(1, 0), (0, -1), (3, -3), (-3, 2)])
def test_a_shifted_clip_is_rated_nearly_as_before(x, y, clips, oracle):
    """Where a sprite touches the edge it is cut or lengthened, and the oracle finds it a little nearer or farther."""
    before, after = rated(oracle, *clips), rated(oracle, *changed(clips, x=x, y=y))
    assert (after - before).abs().mean() < 0.02
    assert all(np.corrcoef(a, b)[0, 1] > 0.97 for a, b in zip(after.T.numpy(), before.T.numpy()))


def test_pixels_are_those_of_numpy(clips):
    video = clips[0][:1]
    one = (video, clips[1][:1])
    for right, down, turned, x, y in [(1, 0, 0, 0, 0), (0, 1, 1, 2, 0), (1, 1, 1, -3, 1), (0, 0, 1, 0, 3)]:
        wide = np.pad(video[0].numpy(), [(0, 0), (0, 0), (3, 3), (3, 3)], mode="edge")
        want = wide[:, :, 3 - y : 3 - y + SIZE, 3 - x : 3 - x + SIZE]
        want = want[..., ::-1] if right else want
        want = want[:, :, ::-1] if down else want
        want = want.swapaxes(2, 3) if turned else want
        found, _ = changed(one, right, down, turned, x, y)
        assert np.array_equal(found[0].numpy(), want) and found.is_contiguous()


def test_a_mirrored_render_is_the_render_of_the_changed_prompt():
    """A clip that is mirrored left to right is what the changed scene renders with mirrored draws, ground included."""
    scene = BY_PROMPT["a green bar moves to the right"]
    flaws, draws = Flaws(fade=0.3, freeze=0.4), (np.random.default_rng(4) for _ in range(2))
    # a path off the middle would be on the other side of it
    clip, other = (render(s, flaws, rng, spread=0.0) for s, rng in zip((scene, transformed(scene, right=True)), draws))
    assert np.abs(clip[:, :, ::-1].astype(int) - other).max() <= 1  # halves are rounded either way


def test_each_clip_is_shifted_by_itself(clips):
    video, prompt = clips[0][0], clips[1][0]
    places = [(x + 3.5) / 7 for x in (2, -1, -3, 0)]
    (first, second), _ = Symmetries(shift=3)((video, video), prompt, Drawn(0.9, 0.9, 0.9, *places))
    assert torch.equal(first, changed((video[None], [prompt]), x=2, y=-1)[0][0])
    assert torch.equal(second, changed((video[None], [prompt]), x=-3, y=0)[0][0])


def test_draws_are_as_many_for_every_setting_and_cover_all_changes():
    video, prompt = torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8), "a red bar moves upwards"
    states, prompts = set(), set()
    for settings in ({}, {"flip": False}, {"transpose": False, "shift": 0}):
        rng = random.Random(3)
        for _ in range(40):
            (_, text) = Symmetries(**settings)((video, video), prompt, rng)
            prompts |= {text} if not settings else set()
            assert settings != {"flip": False} or text in (prompt, "a red pole moves to the left")
        states.add(rng.getstate())
    assert len(states) == 1
    assert prompts == {
        "a red bar moves upwards", "a red bar moves downwards", "a red pole moves to the left",
        "a red pole moves to the right",
    }  # fmt: skip


def test_what_is_no_clip_of_the_world_is_refused():
    with pytest.raises(VideoAlignError, match="shift of Symmetries must not be negative, got -1"):
        Symmetries(shift=-1)
    video = torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8)
    with pytest.raises(VideoAlignError, match=r"'a cat' is none of the miniature world.*data\.augment"):
        Symmetries()((video, video), "a cat", random.Random(0))
