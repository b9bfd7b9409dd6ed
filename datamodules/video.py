"""Decoding: an encoded clip -> the sampled, resized frames of it, converting only frames that are kept."""

import io
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, resize

from .. import VideoAlignError
from ..models.sampling import FrameSampling

# Containers of video files. Others that libav knows are texts, lists of further files, devices or bare streams.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif,mxf,ivf"
# Declared and decodable frame counts of sound files differ by a frame or two (edit lists); more means damage.
_COUNT_SLACK = 2


class VideoError(VideoAlignError):
    """A clip that cannot be used; the message names it and says why."""


@dataclass(frozen=True)
class Clip:
    """What a container says of its video.

    Attributes:
        frames: number of frames. fps: average frames per second, None where unstated. height, width: as shown, pixels.
    """

    frames: int
    fps: float | None
    height: int
    width: int


def probe(source: bytes | str | Path, name: str = "video") -> Clip:
    """Frame count, average frame rate and size, without decoding pictures (the first one apart, for its rotation).

    Args:
        source: path or content of a video file. name: what to call it in messages.

    Raises:
        VideoError: missing, empty, truncated or no video.
    """
    with _opened(source, name) as container:
        clip = _clip(container, name)
        first = next(container.decode(video=0), None)
    turned = first is not None and round(first.rotation / 90) % 2
    return replace(clip, height=clip.width, width=clip.height) if turned else clip


def coding(source: bytes | str | Path, name: str = "video") -> tuple[str, str]:
    """Codec and pixel format, as FFmpeg calls them. Args and errors: see :func:`probe`."""
    with _opened(source, name) as container:
        context = container.streams.video[0].codec_context
        return context.codec.canonical_name, context.pix_fmt or ""


def decode(source: bytes | str | Path, sampling: FrameSampling, factor: int, name: str = "video") -> Tensor:
    """Sampled and resized frames.

    Frames are chosen by index, so that a clip of variable frame rate is sampled as the released reward model saw it.
    Rotation metadata is applied; audio and further streams are ignored.

    Args:
        source: path or content of a video file. sampling: which frames, at what size.
        factor: frame sides become multiples of this (patch x merge). name: what to call the clip in messages.

    Returns:
        uint8 (T, 3, H, W).

    Raises:
        VideoError: missing, empty, truncated, no video, one frame only, or no frame rate where one is needed.
    """
    with _opened(source, name) as container:
        clip = _clip(container, name)
        indices = _indices(sampling, clip.frames, clip.fps, name)
        frames, count = _read(container, set(indices), name)
    if len(frames) < len(indices):  # the declared count was too high
        if count < clip.frames - _COUNT_SLACK:
            raise VideoError(
                f"{name} is truncated: it declares {clip.frames} frames, but only {count} could be decoded"
            )
        with _opened(source, name) as container:
            frames, _ = _read(container, set(_indices(sampling, count, clip.fps, name)), name)
    if len({frame.shape for frame in frames}) > 1:
        raise VideoError(f"{name}: the size of its frames changes in the middle of the clip")
    return _resized(
        torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2), sampling, factor, name
    )  # (T, H, W, 3) -> (T, 3, H, W)


def resample(video: Tensor, fps: float, sampling: FrameSampling, factor: int, name: str = "video") -> Tensor:
    """What :func:`decode` would give of a video that was never encoded.

    Args:
        video: all frames, uint8 (T, 3, H, W). fps: their rate. sampling, factor: see :func:`decode`.
    """
    return _resized(video[_indices(sampling, len(video), fps, name)], sampling, factor, name)


def _resized(video: Tensor, sampling: FrameSampling, factor: int, name: str) -> Tensor:
    try:
        size = sampling.size(*video.shape[-2:], factor)
    except VideoAlignError as error:
        raise VideoError(f"{name}: {error}") from None
    if size == tuple(video.shape[-2:]):
        return video.contiguous()
    return resize(video, list(size), InterpolationMode.BICUBIC, antialias=True)


def _indices(sampling: FrameSampling, total: int, fps: float | None, name: str) -> list[int]:
    try:
        return sampling.indices(total, fps)
    except VideoAlignError as error:
        raise VideoError(f"{name}: {error}") from None


class _opened:
    """A container and its libav errors, turned into messages that name the clip."""

    def __init__(self, source: bytes | str | Path, name: str) -> None:
        if isinstance(source, str | Path):
            if not Path(source).is_file():
                raise VideoError(f"{name}: there is no file {source}")
            empty = Path(source).stat().st_size == 0
        else:
            empty = not source
        if empty:
            raise VideoError(f"{name} is empty (0 bytes)")
        self.source = io.BytesIO(source) if isinstance(source, bytes) else str(source)
        self.name = name

    def __enter__(self) -> av.container.InputContainer:
        try:
            self.container = av.open(self.source, options={"format_whitelist": _FORMATS})
        except (av.error.FFmpegError, ValueError) as error:
            raise VideoError(f"{self.name} is no readable video, or is cut short ({_short(error)})") from None
        if not self.container.streams.video:
            self.container.close()
            raise VideoError(f"{self.name} holds no video stream")
        if self.container.streams.video[0].codec_context is None:
            self.container.close()
            raise VideoError(f"{self.name} is of a video codec that this build of libav cannot decode")
        # One thread: the loader's workers are the parallelism, and frame threads delay the first picture.
        self.container.streams.video[0].codec_context.thread_count = 1
        return self.container

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self.container.close()
        if isinstance(error, av.error.FFmpegError):
            raise VideoError(f"{self.name} cannot be decoded ({_short(error)})") from None


def _short(error: Exception) -> str:
    return str(error).splitlines()[0][:120]


def _clip(container: av.container.InputContainer, name: str) -> Clip:
    stream = container.streams.video[0]
    rate = stream.average_rate or stream.guessed_rate
    frames = stream.frames
    if not frames:  # webm and others state no count: walk over the packets, which decodes nothing
        frames = sum(1 for packet in container.demux(stream) if packet.size)
        container.seek(0)
    if not frames:
        raise VideoError(f"{name} holds no frame")
    return Clip(frames, float(rate) if rate else None, stream.height, stream.width)


# One converter a clip, and one thread: a new one for each frame starts as many threads as there are cores, which takes a
# hundred times longer than to convert a small frame; clips are read by several processes anyway.
def _read(container: av.container.InputContainer, wanted: set[int], name: str) -> tuple[list[np.ndarray], int]:
    """The wanted frames as (H, W, 3) uint8 in order, and how many frames were met on the way."""
    frames: list[np.ndarray] = []
    last, count = max(wanted), 0
    converter = VideoReformatter()
    for frame in container.decode(video=0):
        if count in wanted:
            picture = converter.reformat(frame, format="rgb24", threads=1).to_ndarray()
            frames.append(np.rot90(picture, round(frame.rotation / 90)) if frame.rotation else picture)
        count += 1
        if count > last:
            break
    if not frames:
        raise VideoError(f"{name} is truncated: no frame could be decoded")
    return frames, count


def encode(frames: np.ndarray, fps: int, crf: int = 12) -> bytes:
    """An mp4 (H.264) of RGB frames; the same frames give the same bytes.

    Args:
        frames: uint8 (T, H, W, 3), even H and W. fps: frames per second. crf: quality, 0 lossless to 51.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        options = {"crf": str(crf), "preset": "ultrafast", "threads": "1"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        converter = VideoReformatter()
        for picture in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            container.mux(stream.encode(converter.reformat(frame, format="yuv420p", threads=1)))
        container.mux(stream.encode(None))
    return buffer.getvalue()
