"""What a container says of its video against what a player shows: the stream, the frames, their rate and their size."""

import io
import itertools
import random
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import InterpolationMode, resize

from container_kit import FOUR, MS, box, gif, picture, recorded, timed, told, video
from videoalign.datamodules.container import frame_rate
from videoalign.datamodules.verify import GLANCE
from videoalign.datamodules.video import Clip, VideoError, coding, decode, examine, probe
from videoalign.models.frame_sampling import FrameSampling

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
