"""Files that are refused: too large, of another format, cut or damaged."""

import io
import multiprocessing
import random
import resource
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from container_kit import FOUR, gif, picture, recorded, told, video
from videoalign import VideoAlignError
from videoalign.datamodules.importing import check_clip
from videoalign.datamodules.limits import FILE_BYTES, FRAME_PIXELS, VIDEO_PIXELS
from videoalign.datamodules.media import open_media
from videoalign.datamodules.verify import GLANCE
from videoalign.datamodules.video import VideoError, coding, decode, probe

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
