"""HPSv3 as a judge of videos: the mean over the best frames.

An image reward sees no motion, so weigh it with one that does.

pip install hpsv3, in an environment of its own; then python reward_server.py hpsv3_judge:rate
"""

import functools
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

FRAMES, BEST = 8, 0.5
"""Frames of a video that are looked at, and the share of the best ones whose mean counts."""


@functools.cache
def model():
    """The released model, fetched from the hub when it is first asked."""
    from hpsv3 import HPSv3RewardInferencer

    return HPSv3RewardInferencer(device="cuda")


def rate(videos, prompts):
    """Rewards of videos (B, T, H, W, 3), uint8, for their prompts."""
    rewards = []
    for video, prompt in zip(videos, prompts):
        chosen = video[np.linspace(0, len(video) - 1, min(FRAMES, len(video))).round().astype(int)]
        with tempfile.TemporaryDirectory() as folder:
            paths = [str(Path(folder) / f"{number}.png") for number in range(len(chosen))]
            for path, frame in zip(paths, chosen):
                Image.fromarray(frame).save(path)
            # of each image a mean and a deviation; the mean is the score
            found = sorted(float(one[0]) for one in model().reward(prompts=[prompt] * len(paths), image_paths=paths))
        rewards.append(float(np.mean(found[-max(1, round(BEST * len(found))) :])))
    return {"HPSv3": rewards}
