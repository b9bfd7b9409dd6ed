"""Reading a clip for the reward model against decord, as the official code does, and torchcodec: where they are there.

Both come with `pip install decord torchcodec`; torchcodec needs FFmpeg's libraries too.
"""

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch
from timing import row, timed
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, resize

from videoalign.datamodules.video import decode
from videoalign.models import FrameSampling

SIZES = {"720p": (720, 1280), "1080p": (1080, 1920)}
SECONDS, RATE = 5, 24
APART = 1.5
"""Largest mean difference of grey levels: the libraries convert colours with roundings of their own."""


def decoders(folder: Path) -> None:
    """Time decoding and resizing at 2 fps, one thread each.

    Args:
        folder: Folder of all benchmarks.
    """
    sampling = FrameSampling()
    indices, rest = sampling.indices(SECONDS * RATE, RATE), []
    for name, read in PEERS.items():
        try:
            importlib.import_module(name)
        except Exception as error:  # torchcodec says with a RuntimeError that it finds no FFmpeg
            rest.append(f"{name} is not run here ({str(error).splitlines()[0][:100]})")
            continue
        for label, (height, width) in SIZES.items():
            path = folder / f"{label}.mp4"
            if not path.exists():
                _write(path, height, width)
            size = list(sampling.size(height, width, 28))
            theirs, content = partial(_resized, read, path, indices, size), path.read_bytes()
            ours = partial(decode, content, sampling, 28)
            apart = float((theirs().float() - ours().float()).abs().mean())
            assert apart < APART, f"{name} and this package read other frames: {apart} grey levels apart"
            row(f"{label} H.264, decoded and resized at 2 fps, against {name}", *timed(theirs, ours), 1, "clips/s")
    print(*rest, sep="\n")


def _write(path: Path, height: int, width: int) -> None:
    """A clip of moving waves and some noise, as ffmpeg and diffusers write it: with x264's defaults."""
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:height, :width]
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=RATE)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for t in range(SECONDS * RATE):
            waves = [np.sin(x / 60 + phase + t / 9) * np.cos(y / 40 - phase) for phase in (0.5, 2.0, 4.0)]
            picture = 127 + 90 * np.stack(waves, -1) + rng.normal(0, 1, (height, width, 1))
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8))))
        out.mux(stream.encode(None))


def _resized(read: Callable[[Path, list[int]], Tensor], path: Path, indices: list[int], size: list[int]) -> Tensor:
    """Frames (T, 3, H, W) as the official code resizes them."""
    return resize(read(path, indices), size, InterpolationMode.BICUBIC, antialias=True)


def _decord(path: Path, indices: list[int]) -> Tensor:
    import decord

    frames = decord.VideoReader(str(path), num_threads=1).get_batch(indices).asnumpy()
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


def _torchcodec(path: Path, indices: list[int]) -> Tensor:
    from torchcodec.decoders import VideoDecoder

    return VideoDecoder(str(path), num_ffmpeg_threads=1).get_frames_at(indices).data


PEERS = {"decord": _decord, "torchcodec": _torchcodec}
