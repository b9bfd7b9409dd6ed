"""Decoding of clips to sampled and resized frames; each frame is resized when it is decoded, and the others dropped."""

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch import Tensor
from torch.nn.functional import interpolate

from .. import VideoAlignError
from ..models.frame_sampling import FrameSampling
from .container import Clip, Film, VideoError, frame_rate, opened, survey

__all__ = ["Clip", "VideoError", "coding", "decode", "encode", "examine", "probe", "resample"]


def probe(source: bytes | str | Path, name: str = "video") -> Clip:
    """Frame count, frame rate and size; decodes no picture but the first one, for its rotation.

    Args:
        source: Path or content of a video file.
        name: What to call the clip in messages.

    Raises:
        VideoError: If the file is missing, empty, truncated, too large, or no video.
    """
    film = survey(source, name)
    with opened(source, name) as container:
        first = next(container.decode(container.streams[film.index]), None)
    return _turned(film.clip, round(first.rotation / 90) if first else 0)


def coding(source: bytes | str | Path, name: str = "video") -> tuple[str, str]:
    """Codec and pixel format under FFmpeg's names.

    Args:
        source: Path or content of a video file.
        name: What to call the clip in messages.

    Raises:
        VideoError: As in :func:`probe`.
    """
    film = survey(source, name)
    with opened(source, name) as container:
        context = container.streams[film.index].codec_context
        return context.codec.canonical_name, context.pix_fmt or ""


def decode(source: bytes | str | Path, sampling: FrameSampling, factor: int, name: str = "video") -> Tensor:
    """Decode a clip to sampled and resized frames.

    Frames are chosen by index, so that a clip of variable frame rate is sampled as the released reward model saw it.
    Rotation metadata is applied; audio and further streams are ignored. Pixels that are not square are stretched as
    players and browsers do, because people rate the picture on the screen. The official code (decord) takes them for
    square, so that the two differ on such clips alone.

    Args:
        source: Path or content of a video file.
        sampling: Frame sampling of the model.
        factor: Frame sides become multiples of this (patch x merge).
        name: What to call the clip in messages.

    Returns:
        Frames, uint8 (T, 3, H, W).

    Raises:
        VideoError: If the file is missing, empty, truncated, damaged, too large or no video, or if it has one frame
            only, or no frame rate where one is needed.
    """
    return _decoded(source, sampling, factor, name)[0]


def examine(source: bytes | str | Path, sampling: FrameSampling, name: str = "video") -> Clip:
    """Frame count, frame rate and size of a clip, after decoding all of its frames.

    Args:
        source: Path or content of a video file.
        sampling: Frame sampling, whose requirements the clip must meet.
        name: What to call the clip in messages.

    Raises:
        VideoError: As in :func:`decode`.
    """
    return _decoded(source, sampling, 2, name, every=True)[1]


def _decoded(
    source: bytes | str | Path, sampling: FrameSampling, factor: int, name: str, every: bool = False
) -> tuple[Tensor, Clip]:
    """Sampled frames, and the clip as it is shown; ``every`` decodes the other frames too, and so meets damage."""
    film = survey(source, name)
    film = replace(film, times=()) if every else film
    while True:
        reader = _Reader(film, name)
        indices = _indices(sampling, film.clip.frames, film.clip.fps, name)
        places: dict[int, list[int]] = {}  # several of an index where frames are repeated
        for place, index in enumerate(indices):
            places.setdefault(index, []).append(place)
        video = torch.empty(0)
        for index, frame in reader.frames(source, set(places), sampling, factor):
            video = video if len(video) else torch.empty(len(indices), *frame.shape, dtype=torch.uint8)
            for place in places[index]:
                video[place] = frame
        if reader.count == film.clip.frames:
            return video, _turned(film.clip, reader.turns)
        if film.times:  # frames are missing: which ones, only decoding all of them tells
            film = replace(film, times=())
            continue
        if not reader.count:
            raise VideoError(f"{name} is truncated: no frame could be decoded")
        # Not every packet gives a frame: some are hidden, fields come in pairs, or their reference frame was cut off.
        film = replace(film, clip=reader.clip())


class _Reader:
    """Decodes a clip from its beginning to its end.

    Args:
        film: Video stream of the file.
        name: What to call the clip in messages.

    Attributes:
        count: Number of frames so far: decoded ones, and those that were left out because nothing needs them.
        turns: Rotation in quarters of a circle, counter-clockwise.
        times: Presentation time stamps of the frames, in ticks.
        hold: Duration of the latest frame, in ticks.
    """

    def __init__(self, film: Film, name: str) -> None:
        self.film, self.name, self.count, self.turns = film, name, 0, 0
        self.times: list[int] = []
        self.hold = 0

    def frames(
        self, source: bytes | str | Path, wanted: set[int], sampling: FrameSampling, factor: int
    ) -> Iterator[tuple[int, Tensor]]:
        """Indices of the wanted frames, and the frames, resized, in grey levels (3, H, W)."""
        # One converter per clip, and one thread: a converter per frame starts as many threads as there are cores, which
        # takes a hundred times longer than the conversion of a small frame; several processes read clips anyway.
        converter, size = VideoReformatter(), None
        with opened(source, self.name) as container:
            stream = container.streams[self.film.index]
            self.tick = stream.time_base
            for index, frame in self._needed(container, stream, wanted):
                self._look(frame)
                if size not in (None, size := (frame.height, frame.width, frame.rotation)):
                    raise VideoError(f"{self.name}: the size of its frames changes in the middle of the clip")
                if index in wanted:
                    picture = converter.reformat(frame, format="rgb24", threads=1).to_ndarray()
                    yield index, self._resized(np.rot90(picture, self.turns), sampling, factor)
                self.count += 1

    def _needed(
        self, container: av.container.InputContainer, stream: av.VideoStream, wanted: set[int]
    ) -> Iterator[tuple[int, av.VideoFrame]]:
        """Indices and frames, but for frames of H.264 that are not wanted and that no other frame is predicted from.

        Time stamps tell which frame a packet holds, and the decoder knows which packets no other one refers to. Frames
        before the first one that is shown may be missing in a cut clip, both fields of a frame may be packets of their
        own, and a clock may jump back: so nothing is left out before a frame came, and this ends at fields and at
        frames that come out of turn, with ``count`` below the number of packets.
        """
        context, place = stream.codec_context, {time: index for index, time in enumerate(self.film.times)}
        if not place or context.codec.canonical_name != "h264":
            yield from enumerate(container.decode(stream))
            return
        latest, left_out = -1, set()
        for packet in container.demux(stream):
            index = place.get(packet.pts, -1)
            spare = index > latest >= 0 and index not in wanted
            context.skip_frame = "NONREF" if spare else "DEFAULT"
            if spare:
                left_out.add(index)
            for frame in packet.decode():
                index = place.get(frame.pts, -1)
                if index <= latest or frame.interlaced_frame:
                    return
                latest = index
                left_out.discard(index)
                yield index, frame
        self.count += len(left_out)

    def _look(self, frame: av.VideoFrame) -> None:
        if frame.is_corrupt and self.count and self.film.strict:  # a cut clip may begin with a broken frame
            raise VideoError(f"{self.name} is damaged: frame {self.count + 1} cannot be decoded whole; fetch it again")
        self.turns = round(frame.rotation / 90)
        if frame.pts is not None:
            self.times.append(frame.pts)
            self.hold = frame.duration or 0

    def _resized(self, picture: np.ndarray, sampling: FrameSampling, factor: int) -> Tensor:
        video = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None]  # (1, 3, H, W)
        shown = _turned(self.film.clip, self.turns)
        return _resized(video, (shown.height, shown.width), sampling, factor, self.name)[0]

    def clip(self) -> Clip:
        """Frame count, frame rate and size according to the decoded frames."""
        old = self.film.clip
        fps = frame_rate(old.fps, self.count, self.times, self.hold, self.tick)
        return replace(old, frames=self.count, fps=fps)


def _turned(clip: Clip, quarters: int) -> Clip:
    return replace(clip, height=clip.width, width=clip.height) if quarters % 2 else clip


def resample(video: Tensor, fps: float, sampling: FrameSampling, factor: int, name: str = "video") -> Tensor:
    """Sample and resize the frames of a video that was never encoded, as :func:`decode` does with a file.

    Args:
        video: All frames, uint8 (T, 3, H, W).
        fps: Frame rate.
        sampling: Frame sampling of the model.
        factor: Frame sides become multiples of this (patch x merge).
        name: What to call the clip in messages.
    """
    return resized(video[_indices(sampling, len(video), fps, name)], sampling, factor, name)


def resized(video: Tensor, sampling: FrameSampling, factor: int, name: str = "video") -> Tensor:
    """Resize frames as :func:`decode` does with those of a file.

    Args:
        video: Frames, uint8 (T, 3, H, W).
        sampling: Frame sampling of the model, which chooses the size.
        factor: Frame sides become multiples of this (patch x merge).
        name: What to call the clip in messages.
    """
    found = _resized(video, tuple(video.shape[-2:]), sampling, factor, name)
    return torch.empty(found.shape, dtype=torch.uint8).copy_(found)


def _resized(video: Tensor, shown: tuple[int, int], sampling: FrameSampling, factor: int, name: str) -> Tensor:
    """Frames (T, 3, H, W) at the size that the sampling chooses for a clip of the ``shown`` height and width.

    They are the frames of torchvision's ``resize``, bit for bit, as whole grey levels in any dtype and memory format:
    whoever copies them to where they belong converts them on the way, which saves two passes over each frame.
    """
    try:
        size = sampling.size(*shown, factor)
    except VideoAlignError as error:
        raise VideoError(f"{name}: {error}") from None
    if size == tuple(video.shape[-2:]):
        return video
    return interpolate(video.float(), size, mode="bicubic", antialias=True).clamp_(0, 255).round_()


def _indices(sampling: FrameSampling, total: int, fps: float | None, name: str) -> list[int]:
    try:
        return sampling.indices(total, fps)
    except VideoAlignError as error:
        raise VideoError(f"{name}: {error}") from None


def encode(frames: np.ndarray, fps: int, crf: int = 12) -> bytes:
    """Content of an mp4 file (H.264) of RGB frames; the same frames give the same bytes.

    Args:
        frames: Frames, uint8 (T, H, W, 3), with even H and W.
        fps: Frame rate.
        crf: Quality, from 0 (lossless) to 51.
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
