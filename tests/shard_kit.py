"""What the tests of sets on disk share: sound sets of each kind."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import plain_clip
from videoalign.datamodules.benchmark import PAIRS
from videoalign.datamodules.frames import encode_frames
from videoalign.datamodules.shards import ShardSet, ShardWriter
from videoalign.models.frame_sampling import FrameSampling

GLANCE = FrameSampling(fps=None, num_frames=2, min_pixels=0)
SAMPLES, PER_SHARD = 7, 3


def clip(number: int) -> bytes:
    """Six frames of 16 x 16 whose brightness tells the number."""
    return plain_clip(10 + 12 * number, 6, 16, 16)


def record(number: int) -> dict:
    return {
        "prompt": f"clip number {number}",
        "labels": {"VQ": "A", "MQ": "B", "TA": "same", "Overall": "invalid"},
        "scores": {"A": {"VQ": 4.5, "MQ": 2, "TA": 3}, "B": {"VQ": 1 + number % 5, "MQ": 5}},
        "sources": {"A": "mist", "B": "clear"},
        "num_frames": {"A": 6, "B": 6},
    }


def write_pairs(out: Path, samples: int = SAMPLES, per_shard: int = PER_SHARD) -> Path:
    with ShardWriter(out, "pairs", per_shard=per_shard) as writer:
        for i in range(samples):
            writer.write(f"{i:06d}", {"a": clip(i), "b": clip(i + 8)}, record(i))
    return out


def write_videos(out: Path, samples: int = 4) -> Path:
    with ShardWriter(out, "videos", per_shard=PER_SHARD) as writer:
        for i in range(samples):
            writer.write(
                f"{i:06d}", {"": clip(i)}, {"prompt": "one prompt", "source": f"model-{i % 2}", "num_frames": 6}
            )
        rows = [
            {"key_A": f"{i:06d}", "key_B": f"{i + 1:06d}", "VQ": "A", "MQ": "same", "TA": "B", "Overall": "A"}
            for i in range(samples - 1)
        ]
        writer.write_table(PAIRS, rows)
    return out


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a sound set of each kind; a test copies a set before it damages it."""
    folder = tmp_path_factory.mktemp("sets")
    write_pairs(folder / "pairs")
    write_videos(folder / "videos")
    list(encode_frames(ShardSet(folder / "pairs"), folder / "frames", GLANCE, 16))
    return folder


def edit_index(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        index = json.loads((folder / "index.json").read_text())
        change(index)
        (folder / "index.json").write_text(json.dumps(index))

    return damage
