"""What a container says of its video against what a player shows: the stream, the frames, their rate and their size."""

import io
import itertools
import multiprocessing
import random
import resource
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import InterpolationMode, resize

from videoalign import VideoAlignError
from videoalign.datamodules.container import frame_rate
from videoalign.datamodules.importing import check_clip
from videoalign.datamodules.limits import FILE_BYTES, FRAME_PIXELS, VIDEO_PIXELS
from videoalign.datamodules.media import open_media
from videoalign.datamodules.verify import GLANCE
from videoalign.datamodules.video import Clip, VideoError, coding, decode, examine, probe
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


# --- rates ----------------------------------------------------------------------------------------

STATED = {
    "mp4": {"container": "mp4"},
    "mp4 of b-frames": {"container": "mp4", "bf": "3", "preset": "medium"},
    "mp4 in fragments": {"container": "mp4", "muxer": {"movflags": "frag_keyframe+empty_moov"}, "g": "12"},
    "mkv": {"container": "matroska"},
    "mkv of b-frames": {"container": "matroska", "bf": "3"},
    "webm": {"container": "webm", "codec": "libvpx-vp9", "deadline": "realtime", "cpu-used": "8"},
    "mov": {"container": "mov", "codec": "mjpeg", "pixels": "yuvj420p"},
    "avi": {"container": "avi", "codec": "mpeg4"},
    "ts": {"container": "mpegts", "bf": "2"},
}


@pytest.mark.parametrize("rate", [8, 25, Fraction(24000, 1001), Fraction(30000, 1001)], ids=str)
@pytest.mark.parametrize("kind", STATED.values(), ids=STATED)
def test_a_constant_rate_is_the_stated_one_exactly(kind: dict, rate: Fraction | int) -> None:
    content = video(rate=rate, count=40, **kind)
    with av.open(io.BytesIO(content)) as box:
        stated = float(box.streams.video[0].average_rate)
    assert told(content) == Clip(40, stated, 48, 64)
    assert stated == pytest.approx(float(rate), rel=1e-4)


JITTER = [*itertools.accumulate(random.Random(0).choices((33, 40, 47), k=120), initial=0)]
STEADY = range(0, 4000, 40)
H264 = {"container": "matroska", "count": 100, "bf": "0"}
MEASURED = {
    "a browser's recording": (lambda: recorded(JITTER), 121, 1000 * 120 / JITTER[-1]),
    "a browser's recording of three frames": (lambda: recorded([0, 40, 80]), 3, 25),
    "a browser's recording that starts late": (
        lambda: recorded([7000 + t for t in JITTER]),
        121,
        1000 * 120 / JITTER[-1],
    ),
    "a browser's recording with a pause": (lambda: recorded([t + 3000 * (t > 2000) for t in STEADY]), 100, 99 / 6.96),
    "webm that starts late": (lambda: timed(video(**H264), "matroska", [5000 + t for t in STEADY]), 100, 25),
    "a clock that jumps an hour": (
        lambda: timed(video(**H264), "matroska", [t + 3_600_000 * (t > 2000) for t in STEADY]),
        100,
        25,
    ),
    "mp4 that jumps an hour": (
        lambda: timed(video(**H264), "mp4", [t + 3_600_000 * (t > 2000) for t in STEADY]),
        100,
        25,
    ),
    "a slow show": (lambda: recorded([*range(0, 150_000, 15_000)]), 10, 1 / 15),
    "variable rate in mp4": (
        lambda: timed(video(**H264), "mp4", [t + 2000 * (t > 2000) for t in STEADY]),
        100,
        99 / 5.96,
    ),
    "joined broadcasts": (lambda: 2 * video("mpegts", count=100, g="25"), 200, 25),
    "a broadcast whose clock wraps": (
        lambda: timed(video("mpegts", "mpeg2video", 100, bf="0"), "mpegts", [2**33 // 90 - 2000 + t for t in STEADY]),
        100,
        25,
    ),
    "gif": (lambda: gif([100] * 12), 12, 10),
    "gif of variable rate": (lambda: gif([40, 100, 200, 60] * 5), 20, 10),
    "gif that holds its last picture": (lambda: gif([50] * 19 + [1050]), 20, 10),
}


@pytest.mark.parametrize(("make", "frames", "rate"), MEASURED.values(), ids=MEASURED)
def test_a_guessed_rate_is_measured(make: Callable[[], bytes], frames: int, rate: float) -> None:
    clip = told(make())
    assert clip.frames == frames and clip.fps == pytest.approx(rate, rel=0.02)


def test_a_recording_is_sampled_over_its_length() -> None:
    """It has ten seconds at two frames a second, not the fewest frames, as of a clip of a quarter of a second."""
    content = recorded([*itertools.accumulate(random.Random(1).choices((33, 40, 47), k=249), initial=0)])
    assert len(decode(content, FrameSampling(min_pixels=0), 16)) == 20


def test_frame_rate_by_the_rule() -> None:
    def rate(stated: float | None, times: Sequence[int], hold: int = 0) -> float | None:
        return frame_rate(stated, len(times), times, hold, MS)

    assert rate(None, [0]) is None
    assert rate(0.0, []) is None
    assert rate(24.0, [0]) == 24.0
    assert rate(24.0, [5, 5, 5]) == 24.0
    assert rate(None, [0, 40, 80]) == rate(0.0, [0, 40, 80]) == rate(1000.0, [0, 40, 80]) == 25.0
    assert rate(24.0, [round(1000 * i / 24) for i in range(200)]) == 24.0
    assert rate(24.3, [round(1000 * i / 24) for i in range(200)]) == 24.3  # within two per cent
    assert rate(25.0, [round(1000 * i / 24) for i in range(200)]) == pytest.approx(24, rel=1e-3)
    assert rate(60.0, [0, 17, 33]) == 60.0  # milliseconds are coarse
    assert rate(None, [0, 40, 80, 0, 40, 80]) == 25.0  # begins anew
    assert rate(None, [0, 0, 80, 80]) == 37.5
    assert rate(None, [0, 40, 80], 1920) == 3 / 2.0
    assert rate(None, [0, 40, 80], 10**12) == 25.0  # no length of a frame


# --- streams --------------------------------------------------------------------------------------


def box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", len(body) + 8, kind) + body


def with_cover(content: bytes) -> bytes:
    """An mp4 with a cover before its track: libav lists the picture first. The data precede, so no offset changes."""
    cover = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 0, 0)).save(cover, "JPEG")
    handler = box(b"hdlr", struct.pack(">II4s", 0, 0, b"mdir") + b"appl" + bytes(9))
    tag = box(b"covr", box(b"data", struct.pack(">II", 13, 0) + cover.getvalue()))
    tags = box(b"udta", box(b"meta", bytes(4) + handler + box(b"ilst", tag)))
    at = content.index(b"moov") - 4
    moov = content[at + 8 :]
    first = int.from_bytes(moov[:4])
    return content[:at] + box(b"moov", moov[:first] + tags + moov[first:].replace(b"udta", b"free"))


def several(container: str, *streams: dict) -> bytes:
    """A file of several video streams with the given sizes, counts and rates."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        made = []
        for options in streams:
            stream = out.add_stream(options.get("codec", "libx264"), rate=options.get("rate", 25))
            (stream.height, stream.width), stream.pix_fmt = options["size"], options.get("pixels", "yuv420p")
            made.append((stream, options))
        for stream, options in made:
            for i in range(options["count"]):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(picture(i, *options["size"]), format="rgb24")))
            out.mux(stream.encode(None))
    return buffer.getvalue()


STILL = {"size": (96, 96), "count": 1, "codec": "mjpeg", "pixels": "yuvj420p"}
STREAMS = {
    "a cover first": (lambda: with_cover(video("mp4", count=48, rate=24)), (48, 48, 64)),
    "a still of large size first": (lambda: several("matroska", STILL, {"size": (48, 64), "count": 20}), (20, 48, 64)),
    "a still of large size in mp4": (lambda: several("mp4", STILL, {"size": (48, 64), "count": 20}), (20, 48, 64)),
    "a short trailer first": (
        lambda: several("mp4", {"size": (96, 96), "count": 10}, {"size": (48, 64), "count": 48}),
        (48, 48, 64),
    ),
    "a preview of the same length first": (
        lambda: several("mp4", {"size": (32, 32), "count": 40}, {"size": (48, 64), "count": 40}),
        (40, 48, 64),
    ),
    "thumbnails one a second first": (
        lambda: several("matroska", {"size": (32, 32), "count": 4, "rate": 1}, {"size": (48, 64), "count": 100}),
        (100, 48, 64),
    ),
    "the film first": (
        lambda: several("mp4", {"size": (48, 64), "count": 40}, {"size": (96, 96), "count": 10}),
        (40, 48, 64),
    ),
}


@pytest.mark.parametrize(("make", "want"), STREAMS.values(), ids=STREAMS)
def test_the_film_is_found_among_other_streams(make: Callable[[], bytes], want: tuple[int, int, int]) -> None:
    content = make()
    clip = told(content)
    assert (clip.frames, clip.height, clip.width) == want
    assert coding(content)[0] == "h264"
    red = decode(content, FOUR, 1)[:, 0].float().mean((1, 2))
    assert red.tolist() == pytest.approx([4 * i % 256 for i in FOUR.indices(want[0], None)], abs=6)


def test_a_cover_alone_is_no_video() -> None:
    content = with_cover(video("mp4", count=4))
    at = content.index(b"trak")
    with pytest.raises(VideoError, match="clip holds no video stream but a cover"):
        probe(content[:at] + b"free" + content[at + 4 :], "clip")


# --- edit lists -----------------------------------------------------------------------------------


def trimmed(start: int, end: int | None = None, container: str = "mp4", **options: str) -> bytes:
    """150 frames at 30 a second, cut without coding them again: an edit list hides what precedes ``start``."""
    content, buffer = video("mp4", count=150, rate=30, **options), io.BytesIO()
    with av.open(io.BytesIO(content)) as box, av.open(buffer, "w", format=container) as out:
        source = box.streams.video[0]
        stream, shift = out.add_stream_from_template(source), round(Fraction(start, 30) / source.time_base)
        for number, packet in enumerate(p for p in box.demux(source) if p.size):
            if end is None or number < end:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                out.mux(packet)
    return buffer.getvalue()


def shortened(content: bytes, seconds: float) -> bytes:
    """An mp4 whose edit list ends early."""
    at = content.index(b"elst") + 12
    scale = struct.unpack_from(">I", content, content.index(b"mvhd") + 16)[0]
    return content[:at] + struct.pack(">I", round(seconds * scale)) + content[at + 4 :]


@pytest.mark.parametrize(
    ("content", "first", "frames"),
    [
        (lambda: trimmed(90, g="250", bf="0"), 90, 60),
        (lambda: trimmed(90, g="10", bf="0"), 90, 60),
        (lambda: trimmed(95, g="40", bf="0"), 95, 55),
        (lambda: trimmed(149 - 30, 149, g="250", bf="0"), 119, 30),
        (lambda: shortened(video("mp4", count=150, rate=30), 2.0), 0, 60),
        (lambda: shortened(trimmed(30, g="250", bf="0"), 2.0), 30, 60),
    ],
    ids=["one group", "many groups", "inside a group", "both ends", "end only", "end by the list"],
)
def test_a_trimmed_clip_is_what_a_player_shows(content: Callable[[], bytes], first: int, frames: int) -> None:
    data = content()
    assert told(data) == Clip(frames, 30.0, 48, 64)
    red = decode(data, FOUR, 1)[:, 0].float().mean((1, 2))
    want = [(first + i) * 4 % 256 for i in FOUR.indices(frames, None)]
    assert red.tolist() == pytest.approx(want, abs=6)


def test_frames_that_nobody_sees_are_not_counted() -> None:
    """The groups of pictures are open and cut in front of the second: the first b-frames refer to missing ones."""
    content, buffer = video("mp4", "mpeg2video", 100, g="12", bf="2"), io.BytesIO()
    with av.open(io.BytesIO(content)) as source, av.open(buffer, "w", format="matroska") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        packets = [p for p in source.demux(video=0) if p.size]
        second = [i for i, p in enumerate(packets) if p.is_keyframe][1]
        start = packets[second].pts
        for packet in packets[second:]:
            packet.pts, packet.dts, packet.stream = packet.pts - start, packet.dts - start, stream
            out.mux(packet)
    with av.open(io.BytesIO(buffer.getvalue())) as box:
        seen = sum(1 for _ in box.decode(video=0))
    assert seen < len(packets) - second
    clip = examine(buffer.getvalue(), GLANCE, "clip")
    assert clip.frames == seen and clip.fps == pytest.approx(25, rel=0.03)
    assert len(decode(buffer.getvalue(), FrameSampling(fps=100.0, min_pixels=0), 16)) == seen // 2 * 2


# --- tags -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", [b"\x8c\xb1\xe9\xf6" * 2, b"\xff" * 8, b"\xed\xa0\x80\xed\xb0\x80zz"], ids=repr)
@pytest.mark.parametrize(
    "kind",
    [{"container": "avi", "codec": "mpeg4"}, {"container": "mp4"}, {"container": "matroska"}, {"container": "flv"}],
    ids=lambda kind: kind["container"],
)
def test_tags_of_any_encoding_are_of_no_interest(kind: dict, tag: bytes) -> None:
    content = video(title="QQQQQQQQ", **kind)
    assert b"QQQQQQQQ" in content
    assert told(content.replace(b"QQQQQQQQ", tag)) == Clip(50, 25.0, 48, 64)


@pytest.mark.parametrize(
    "name", ["a:b.mp4", "http:x.mp4", "100%d.mp4", "ä ö.mp4", "n\udcff.mp4", "-i.mp4", "a?b#c.mp4"]
)
def test_files_of_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(video("mp4"))
    assert probe(name).frames == probe(Path(name)).frames == probe(tmp_path / name).frames == 50


# --- pixels that are not square -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "width"),
    [(Fraction(2), 128), (Fraction(1, 2), 32), (Fraction(16, 15), 68), (Fraction(1), 64), (None, 64)],
)
@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_pixels_are_stretched_to_what_a_player_shows(shape: Fraction | None, width: int, container: str) -> None:
    content = video(container, shape=shape)
    assert told(content) == Clip(50, 25.0, 48, width)
    frames = decode(content, FOUR, 1)
    assert frames.shape == (4, 3, 48, width)
    with av.open(io.BytesIO(content)) as box:
        stored = [frame.to_ndarray(format="rgb24") for frame in box.decode(video=0)]
    kept = torch.from_numpy(np.stack([stored[i] for i in FOUR.indices(50, None)])).permute(0, 3, 1, 2)
    assert torch.equal(frames, resize(kept, [48, width], InterpolationMode.BICUBIC, antialias=True))
    assert decode(content, FrameSampling(fps=None, num_frames=4, min_pixels=0), 16).shape[-2:] == (
        48,
        max(16, round(width / 16) * 16),
    )


def test_a_stretched_and_turned_clip(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as box:
        stream = box.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2)
        stream.set_display_matrix([0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30])
        for i in range(8):
            box.mux(stream.encode(av.VideoFrame.from_ndarray(picture(i), format="rgb24")))
        box.mux(stream.encode(None))
    assert told(path.read_bytes()) == Clip(8, 25.0, 128, 48)
    assert decode(path, FOUR, 16).shape[-2:] == (128, 48)


# --- each frame by itself -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(48, 64), (50, 70), (96, 160), (120, 90), (270, 480)], ids=str)
@pytest.mark.parametrize("factor", [16, 28])
def test_frames_are_resized_as_a_stack_of_them_would_be(size: tuple[int, int], factor: int) -> None:
    """They are, bit for bit, the frames that training has seen so far."""
    content, sampling = (
        video("mp4", count=12, size=size, preset="ultrafast"),
        FrameSampling(max_pixels=112 * 112, min_pixels=3136),
    )
    with av.open(io.BytesIO(content)) as box:
        stored = [frame.to_ndarray(format="rgb24") for frame in box.decode(video=0)]
    kept = torch.from_numpy(np.stack([stored[i] for i in sampling.indices(12, 25.0)])).permute(0, 3, 1, 2)
    want = list(sampling.size(*size, factor))
    assert torch.equal(decode(content, sampling, factor), resize(kept, want, InterpolationMode.BICUBIC, antialias=True))


# --- limits ---------------------------------------------------------------------------------------


def big_gif(width: int, height: int, count: int) -> bytes:
    """A GIF whose pictures have one pixel on a large canvas."""
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(3) + b"\xff" * 3
    one = b"\x21\xf9\x04\0\x0a\0\0\0" + b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\0"
    return head + one * count + b";"


def counted(content: bytes, count: int, size: int) -> bytes:
    """An mp4 that declares so many samples of one size."""
    data = bytearray(content)
    struct.pack_into(">II", data, content.index(b"stsz") + 8, size, count)
    struct.pack_into(">I", data, content.index(b"stts") + 12, count)
    struct.pack_into(">I", data, content.index(b"stsc") + 16, count)
    return bytes(data)


BOMBS = {
    "gif of a large canvas": (lambda: big_gif(65535, 65535, 4), FRAME_PIXELS.variable),
    "gif of many pictures": (lambda: big_gif(8000, 4000, 30_000), VIDEO_PIXELS.variable),
    "samples without end": (lambda: counted(video("mp4"), 0x7FFFFFFF, 1), "clip"),
    "samples without end and size": (lambda: counted(video("mp4"), 0x7FFFFFFF, 0), "clip"),
    "a hundred million samples": (lambda: counted(video("mp4"), 100_000_000, 1), "clip"),
}


@pytest.mark.parametrize(("make", "words"), BOMBS.values(), ids=BOMBS)
def test_bombs_are_refused(make: Callable[[], bytes], words: str) -> None:
    content = make()
    for look in (probe, lambda source, name: decode(source, FOUR, 16, name)):
        with pytest.raises(VideoError, match=words) as error:
            look(content, "clip")
        assert "clip" in str(error.value)


LIMITED = [
    {"container": "mp4"}, {"container": "matroska"}, {"container": "mpegts"}, {"container": "webm", "codec": "libvpx"},
    {"container": "avi", "codec": "mjpeg", "pixels": "yuvj420p"}, {"container": "mpegts", "codec": "mpeg2video"},
]  # fmt: skip


@pytest.mark.parametrize("kind", LIMITED, ids=lambda kind: "-".join(kind.values()))
def test_large_frames_are_refused(kind: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    content = video(count=8, **kind)
    monkeypatch.setenv(FRAME_PIXELS.variable, str(48 * 64))
    assert probe(content).frames == 8
    monkeypatch.setenv(FRAME_PIXELS.variable, str(48 * 64 - 1))
    for look in (probe, coding, lambda source, name: decode(source, FOUR, 16, name)):
        with pytest.raises(VideoError, match=f"clip.*{FRAME_PIXELS.variable}"):
            look(content, "clip")


def test_frames_that_grow_beyond_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The container states one size, and the decoder meets another."""
    small, large = (video("mpegts", "mpeg2video", 12, size=size) for size in ((48, 64), (480, 640)))
    monkeypatch.setenv(FRAME_PIXELS.variable, str(100 * 100))
    with pytest.raises(VideoError, match="clip"):
        decode(small + large, FOUR, 16, "clip")


def test_long_videos_and_large_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = video("mp4")
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    for limit, amount in ((VIDEO_PIXELS, 50 * 512 * 512), (FILE_BYTES, len(content))):
        with monkeypatch.context() as patch:
            patch.setenv(limit.variable, str(amount))
            assert probe(path).frames == 50
            patch.setenv(limit.variable, str(amount - 1))
            for source in (content, path):
                with pytest.raises(
                    VideoError, match=f"clip.* {amount} .*limit of {amount - 1}.*{limit.variable} to {amount} or"
                ):
                    decode(source, FOUR, 16, "clip")


@pytest.mark.parametrize("text", ["", "0", "-1", "many", "1e9", "²"])
def test_a_limit_that_is_no_number_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FILE_BYTES.variable, text)
    with pytest.raises(VideoAlignError, match=f"{FILE_BYTES.variable} must be a positive whole number"):
        probe(video("mp4", count=4))


def packed(path: Path, content: bytes, stated: int | None = None) -> Path:
    """A zip archive of one video that may lie about its size."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("clip.mp4", content)
    data = path.read_bytes()
    if stated is not None:
        path.write_bytes(data.replace(struct.pack("<I", len(content)), struct.pack("<I", stated)))
    return path


def test_members_of_an_archive_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = video("mp4")
    assert check_clip(open_media(packed(tmp_path / "fine.zip", content)), "clip.mp4") == probe(content)
    monkeypatch.setenv(FILE_BYTES.variable, str(10**6))
    media = open_media(packed(tmp_path / "large.zip", bytes(10**6 + 1)))
    assert FILE_BYTES.variable in check_clip(media, "clip.mp4")
    with pytest.raises(VideoAlignError, match=r"large\.zip, clip\.mp4: .*limit"):
        media.read("clip.mp4")


def test_a_member_larger_than_it_states_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    media, most = open_media(packed(tmp_path / "liar.zip", bytes(50_000_000), stated=1000)), []
    unpack = zlib.decompressobj

    def watched(*args: int) -> object:
        class Watched:
            def __init__(self) -> None:
                self.inner = unpack(*args)

            def decompress(self, data: bytes, length: int = 0) -> bytes:
                found = self.inner.decompress(data, length)
                most.append(len(found))
                return found

            def __getattr__(self, name: str) -> object:
                return getattr(self.inner, name)

        return Watched()

    monkeypatch.setattr(zlib, "decompressobj", watched)
    with pytest.raises(VideoAlignError, match=r"liar\.zip, clip\.mp4"):
        media.read("clip.mp4")
    assert most
    assert max(most) < 100_000


def test_memory_does_not_grow_with_what_is_refused(tmp_path: Path) -> None:
    """Two large frames would take 300 MB; 24 of 8192 x 8192 took 5 GB when all were held until the last."""
    path = tmp_path / "large.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream(
            "libx264", rate=8, options={"preset": "ultrafast", "threads": "1", "bf": "0", "rc-lookahead": "0"}
        )
        stream.height, stream.width, stream.pix_fmt = 6144, 6144, "yuv420p"
        frame = av.VideoFrame(6144, 6144, "yuv420p")
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        for i in range(2):
            frame.pts = i
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        why, megabytes = pool.submit(_growth, path).result()
    assert "6144x6144" in why
    assert FRAME_PIXELS.variable in why
    assert megabytes < 100


def _growth(path: Path) -> tuple[str, float]:
    """The message about a file, and by how much the process grew."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    why = check_clip(open_media(path.parent), path.name)
    return why, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


# --- what is refused, by name ---------------------------------------------------------------------


def image(kind: str, **options: object) -> bytes:
    buffer, frames = io.BytesIO(), [Image.fromarray(picture(i)) for i in range(6)]
    more = {"save_all": True, "append_images": frames[1:], "duration": 62} if options.pop("moving", False) else {}
    frames[0].save(buffer, kind, **more)
    return buffer.getvalue()


OTHERS = {
    "animated webp": (lambda: image("WEBP", moving=True), "an animated WebP picture, which is not read.*mp4, mov"),
    "webp": (lambda: image("WEBP"), "a WebP picture"),
    "apng": (lambda: image("PNG", moving=True), r"an animated PNG \(APNG\) picture"),
    "png": (lambda: image("PNG"), "a PNG picture"),
    "jpeg": (lambda: image("JPEG"), "a JPEG picture"),
    "bmp": (lambda: image("BMP"), "a BMP picture"),
    "tiff": (lambda: image("TIFF"), "a TIFF picture"),
    "avif": (lambda: b"\0\0\0\x20ftypavis\0\0\0\0avifmsf1" + bytes(99), "a picture of the AVIF format"),
    "heic": (lambda: b"\0\0\0\x20ftypheic\0\0\0\0" + bytes(99), "a picture of the HEIF format"),
    "a web page": (lambda: b"\n <!DOCTYPE html><html>404</html>", "a web page"),
    "an archive": (lambda: b"PK\x03\x04" + bytes(99), "a zip archive"),
    "a pointer of git": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "a still gif": (lambda: gif([100]), "at least 2 are needed"),
    "one frame": (lambda: video("mp4", count=1), "at least 2 are needed"),
    "a recording of one frame": (lambda: recorded([0]), "at least 2 are needed"),
    "no frame": (lambda: video("matroska").partition(b"\x1f\x43\xb6\x75")[0], "is cut short"),
}


@pytest.mark.parametrize(("make", "words"), OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("as_file", [False, True], ids=["bytes", "path"])
def test_other_formats_are_refused_by_name(tmp_path: Path, make: Callable, words: str, as_file: bool) -> None:
    content = make()
    (tmp_path / "clip").write_bytes(content)
    with pytest.raises(VideoError, match=f"^clip.*{words}"):
        decode(tmp_path / "clip" if as_file else content, FOUR, 16, "clip")


def in_front(content: bytes) -> bytes:
    """The same mp4 with its index before the data, so that a cut file can be opened."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "front.mp4"
        with av.open(io.BytesIO(content)) as box, av.open(str(path), "w", options={"movflags": "faststart"}) as out:
            stream = out.add_stream_from_template(box.streams.video[0])
            for packet in (p for p in box.demux(video=0) if p.size):
                packet.stream = stream
                out.mux(packet)
        return path.read_bytes()


WHOLE = {
    "mp4": lambda: in_front(video("mp4", count=60, g="10")),
    "mp4 in fragments": lambda: video("mp4", count=60, muxer={"movflags": "frag_every_frame+empty_moov"}, g="10"),
    "mkv": lambda: video("matroska", count=60, g="10"),
    "webm": lambda: video("webm", "libvpx", 60),
    "avi": lambda: video("avi", "mjpeg", 60, pixels="yuvj420p"),
    "flv": lambda: video("flv", count=60, g="10"),
    "gif": lambda: gif([40] * 60),
    "ivf": lambda: video("ivf", "libvpx", 60),
}


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("kind", [kind for kind in WHOLE if kind != "mp4 in fragments"])
def test_cut_files_are_refused(kind: str, keep: float) -> None:
    content = WHOLE[kind]()
    assert told(content).frames == 60
    for look in (probe, lambda source, name: decode(source, FOUR, 16, name)):
        with pytest.raises(VideoError, match=r"^clip.*(truncated|cut short|cannot be decoded)"):
            look(content[: int(len(content) * keep)], "clip")


@pytest.mark.parametrize("damage", ["zeros", "noise"])
@pytest.mark.parametrize("kind", [kind for kind in WHOLE if kind not in ("mp4 in fragments", "webm")])
def test_a_damaged_middle_is_refused(kind: str, damage: str) -> None:
    content = bytearray(WHOLE[kind]())
    begin = len(content) * 6 // 10
    size = len(content) // 8
    content[begin : begin + size] = bytes(size) if damage == "zeros" else np.random.default_rng(0).bytes(size)
    with pytest.raises(VideoError, match=r"^clip"):
        decode(bytes(content), FOUR, 16, "clip")


@pytest.mark.parametrize("kind", WHOLE)
def test_whatever_is_damaged_the_error_is_ours(kind: str) -> None:
    content, draw, refused = WHOLE[kind](), random.Random(2), 0
    for _ in range(25):
        broken = bytearray(content)
        for _ in range(6):
            at = draw.randrange(len(broken))
            broken[at : at + draw.randint(1, 4)] = draw.randbytes(4)
        try:
            assert decode(bytes(broken[: draw.randint(len(broken) // 2, len(broken))]), GLANCE, 16, "clip").ndim == 4
        except VideoError as error:
            refused += 1
            assert str(error).startswith("clip")
    assert refused


def test_a_gif_that_lacks_its_last_byte_is_whole() -> None:
    content = gif([40] * 6)
    assert content.endswith(b";")
    assert probe(content[:-1]).frames == probe(content + bytes(9)).frames == 6
