"""What the tests of containers share: files of every kind, written picture by picture."""

import io
import struct
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
from PIL import Image

from videoalign.datamodules.verify import GLANCE
from videoalign.datamodules.video import Clip, examine, probe
from videoalign.models.frame_sampling import FrameSampling

FOUR = FrameSampling(fps=None, num_frames=4, min_pixels=0)
MS = Fraction(1, 1000)


def picture(number: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A frame whose shade of red is its number times four."""
    frame = np.zeros((height, width, 3), np.uint8)
    frame[..., 0] = number * 4 % 256
    return frame


def video(
    container: str,
    codec: str = "libx264",
    count: int = 50,
    rate: Fraction | int = 25,
    size: tuple[int, int] = (48, 64),
    pixels: str = "yuv420p",
    muxer: dict | None = None,
    shape: Fraction | None = None,
    title: str = "",
    **options: str,
) -> bytes:
    """A video file of so many pictures."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container, options=muxer or {}) as box:
        box.metadata.update({"title": title} if title else {})
        stream = box.add_stream(codec, rate=rate, options={"threads": "1", **options})
        (stream.height, stream.width), stream.pix_fmt = size, pixels
        if shape:
            stream.codec_context.sample_aspect_ratio = shape
        for i in range(count):
            box.mux(stream.encode(av.VideoFrame.from_ndarray(picture(i, *size), format="rgb24")))
        box.mux(stream.encode(None))
    return buffer.getvalue()


def timed(content: bytes, container: str, times: Sequence[int], muxer: dict | None = None) -> bytes:
    """The packets of a file, copied into another one at the given times in milliseconds."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(content)) as box, av.open(buffer, "w", format=container, options=muxer or {}) as out:
        stream = out.add_stream_from_template(box.streams.video[0])
        for time, packet in zip(times, (p for p in box.demux(video=0) if p.size)):
            packet.pts = packet.dts = time
            packet.duration, packet.time_base, packet.stream = 0, MS, stream
            out.mux(packet)
    return buffer.getvalue()


def recorded(times: Sequence[int], codec: str = "libvpx", container: str = "webm") -> bytes:
    """A recording as a browser makes it: no duration, no rate, times in whole milliseconds."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container, options={"live": "1"}) as box:
        stream = box.add_stream(codec, rate=1000, options={"deadline": "realtime", "cpu-used": "8"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.time_base, stream.codec_context.framerate = MS, Fraction(0, 1)
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(i), format="rgb24")
            frame.pts, frame.time_base = time, MS
            box.mux(stream.encode(frame))
        box.mux(stream.encode(None))
    return buffer.getvalue()


def gif(durations: Sequence[int], size: tuple[int, int] = (48, 64)) -> bytes:
    buffer, frames = io.BytesIO(), [Image.fromarray(picture(i, *size)) for i in range(len(durations))]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=list(durations), loop=0)
    return buffer.getvalue()


def told(content: bytes) -> Clip:
    """What the packets say about the video; decoding must say the same."""
    clip = probe(content, "clip")
    assert examine(content, GLANCE, "clip") == clip
    return clip


def box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", len(body) + 8, kind) + body
