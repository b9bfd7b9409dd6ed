"""Judges from other environments: the server and the recipe of the documentation, with a stand-in for the model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from videoalign import VideoAlignError
from videoalign.models.http_scores import HTTPScores
from videoalign.models.scoring import scored

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
STAND_IN = '''
"""Stands in for HPSv3: what an image is worth is its brightness, and the number of words of the prompt."""
import numpy as np
from PIL import Image

class HPSv3RewardInferencer:
    def __init__(self, config_path=None, checkpoint_path=None, device="cuda"):
        assert device == "cuda"

    def reward(self, prompts, image_paths):
        assert len(prompts) == len(image_paths)
        light = [np.asarray(Image.open(path)).mean() for path in image_paths]
        return [np.array([value + 1000 * len(p.split()), 0.5]) for p, value in zip(prompts, light)]
'''
OWN = """
def nan(videos, prompts):
    return {"x": [float("nan")] * len(prompts)}

def short(videos, prompts):
    return {"x": [1.0]}

def broken(videos, prompts):
    raise RuntimeError("no memory left")
"""


@pytest.fixture
def served(tmp_path):
    """Starts the documentation's server in a process that finds neither this package nor torch's users."""
    running = []

    def start(function, **environment):
        (tmp_path / "hpsv3.py").write_text(STAND_IN)
        (tmp_path / "own.py").write_text(OWN)
        (tmp_path / "hpsv3_judge.py").write_text((EXAMPLES / "hpsv3_judge.py").read_text())
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), **environment}
        words = [sys.executable, EXAMPLES / "reward_server.py", function, "--port", "0"]
        process = subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
        running.append(process)
        return process.stdout.readline().split(" at ")[1].strip()

    yield start
    for process in running:
        process.kill()
        process.communicate()


def rate(url, **options):
    videos = torch.zeros(2, 4, 3, 8, 8, dtype=torch.uint8)
    videos[1] += torch.arange(4, dtype=torch.uint8).mul(10).view(4, 1, 1, 1)
    reward = HTTPScores(url, retries=0, timeout=20, **options)
    reward.check(["a b"])
    return scored({"far": reward}, videos, None, ["a b", "c"], ["v0", "v1"])


def test_a_judge_of_frames_is_a_reward(served):
    found = rate(served("hpsv3_judge:rate"))
    assert found["far/HPSv3"].tolist() == [2000, 1025]  # the mean of the better half of 0, 10, 20 and 30


@pytest.mark.parametrize(
    ("function", "words"),
    [("own:nan", "500, x has not one finite"), ("own:short", "500, x has"), ("own:broken", "500, .*no memory left")],
)
def test_failures_are_told(served, function, words):
    with pytest.raises(VideoAlignError, match=rf"cannot rate v0, v1: .*{words}"):
        rate(served(function))


def test_the_token_is_wanted(served, monkeypatch):
    url = served("hpsv3_judge:rate", REWARD_TOKEN="a-token-of-some-length")
    with pytest.raises(VideoAlignError, match="401, this server wants its token"):
        rate(url)
    monkeypatch.setenv("MY_TOKEN", "a-token-of-some-length")
    assert rate(url, token="MY_TOKEN")["far/HPSv3"].tolist() == [2000, 1025]


def test_the_page_shows_the_file_whole():
    page = (EXAMPLES.parent / "howto" / "rewards.md").read_text()
    assert (EXAMPLES / "hpsv3_judge.py").read_text() in page
