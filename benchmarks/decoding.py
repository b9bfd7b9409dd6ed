"""Reading clips: frames from mp4 files against frames that were decoded once, and memory while streaming."""

import io
from pathlib import Path

import av
import numpy as np
import torch
from timing import peak_memory, row, timed
from torchvision.transforms.functional import InterpolationMode, resize

from videoalign.datamodules.frames import FrameReader, encode_frames
from videoalign.datamodules.shards import ShardSet, ShardWriter
from videoalign.datamodules.video import decode, encode
from videoalign.models import FrameSampling


def clips(folder: Path) -> ShardSet:
    """Eight pairs of 480 x 832 clips of 5 seconds at 24 fps, as generators write them; encoded once.

    Args:
        folder: Folder of all benchmarks; the set is its ``mp4``.
    """
    if not (folder / "mp4").exists():
        rng = np.random.default_rng(0)
        videos = [encode(_waves(rng), 24, crf=23) for _ in range(4)]
        with ShardWriter(folder / "mp4", "pairs", per_shard=4) as writer:
            for i in range(8):
                record = {"prompt": "waves", "labels": {"VQ": "A", "MQ": "B", "TA": "same"}}
                writer.write(f"{i:04d}", {"a": videos[i % 4], "b": videos[(i + 1) % 4]}, record)
    return ShardSet(folder / "mp4")


def _waves(rng: np.random.Generator) -> np.ndarray:
    """A noisy clip, uint8 (120, 480, 832, 3)."""
    y, x = np.mgrid[:480, :832]
    phases = rng.uniform(0, 6, 3)

    def channel(t: int, phase: float) -> np.ndarray:
        waves = np.sin(x / 60 + phase + t / 9) * np.cos(y / 40 - phase)
        return 127 + 90 * waves + rng.normal(0, 4, y.shape)

    frames = np.stack([np.stack([channel(t, phase) for phase in phases], -1) for t in range(120)])
    return frames.clip(0, 255).astype(np.uint8)


def frames(folder: Path) -> ShardSet:
    """The same pairs as frames that were decoded once.

    Args:
        folder: Folder of all benchmarks; the set is its ``frames``.
    """
    if not (folder / "frames").exists():
        for _ in encode_frames(clips(folder), folder / "frames", FrameSampling(), 28):
            pass
    return ShardSet(folder / "frames")


def decode_all(content: bytes, sampling: FrameSampling) -> torch.Tensor:
    """Convert every frame, then choose, as a reader of whole clips does.

    Args:
        content: An mp4 file.
        sampling: Frames to keep.
    """
    with av.open(io.BytesIO(content)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    video = torch.from_numpy(np.stack([frames[i] for i in sampling.indices(len(frames), 24.0)])).permute(0, 3, 1, 2)
    return resize(video, list(sampling.size(480, 832, 28)), InterpolationMode.BICUBIC, antialias=True)


def decoding(folder: Path) -> None:
    """Time pairs from mp4 shards, and from frames that were decoded once.

    Args:
        folder: Folder of all benchmarks.
    """
    sampling, mp4, cached = FrameSampling(), clips(folder), frames(folder)
    read_mp4, read_frames = FrameReader(mp4, sampling, 28), FrameReader(cached, sampling, 28)
    assert all(torch.equal(a, b) for x, y in zip(mp4, cached) for a, b in zip(read_mp4(x), read_frames(y)))
    every_mp4, every_frame = lambda: [read_mp4(raw) for raw in mp4], lambda: [read_frames(raw) for raw in cached]
    slow, fast = timed(every_mp4, every_frame, repeats=3)
    row("pairs from frame-cached shards against decoding mp4 each time", slow, fast, 8, "pairs/s")
    content = next(iter(mp4)).members["a.mp4"]
    assert torch.equal(decode_all(content, sampling), decode(content, sampling, 28))
    slow, fast = timed(lambda: decode_all(content, sampling), lambda: decode(content, sampling, 28), repeats=5)
    row("mp4: only the kept frames converted against all of them", slow, fast, 1, "clips/s")


def streaming(folder: Path) -> None:
    """Compare the peak memory of processes that stream 1x and 10x as many shards.

    Args:
        folder: Folder of all benchmarks.
    """
    few, peaks = frames(folder), []
    raws = list(few)
    for times in (1, 10):
        place = folder / f"x{times}"
        with ShardWriter(place, "pairs", "safetensors", few.index.frames, per_shard=4) as writer:
            for i in range(8 * times):
                raw = raws[i % len(raws)]
                videos = {side: raw.members[f"{side}.safetensors"] for side in "ab"}
                writer.write(f"{i:04d}", videos, raw.record())
        peaks.append(peak_memory("peak_of_streaming.py", place))
    name = "peak memory while streaming 10x as many shards"
    print(f"{name:68} {peaks[1] / peaks[0]:6.3f}x  {peaks[0]:.0f} -> {peaks[1]:.0f} MiB")
