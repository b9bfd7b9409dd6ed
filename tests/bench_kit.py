"""What the tests of `videoalign bench` share.

These are a reward model, a set of videos, finished runs of the command, and metrics by their definitions.
"""

import contextlib
import io
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import call, flags, noise_clip, strict_json
from videoalign.callbacks.reward_rows import read_rewards
from videoalign.datamodules.shards import ShardWriter
from videoalign.models import VideoReward
from videoalign.models.frame_sampling import FrameSampling
from videoalign.models.processor import RewardProcessor, processor_of
from videoalign.models.video_reward import Statistics

DIMENSIONS, COLUMNS = ("VQ", "MQ", "TA"), ("VQ", "MQ", "TA", "Overall")
VALUES = {"A": 1, "B": -1, "same": 0}
VOTES = {"leftvote": "A", "rightvote": "B", "tievote": "same", "bothbad_vote": "same"}
STD = (0.5, 2.0, 0.25)
BATCH = 2


def walk(labels: list, margins: list) -> float:
    """The official script's walk, as its docstring says: each pair that was passed is called a tie."""
    n, best, passed = len(labels), -1, set()
    for number in sorted(range(n), key=lambda i: abs(margins[i])):
        passed.add(number)
        best = max(best, sum(labels[i] == 0 if i in passed else labels[i] * margins[i] > 0 for i in range(n)))
    return best / n


def exact(labels: list, margins: list, least: float = -1.0) -> float:
    """The best accuracy over all thresholds from ``least`` on that differ; -1 calls no pair a tie."""
    candidates = [e for e in (-1.0, *map(abs, margins)) if e >= least]
    return max(
        sum(y == 0 if abs(m) <= e else y * m > 0 for y, m in zip(labels, margins)) / len(labels) for e in candidates
    )


def four_way(votes: list, margins: list, levels: list) -> float:
    """Accuracy by the definition, over every pair of thresholds."""
    best = 0
    for epsilon, level in itertools.product((-1.0, *map(abs, margins)), (*levels, math.inf)):
        answers = (
            ("tievote" if high >= level else "bothbad_vote")
            if abs(m) <= epsilon
            else "leftvote"
            if m > 0
            else "rightvote"
            if m < 0
            else None
            for m, high in zip(margins, levels)
        )
        best = max(best, sum(answer == vote for answer, vote in zip(answers, votes)))
    return best / len(votes)


@dataclass
class Sample:
    """A video of a set."""

    key: str
    content: bytes
    record: dict


def samples(frames: tuple[int, ...], height: int = 32, width: int = 32, fps: int = 8) -> list[Sample]:
    return [
        Sample(
            f"{i:06d}",
            noise_clip(i, count, height, width + 16 * (i % 2), fps),
            {
                "prompt": f"a red circle number {i}",
                "num_frames": count,
                "fps": float(fps),
                "height": height,
                "width": width + 16 * (i % 2),
            },
        )
        for i, count in enumerate(frames)
    ]


def write(folder: Path, videos: list[Sample], rows: list[dict] | None = None) -> Path:
    with ShardWriter(folder, "videos", per_shard=4) as writer:
        for video in videos:
            writer.write(video.key, {"": video.content}, video.record)
        if rows:
            writer.write_table("pairs.csv", rows)
    return folder


def rated(count: int, seed: int = 0, **fixed: str) -> list[dict]:
    """Every pair of the first ``count`` videos, with labels of every kind."""
    rng = np.random.default_rng(seed)
    rows = []
    for a, b in itertools.combinations(range(count), 2):
        vote = str(rng.choice(list(VOTES)))
        words = {c: str(rng.choice(["A", "B", "same", "invalid", ""], p=[0.3, 0.3, 0.2, 0.1, 0.1])) for c in DIMENSIONS}
        rows.append(
            {
                "key_A": f"{a:06d}",
                "key_B": f"{b:06d}",
                "prompt": f"p {a} {b}",
                "A_model": f"maker-{a % 3}",
                "B_model": f"maker-{b % 4}",
                **words,
                "Overall": VOTES[vote],
                "vote_type": vote,
                **fixed,
            }
        )
    return rows


RATED, SEED = 7, 1


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory, backbone: Path, sampling: FrameSampling) -> Path:
    """A reward model, and a set of eight videos in two shards, seven of them rated. Read only."""
    folder = tmp_path_factory.mktemp("kit")
    torch.manual_seed(0)
    network = VideoReward(backbone, template="plain", sampling=sampling, language="full")
    network.statistics = Statistics([1.0, 2.0, 3.0], list(STD))
    network.save_pretrained(folder / "model")
    write(folder / "world", samples((5, 9, 12, 7, 16, 10, 14, 8)), rated(RATED, SEED))
    return folder


@pytest.fixture
def processor(kit: Path) -> RewardProcessor:
    return processor_of(kit / "model")


def bench(kit: Path, out: Path, *options: object, data: Path | str = "world", model: str = "model") -> int:
    given = flags(model=kit / model, data=kit / data, out=out, device="cpu", workers=0, batch_size=BATCH)
    return call("bench", *given, *options)


def encode_frames(kit: Path, out: Path) -> int:
    """Decode the set once for the model; the exit status."""
    return call("shards", "encode-frames", kit / "world", *flags(out=out, model=kit / "model", workers=1))


@dataclass
class Run:
    """What a run of the command left."""

    out: Path
    text: str
    name: str = "world"

    @property
    def result(self) -> dict:
        return strict_json(self.out / f"{self.name}.json")

    @property
    def rewards(self) -> dict[str, list[float]]:
        return read_rewards(self.out / self.name)


@pytest.fixture(scope="session")
def finished(kit: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """A function that gives a finished run with the given options; each is made once. Read only."""
    runs: dict[tuple, Run] = {}

    def get(*options: object) -> Run:
        if options not in runs:
            out, text = tmp_path_factory.mktemp("out"), io.StringIO()
            with contextlib.redirect_stdout(text):
                assert bench(kit, out, *options) == 0
            runs[options] = Run(out, text.getvalue())
        return runs[options]

    get()
    return get


VGRB, GENAI = ("--benchmark", "videogen-rewardbench"), ("--benchmark", "genai-bench")


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[list]:
    """The videos' grids in every forward pass: (patches in time, height, width)."""
    seen, forward = [], VideoReward.forward

    def spied(self: VideoReward, **inputs: torch.Tensor) -> torch.Tensor:
        seen.append(inputs["video_grid_thw"].tolist())
        return forward(self, **inputs)

    monkeypatch.setattr(VideoReward, "forward", spied)
    return seen


def lines(folder: Path) -> list[str]:
    """The lines that all ranks wrote, sorted."""
    return sorted(line for path in folder.glob("rewards.*.jsonl") for line in path.read_text().splitlines())
