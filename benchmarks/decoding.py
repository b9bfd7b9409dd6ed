"""Reading clips: frames from mp4 files against frames that were decoded once, and memory while streaming."""

import io
import json
import multiprocessing
import statistics
import time
from functools import partial
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import av
import numpy as np
import torch
import webdataset
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter
from timing import peak_memory, row, timed
from torchvision.transforms.functional import InterpolationMode, resize

from videoalign.datamodules.frames import FrameReader, encode_frames
from videoalign.datamodules.pairs import PairDecoder
from videoalign.datamodules.shards import ShardSet, ShardWriter
from videoalign.datamodules.stream import ShardStream, Share
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


def as_exported(content: bytes) -> bytes:
    """The clip as ffmpeg and diffusers write it, with x264's defaults: many frames to which no other one refers.

    Args:
        content: An mp4 file.
    """
    buffer = io.BytesIO()
    with av.open(io.BytesIO(content)) as source, av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=24)
        stream.height, stream.width, stream.pix_fmt = 480, 832, "yuv420p"
        for frame in source.decode(video=0):
            frame.pict_type = PictureType.NONE  # the encoder chooses anew
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return buffer.getvalue()


def decode_plainly(content: bytes, sampling: FrameSampling, convert: bool) -> torch.Tensor:
    """Decode every frame, then choose, as a reader of whole clips does.

    Args:
        content: An mp4 file.
        sampling: Frames to keep.
        convert: Whether all frames are converted to RGB; the kept ones if not.
    """
    kept, frames, converter = {*sampling.indices(120, 24.0)}, [], VideoReformatter()
    with av.open(io.BytesIO(content)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(video=0)):
            picture = None
            if convert or number in kept:
                picture = converter.reformat(frame, format="rgb24", threads=1).to_ndarray()
            frames.append(picture)
    video = torch.from_numpy(np.stack([frames[number] for number in sorted(kept)])).permute(0, 3, 1, 2)
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
    for clip, kind in ((content, "mp4"), (as_exported(content), "mp4 of x264's defaults")):
        for convert, name in ((True, "all frames decoded and converted"), (False, "all frames decoded")):
            plainly, ours = partial(decode_plainly, clip, sampling, convert), partial(decode, clip, sampling, 28)
            assert torch.equal(plainly(), ours())
            row(f"{kind}: only what is needed, against {name}", *timed(plainly, ours, repeats=5), 1, "clips/s")


def streaming(folder: Path) -> None:
    """Compare the peak memory of processes that stream 1x and 10x as many shards, and reading with plain webdataset's.

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
    shards = ShardSet(folder / "x10")
    stream = ShardStream(shards.contents(), lambda raw, epoch: (raw.record(), raw.members), Share(80, 8, 1, False))

    def ours() -> int:
        items = (item.value for slots in stream.slots(0) for item in stream.__getitems__(slots))
        return sum(len(members["a.safetensors"]) for _, members in items)

    def plainly() -> int:
        paths = sorted(str(path) for path in (folder / "x10").glob("*.tar"))
        samples = webdataset.WebDataset(paths, shardshuffle=False, empty_check=False)
        return sum(len(sample["a.safetensors"]) for sample in samples if json.loads(sample["json"]))

    assert plainly() == ours()
    row("reading shards, checksums compared: plain webdataset without them", *timed(plainly, ours), 80, "pairs/s")


def scaling(folder: Path) -> None:
    """Compare two ranks that share 2x as many shards with one rank: how many pairs are read and prepared in a second.

    Args:
        folder: Folder of all benchmarks.
    """
    few = frames(folder)
    raws, one, two = list(few), [], []
    for times in (10, 20):
        with ShardWriter(folder / f"s{times}", "pairs", "safetensors", few.index.frames, per_shard=4) as writer:
            for i in range(8 * times):
                raw = raws[i % len(raws)]
                writer.write(f"{i:04d}", {s: raw.members[f"{s}.safetensors"] for s in "ab"}, raw.record())
    for number in range(8):
        for ranks, seconds in ((1, one), (2, two)):
            took = _ranks_read(folder / f"s{10 * ranks}", ranks)
            if number:  # the first round fills the page cache
                seconds.append(took)
    rates = [statistics.median(80 * ranks / seconds for seconds in found) for ranks, found in ((1, one), (2, two))]
    low, high = 2 * min(one) / max(two), 2 * max(one) / min(two)
    name = "two ranks reading 2x as many shards, pairs/s of both over one's"
    print(
        f"{name:68} {rates[1] / rates[0]:6.1f}x  (range {low:.1f}-{high:.1f})  {rates[0]:.1f} -> {rates[1]:.1f} pairs/s"
    )


def _ranks_read(place: Path, ranks: int) -> float:
    """Seconds in which ranks, each a process, read their shares of a set; they begin together."""
    context = multiprocessing.get_context("fork")
    gate, found = context.Barrier(ranks), context.SimpleQueue()
    processes = [context.Process(target=_rank_reads, args=(place, rank, ranks, gate, found)) for rank in range(ranks)]
    for process in processes:
        process.start()
    seconds = max(found.get() for _ in processes)
    for process in processes:
        process.join()
    return seconds


def _rank_reads(place: Path, rank: int, ranks: int, gate: Barrier, found: SimpleQueue) -> None:
    shards = ShardSet(place)
    sampling = FrameSampling(**{key: value for key, value in shards.index.frames.items() if key != "factor"})
    reader = PairDecoder(FrameReader(shards, sampling, 28), 0)
    stream = ShardStream(shards.contents(), reader, Share(len(shards), 2, ranks, True), shuffle_buffer=8, rank=rank)
    gate.wait()
    began = time.perf_counter()
    for slots in stream.slots(0):
        stream.__getitems__(slots)
    found.put(time.perf_counter() - began)
