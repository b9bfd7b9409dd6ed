"""Decoding: which pictures come out of which file, and what is refused."""

import io
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import InterpolationMode, resize

from videoalign.datamodules.video import VideoError, decode, encode, probe, resized
from videoalign.models.frame_sampling import FrameSampling

FOUR = FrameSampling(fps=None, num_frames=4, min_pixels=0)
CLOCKWISE = [0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30]
"""Display matrix of a telephone held upright: x' = -y, y' = x, which turns the picture clockwise on a screen."""


def pictures(count: int, height: int, width: int) -> list[np.ndarray]:
    """Frames of which no two are alike, and none looks like itself mirrored or turned."""
    y, x = np.mgrid[:height, :width]
    return [
        np.stack([(y * 4 + 20 * i) % 256, x * 200 // width + 5 * (i % 10), np.full_like(x, 37 * i % 256)], -1).astype(
            np.uint8
        )
        for i in range(count)
    ]


def write(
    path: Path,
    frames: Sequence[np.ndarray],
    codec: str = "libx264",
    pixels: str = "yuv420p",
    muxer: dict | None = None,
    milliseconds: Sequence[int] | None = None,
    matrix: list[int] | None = None,
    sound: bool = False,
    fps: int = 8,
) -> Path:
    """A video file with the container of its suffix."""
    with av.open(str(path), "w", options=muxer or {}) as container:
        options = {"preset": "ultrafast", "g": "4"} if codec == "libx264" else {}
        voice = container.add_stream("aac", rate=8000, layout="mono") if sound else None  # the first stream
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels
        if matrix:
            stream.set_display_matrix(matrix)
        if milliseconds:
            stream.codec_context.time_base = Fraction(1, 1000)
        if voice:
            _sound(container, voice, len(frames) / fps)
        for i, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if milliseconds:
                frame.pts, frame.time_base = milliseconds[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def _sound(container: av.container.OutputContainer, stream: av.AudioStream, seconds: float) -> None:
    tone = np.sin(np.arange(int(8000 * seconds)) / 5).astype(np.float32)[None]
    frame = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = 8000, 0, Fraction(1, 8000)
    for piece in (frame, None):
        container.mux(stream.encode(piece))


def everything(path: Path) -> list[np.ndarray]:
    """All pictures of a file as PyAV decodes them, without rotation."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def arrays(video: torch.Tensor) -> np.ndarray:
    """Frames (T, 3, H, W) as arrays (T, H, W, 3)."""
    return video.permute(0, 2, 3, 1).numpy()


# --- which frames come out ------------------------------------------------------------------------

CONTAINERS = {
    "clip.mp4": {},
    "front.mp4": {"muxer": {"movflags": "faststart"}},
    "mpeg4.mp4": {"codec": "mpeg4"},
    "clip.mkv": {},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "vp8.webm": {"codec": "libvpx"},
    "clip.mov": {},
    "clip.avi": {"codec": "mpeg4"},
    "sound.mp4": {"sound": True},
    "upright.mp4": {"matrix": [1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30]},
    "variable.mp4": {"milliseconds": [0, 10, 20, 30, 500, 1000, 1010, 1020, 3000, 3500, 3510]},
    "variable.mkv": {"milliseconds": [0, 10, 20, 30, 500, 1000, 1010, 1020, 3000, 3500, 3510]},
}


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("content", [False, True], ids=["path", "bytes"])
def test_frames_are_those_of_a_full_decode(tmp_path: Path, name: str, content: bool) -> None:
    path = write(tmp_path / name, pictures(11, 32, 48), **CONTAINERS[name])
    full = everything(path)
    assert len(full) == 11
    source = path.read_bytes() if content else path
    assert probe(source).frames == 11
    for sampling in (FOUR, FrameSampling(fps=None, num_frames=10, min_pixels=0)):
        want = np.stack([full[i] for i in sampling.indices(11, None)])
        video = decode(source, sampling, 16)
        assert video.dtype == torch.uint8
        assert video.is_contiguous()
        assert np.array_equal(arrays(video), want)


def test_frames_by_rate(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", pictures(25, 32, 32), fps=8)
    full, sampling = everything(path), FrameSampling(fps=2.0, min_pixels=0)
    assert probe(path).fps == 8
    assert sampling.indices(25, 8.0) == [0, 5, 10, 14, 19, 24]  # 3.1 s at 2 a second, evenly spaced
    assert np.array_equal(arrays(decode(path, sampling, 16)), np.stack([full[i] for i in (0, 5, 10, 14, 19, 24)]))


def test_variable_frame_rate_is_sampled_by_index(tmp_path: Path) -> None:
    """Twenty frames in 12.5 s are sampled by the average rate: evenly over the frames, not over the time."""
    times = [*range(0, 160, 10), 4000, 8000, 12000, 12500]
    path = write(tmp_path / "clip.mp4", pictures(20, 32, 32), milliseconds=times)
    clip = probe(path)
    assert clip.frames == 20 and clip.fps == pytest.approx(20 / 12.5, rel=0.1)
    sampling = FrameSampling(fps=0.5, min_pixels=0)
    indices = sampling.indices(20, clip.fps)
    assert len(indices) == 6
    full = everything(path)
    assert np.array_equal(arrays(decode(path, sampling, 16)), np.stack([full[i] for i in indices]))


@pytest.mark.parametrize(
    ("name", "options"), [("odd.mp4", {"pixels": "yuv444p"}), ("odd.webm", {"codec": "libvpx-vp9"})]
)
def test_odd_sizes(tmp_path: Path, name: str, options: dict) -> None:
    path = write(tmp_path / name, pictures(9, 33, 47), **options)
    full = everything(path)
    assert full[0].shape == (33, 47, 3)
    assert (probe(path).height, probe(path).width) == (33, 47)
    # A factor of 1 keeps the size, so frames are exact; 16 rounds it to 32 x 48, so they differ by the resizing.
    indices = FOUR.indices(9, None)
    assert np.array_equal(arrays(decode(path, FOUR, 1)), np.stack([full[i] for i in indices]))
    small = arrays(decode(path, FOUR, 16))
    assert small.shape == (4, 32, 48, 3)
    near = np.stack([np.asarray(Image.fromarray(full[i]).resize((48, 32), Image.Resampling.BICUBIC)) for i in indices])
    assert np.abs(small.astype(int) - near.astype(int)).mean() < 1


@pytest.mark.parametrize("pixels", [40 * 40, 96 * 160, 300 * 300])
@pytest.mark.parametrize("last", [True, False], ids=["colours last", "colours first"])
def test_frames_are_those_of_torchvision_bit_for_bit(pixels: int, last: bool) -> None:
    """The official code resizes by it. Hard edges make bicubic filters overshoot both ends of the range."""
    random = torch.from_numpy(np.random.default_rng(0).choice([0, 3, 128, 252, 255], (4, 96, 160, 3)).astype(np.uint8))
    video = random.permute(0, 3, 1, 2) if last else random.permute(0, 3, 1, 2).contiguous()
    sampling = FrameSampling(fps=None, num_frames=4, min_pixels=pixels, max_pixels=pixels)
    found = resized(video, sampling, 4)
    want = resize(video, list(sampling.size(96, 160, 4)), InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(found, want) and found.is_contiguous() and found.dtype == torch.uint8


def test_pixel_budget_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", pictures(4, 96, 160))
    small = decode(path, FrameSampling(fps=None, num_frames=4, min_pixels=0, max_pixels=64 * 64), 16)
    assert small.shape == (4, 3, 48, 80)
    large = decode(path, FrameSampling(fps=None, num_frames=4, min_pixels=192 * 320), 16)
    assert large.shape == (4, 3, 192, 320)


@pytest.mark.parametrize(
    ("matrix", "turns"),
    [
        (CLOCKWISE, -1),
        ([0, -(1 << 16), 0, 1 << 16, 0, 0, 0, 0, 1 << 30], 1),
        ([-(1 << 16), 0, 0, 0, -(1 << 16), 0, 0, 0, 1 << 30], 2),
    ],
)
def test_rotation_is_applied(tmp_path: Path, matrix: list[int], turns: int) -> None:
    path = write(tmp_path / "clip.mp4", pictures(9, 32, 48), matrix=matrix)
    with av.open(str(path)) as container:
        if not next(container.decode(video=0)).rotation:
            pytest.skip("this build of PyAV wrote no display matrix")
    full = everything(path)
    want = np.stack([np.rot90(full[i], turns) for i in FOUR.indices(9, None)])
    assert np.array_equal(arrays(decode(path, FOUR, 16)), want)


def test_probe_tells_the_size_as_shown(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", pictures(9, 32, 48), matrix=CLOCKWISE)
    clip = probe(path)
    assert (clip.height, clip.width) == (48, 32)


def test_sound_is_ignored(tmp_path: Path) -> None:
    silent = write(tmp_path / "silent.mp4", pictures(9, 32, 32))
    loud = write(tmp_path / "loud.mp4", pictures(9, 32, 32), sound=True)
    with av.open(str(loud)) as container:
        assert [stream.type for stream in container.streams] == ["audio", "video"]
    assert probe(loud).frames == 9
    assert torch.equal(decode(loud, FOUR, 16), decode(silent, FOUR, 16))


@pytest.mark.parametrize("name", ["clip.mkv", "clip.webm"])
def test_container_without_a_count(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, pictures(9, 32, 32), codec="libvpx" if name.endswith("webm") else "libx264")
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 0  # else this tests nothing
    assert probe(path).frames == probe(path.read_bytes()).frames == 9
    assert np.array_equal(arrays(decode(path, FOUR, 16))[-1], everything(path)[-1])


def test_long_clip_is_capped(tmp_path: Path) -> None:
    path = write(tmp_path / "long.mp4", pictures(2000, 16, 16))
    sampling = FrameSampling(fps=8.0, max_frames=20, min_pixels=0)
    full = everything(path)
    assert len(full) == 2000
    video = decode(path, sampling, 16)
    assert np.array_equal(arrays(video), np.stack([full[i] for i in sampling.indices(2000, 8.0)]))
    assert len(video) == 20


def test_only_sampled_frames_are_kept(tmp_path: Path) -> None:
    """Memory in use at the highest point is that of the sampled frames, not of the clip's 300."""
    path = write(tmp_path / "clip.mp4", pictures(300, 64, 64))
    decode(path, FOUR, 16)  # what is imported and cached on first use does not count
    tracemalloc.start()
    decode(path, FOUR, 16)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    one = 64 * 64 * 3
    assert one <= peak < 30 * one  # the picture that is converted; tensors are not counted


def test_two_frames_are_enough(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", pictures(2, 32, 32))
    for sampling in (FOUR, FrameSampling(min_pixels=0)):
        assert np.array_equal(arrays(decode(path, sampling, 16)), np.stack(everything(path)))


def _without_last(tmp_path: Path, frames: int) -> Path:
    """A clip of 20 frames whose last ones are missing, cut between two packets; the count is still declared."""
    path = write(tmp_path / "whole.mp4", pictures(20, 32, 32), muxer={"movflags": "faststart"})
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    return _saved(tmp_path / "cut.mp4", path.read_bytes()[: packets[20 - frames].pos])


@pytest.mark.parametrize("missing", [1, 2])
def test_declared_count_a_little_too_high(tmp_path: Path, missing: int) -> None:
    """Sound files may declare a frame or two more than they show; such a clip is sampled over the real ones."""
    path = _without_last(tmp_path, missing)
    full = everything(path)
    assert len(full) == probe(path).frames == 20 - missing
    want = np.stack([full[i] for i in FOUR.indices(20 - missing, None)])
    for source in (path, path.read_bytes()):
        assert np.array_equal(arrays(decode(source, FOUR, 16)), want)


@pytest.mark.parametrize("missing", [3, 10, 18])
def test_cut_between_two_pictures(tmp_path: Path, missing: int) -> None:
    path = _without_last(tmp_path, missing)
    for source in (path, path.read_bytes()):
        with pytest.raises(VideoError, match=rf"cut\.mp4 is truncated.* 20 frames, but only {20 - missing} "):
            decode(source, FOUR, 16, "cut.mp4")


def _saved(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# --- what is refused ------------------------------------------------------------------------------


def _cut(tmp_path: Path, faststart: bool, keep: float) -> bytes:
    path = write(tmp_path / "whole.mp4", pictures(40, 64, 64), muxer={"movflags": "faststart"} if faststart else {})
    content = path.read_bytes()
    front = content.index(b"moov") < content.index(b"mdat")
    assert front == faststart
    path.unlink()
    return content[: int(len(content) * keep)]


def _sizes_differ() -> bytes:
    """A motion JPEG video whose pictures grow in the middle."""
    buffer = io.BytesIO()
    for i in range(6):
        Image.new("RGB", (16 if i < 3 else 32, 16), (40 * i, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def _sound_only(path: Path) -> bytes:
    with av.open(str(path), "w") as container:
        _sound(container, container.add_stream("aac", rate=8000, layout="mono"), 1.0)
    return path.read_bytes()


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 10, 10)).save(buffer, "PNG")
    return buffer.getvalue()


REFUSED = {
    "empty.mp4": lambda tmp: b"",
    "no_moov.mp4": lambda tmp: _cut(tmp, faststart=False, keep=0.5),
    "almost.mp4": lambda tmp: _cut(tmp, faststart=False, keep=0.98),
    "half.mp4": lambda tmp: _cut(tmp, faststart=True, keep=0.5),
    "quarter.mp4": lambda tmp: _cut(tmp, faststart=True, keep=0.25),
    "header.mp4": lambda tmp: _cut(tmp, faststart=True, keep=0.08),
    "text.mp4": lambda tmp: b"This is no video.\n" * 200,
    "text.txt": lambda tmp: b"This is no video.\n" * 200,
    "page.html": lambda tmp: b"<!doctype html><html><body>404 Not Found</body></html>\n",
    "subtitles.srt": lambda tmp: b"1\n00:00:00,000 --> 00:00:04,000\nHello\n\n",
    "picture.png": lambda tmp: _png(),
    "sound.mp4": lambda tmp: _sound_only(tmp / "tone.mp4"),
    "noise.mp4": lambda tmp: np.random.default_rng(0).bytes(5000),
    "zeros.mp4": lambda tmp: bytes(5000),
    "one.mp4": lambda tmp: write(tmp / "single.mp4", pictures(1, 32, 32)).read_bytes(),
    "unknown_codec.mp4": lambda tmp: (
        write(tmp / "known.mp4", pictures(9, 32, 32)).read_bytes().replace(b"avc1", b"xxxx")
    ),
    "grows.mjpeg": lambda tmp: _sizes_differ(),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("content", [False, True], ids=["path", "bytes"])
def test_refused_by_name(tmp_path: Path, name: str, content: bool) -> None:
    data = REFUSED[name](tmp_path)
    path = _saved(tmp_path / name, data)
    source = data if content else path
    with pytest.raises(VideoError, match=re.escape(name)):
        decode(source, FOUR, 16, name)
    with pytest.raises(VideoError, match=re.escape(name)):  # the rate is asked for, and most frames
        decode(source, FrameSampling(fps=8.0, min_pixels=0), 16, name)


def test_missing_file_is_named(tmp_path: Path) -> None:
    for function in (probe, lambda path: decode(path, FOUR, 16)):
        with pytest.raises(VideoError, match=r"there is no file .*nowhere\.mp4"):
            function(tmp_path / "nowhere.mp4")
    with pytest.raises(VideoError, match="there is no file"):
        probe(tmp_path)


def test_probe_refuses_what_is_no_video(tmp_path: Path) -> None:
    for name in ("empty.mp4", "no_moov.mp4", "text.mp4", "sound.mp4"):
        with pytest.raises(VideoError, match=re.escape(name)):
            probe(REFUSED[name](tmp_path), name)


@pytest.mark.parametrize(
    "text",
    [
        "ffconcat version 1.0\nfile secret.mp4\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nsecret.mp4\n#EXT-X-ENDLIST\n",
    ],
    ids=["ffconcat", "m3u8"],
)
@pytest.mark.parametrize("content", [False, True], ids=["path", "bytes"])
def test_a_list_of_files_is_no_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, content: bool) -> None:
    """libav follows playlists to other files, which a clip out of a shard has no business to open."""
    write(tmp_path / "secret.mp4", pictures(9, 32, 32))
    monkeypatch.chdir(tmp_path)
    path = _saved(tmp_path / "list.mp4", text.encode())
    with pytest.raises(VideoError, match=r"list\.mp4"):
        decode(text.encode() if content else path, FOUR, 16, "list.mp4")


def test_impossible_shape_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "thin.mkv", pictures(4, 2, 802), codec="libx264", pixels="yuv444p")
    with pytest.raises(VideoError, match=r"thin\.mkv.*aspect"):
        decode(path, FOUR, 16, "thin.mkv")


def test_damaged_packets_never_escape_as_another_error(tmp_path: Path) -> None:
    """Flipped bytes anywhere: the clip decodes to something of the right shape, or a VideoError names it."""
    content = write(tmp_path / "clip.mp4", pictures(12, 32, 32)).read_bytes()
    rng, refused = np.random.default_rng(1), 0
    for _ in range(150):
        broken = bytearray(content)
        for at in rng.integers(0, len(content), 3):
            broken[at] ^= int(rng.integers(1, 256))
        try:
            video = decode(
                bytes(broken), FrameSampling(fps=None, num_frames=4, min_pixels=0, max_pixels=64 * 64), 16, "x"
            )
            assert video.ndim == 4
            assert video.shape[1] == 3
            assert len(video) % 2 == 0
            assert len(video) > 0
        except VideoError as error:
            refused += 1
            assert str(error).startswith("x")
    assert 0 < refused < 150


# --- encode ---------------------------------------------------------------------------------------


def test_encode_round_trip() -> None:
    levels = np.arange(9, dtype=np.uint8) * 25
    frames = np.broadcast_to(levels[:, None, None, None], (9, 32, 48, 3))
    content = encode(frames, 8, crf=4)
    clip = probe(content)
    assert (clip.frames, clip.fps, clip.height, clip.width) == (9, 8.0, 32, 48)
    sampling = FrameSampling(fps=None, num_frames=8, min_pixels=0)
    video = arrays(decode(content, sampling, 16))
    assert np.abs(video.astype(int) - frames[sampling.indices(9, None)]).max() <= 4


def test_encode_is_deterministic_in_bytes() -> None:
    frames = np.stack(pictures(9, 32, 48))
    first = encode(frames, 8)
    assert encode(frames, 8) == first
    assert encode(frames[:, ::-1, ::-1][:, ::-1, ::-1], 8) == first  # whatever the strides
    assert encode(frames, 9) != first
    assert encode(frames[::-1], 8) != first


def test_encode_gives_the_same_bytes_in_another_process() -> None:
    frames = np.stack(pictures(9, 32, 48))
    program = (
        "import sys, numpy as np; from videoalign.datamodules.video import encode;"
        "frames = np.frombuffer(sys.stdin.buffer.read(), np.uint8).reshape(9, 32, 48, 3);"
        "sys.stdout.buffer.write(encode(frames, 8))"
    )
    out = subprocess.run([sys.executable, "-c", program], input=frames.tobytes(), capture_output=True, check=True)
    assert out.stdout == encode(frames, 8)
