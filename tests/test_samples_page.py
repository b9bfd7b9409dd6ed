"""The page of clips: what is on the disk, what is escaped, and what a browser plays and steps through."""

import json
import re

import numpy as np
import pytest

from chrome import Chrome, needs_browser
from helpers import files
from videoalign.callbacks.samples_page import SamplesPage
from videoalign.callbacks.side_clips import Clip

EVIL = "</script><script>document.title='hacked'</script> <b>&amp; \"x\""
GREYS = (20, 60, 100, 140, 180, 220)


def film(*greys: int) -> np.ndarray:
    """A video with a grey per frame."""
    return np.stack([np.full((16, 16, 3), grey, np.uint8) for grey in greys])


def clip(prompt="a prompt", sides=None, **options) -> Clip:
    return Clip(sides or {"A one": film(*GREYS), "B two": film(*GREYS[::-1])}, 4.0, prompt, **{"height": 32, **options})


def steps(folder) -> list[int]:
    text = re.search(r'type="application/json">(.*?)</script>', (folder / "samples.html").read_text(), re.S)[1]
    return [validation["step"] for validation in json.loads(text)]


def test_first_and_latest_validations_stay(tmp_path):
    for step in (0, 5, 10, 2_000_000, 15):
        SamplesPage(tmp_path, keep=3).add("val/examples/1", clip(), step)
    assert steps(tmp_path) == [0, 15, 2_000_000]
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["000000", "000015", "2000000"]
    SamplesPage(tmp_path, keep=1).add("val/examples/1", clip(), 2_000_001)
    assert steps(tmp_path) == [2_000_001]


def test_a_clip_is_replaced_and_others_stay(tmp_path):
    page = SamplesPage(tmp_path)
    for tag, prompt in (("val/a/1", "first"), ("val/a.1", "other"), ("val/a/1", "second")):
        page.add(tag, clip(prompt), 3)
    entries = json.loads((tmp_path / "samples/000003/clips.json").read_text())
    assert {entry["tag"]: entry["prompt"] for entry in entries} == {"val/a.1": "other", "val/a/1": "second"}
    assert len({side["file"] for entry in entries for side in entry["sides"]}) == 4
    assert all((tmp_path / side["file"]).stat().st_size for entry in entries for side in entry["sides"])


def test_a_damaged_index_costs_its_validation_alone(tmp_path):
    page = SamplesPage(tmp_path)
    page.add("val/a", clip(), 1)
    (tmp_path / "samples/000001/clips.json").write_text("[{")
    (tmp_path / "samples/notes").mkdir()
    page.add("val/a", clip(), 2)
    assert steps(tmp_path) == [2]
    assert not [name for name in files(tmp_path) if "tmp" in name or name.startswith(".")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "a run? #1 %41"
    page = SamplesPage(folder)
    for step in (4, 8):
        page.add("val/mistakes/1", clip(EVIL, {f"A {EVIL}": film(*GREYS), "B": film(*GREYS)}, table=[["", EVIL]]), step)
        page.add("val/mistakes/2", clip("the second", {"A": film(*GREYS), "short": film(*GREYS[:3])}), step)
    return folder


@needs_browser
def test_a_browser_plays_both_in_step_and_goes_by_frames(folder):
    with Chrome(1000, 900) as page:
        page.open((folder / "samples.html").as_uri())
        page.until("videos.length == 2 && videos.every(v => v.readyState >= 2)")
        page.until("videos.every(v => v.currentTime > 0.3)")  # it plays by itself
        assert page.look("Math.abs(videos[0].currentTime - videos[1].currentTime)") < 0.3
        page.key(" ")
        page.until("videos.every(v => v.paused)")
        for _ in range(8):
            page.key("ArrowLeft")
        page.until("frame() == 0 && videos.every(v => !v.seeking)")
        for number in range(1, len(GREYS)):
            page.key("ArrowRight")
            page.until(f"frame() == {number} && videos.every(v => !v.seeking)")
            assert page.look("videos.map(v => Math.floor(v.currentTime * 4))") == [number, number]
        page.key("ArrowRight")
        assert page.look("document.getElementById('seek').value") == "5"  # the last frame stays
        assert page.look("document.getElementById('frame').textContent") == "frame 6 of 6"


@needs_browser
def test_a_browser_changes_clips_and_steps_and_shows_texts_as_they_are(folder):
    with Chrome(1000, 900) as page:
        page.open((folder / "samples.html").as_uri())
        page.until("videos.length == 2 && videos.every(v => v.readyState >= 2)")
        assert page.look("document.getElementById('prompt').textContent") == EVIL
        assert page.look("document.querySelector('figcaption').textContent") == f"A {EVIL}"
        assert page.look("document.querySelectorAll('#table th')[1].textContent") == EVIL
        assert page.look("document.title").startswith("Samples of")
        assert page.look("document.getElementById('step').selectedOptions[0].textContent") == "8"
        page.key("2")
        page.until("document.getElementById('prompt').textContent == 'the second'")
        page.key("[")
        page.until("document.getElementById('step').selectedOptions[0].textContent == '4'")
        page.until("videos.length == 2 && videos.every(v => v.readyState >= 2 && v.src.includes('000004'))")
        page.key(" ")
        for _ in range(8):
            page.key("ArrowRight")
        page.until("frame() == 5 && videos.every(v => !v.seeking)")  # the shorter video stays on its last frame
        assert page.look("Math.floor(videos[1].currentTime * 4)") == 2
        page.key("ArrowUp")
        page.until("document.querySelector('[aria-current=true]').textContent.startsWith('1')")
        page.key("]")
        page.until("document.getElementById('step').selectedOptions[0].textContent == '8'")
