"""Frames that nobody samples and nothing refers to are left out of decoding: the same pictures, in less time."""

import io

import av
import numpy as np
import pytest

from videoalign import VideoAlignError
from videoalign.datamodules import video
from videoalign.models.frame_sampling import FrameSampling

COUNT = 41
SAMPLINGS = (
    FrameSampling(fps=2.0, min_pixels=0),
    FrameSampling(fps=None, num_frames=2, min_pixels=0),
    FrameSampling(fps=None, num_frames=40, min_pixels=0),
)
CODED = {
    "x264's defaults": ("mp4", "libx264", {}),
    "no pyramid": ("mp4", "libx264", {"bf": "3", "x264-params": "b-pyramid=none:b-adapt=0"}),
    "no frames between others": ("mp4", "libx264", {"bf": "0"}),
    "open groups": ("mp4", "libx264", {"x264-params": "open-gop=1:keyint=8:bframes=3:b-adapt=0"}),
    "fields": ("mp4", "libx264", {"x264-params": "tff=1:bframes=2:b-adapt=0"}),
    "matroska": ("matroska", "libx264", {"bf": "3"}),
    "avi, without times of showing": ("avi", "libx264", {"bf": "2"}),
    "broadcast": ("mpegts", "libx264", {"bf": "3"}),
    "MPEG-4": ("mp4", "mpeg4", {"bf": "2"}),
    "VP9": ("webm", "libvpx-vp9", {"deadline": "realtime"}),
}


def coded(container: str, codec: str, options: dict[str, str]) -> bytes:
    """A clip in which every frame moves and differs."""
    buffer, noise = io.BytesIO(), np.random.default_rng(0)
    ground = noise.integers(0, 256, (8, 12, 3), np.uint8).repeat(8, 0).repeat(8, 1)  # (64, 96, 3)
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=8, options=options)
        stream.height, stream.width = ground.shape[:2]
        stream.pix_fmt = "yuv420p"
        for i in range(COUNT):
            frame = av.VideoFrame.from_ndarray(np.roll(ground, (2 * i, 3 * i), (0, 1)), format="rgb24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return buffer.getvalue()


def without_first(content: bytes, packets: int, container: str = "matroska") -> bytes:
    """The clip as a recording that begins in the middle: the first packets are missing."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(content)) as source, av.open(buffer, "w", format=container) as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if number >= packets and packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    return buffer.getvalue()


def same(content: bytes, sampling: FrameSampling) -> np.ndarray:
    """Frames (T, H, W, 3) of a decoder that leaves nothing out, chosen by the rule of the sampling."""
    with av.open(io.BytesIO(content)) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    clip = video.probe(content)
    fps = clip.fps if len(pictures) == clip.frames else video.examine(content, sampling).fps
    return np.stack([pictures[index] for index in sampling.indices(len(pictures), fps)])


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["by rate", "two", "nearly all"])
def test_frames_are_those_of_a_decoder_that_leaves_nothing_out(name: str, sampling: FrameSampling) -> None:
    content = coded(*CODED[name])
    found = video.decode(content, sampling, 2)
    assert np.array_equal(found.permute(0, 2, 3, 1).numpy(), same(content, sampling))


@pytest.mark.parametrize("packets", [1, 2, 5, 9, 10, 11])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["by rate", "two", "nearly all"])
def test_a_clip_that_begins_in_the_middle(packets: int, sampling: FrameSampling) -> None:
    content = without_first(coded(*CODED["open groups"]), packets)
    found = video.decode(content, sampling, 2)
    assert np.array_equal(found.permute(0, 2, 3, 1).numpy(), same(content, sampling))


def _decoded(monkeypatch: pytest.MonkeyPatch, content: bytes, sampling: FrameSampling) -> int:
    """Number of frames that the decoder gives."""
    count, look = [0], video._Reader._look

    def counted(reader: video._Reader, frame: av.VideoFrame) -> None:
        count[0] += 1
        look(reader, frame)

    monkeypatch.setattr(video._Reader, "_look", counted)
    video.decode(content, sampling, 2)
    return count[0]


@pytest.mark.parametrize(("name", "share"), [("no pyramid", 0.45), ("matroska", 0.8), ("no frames between others", 1)])
def test_what_nothing_refers_to_is_left_out(monkeypatch: pytest.MonkeyPatch, name: str, share: float) -> None:
    frames = _decoded(monkeypatch, coded(*CODED[name]), SAMPLINGS[1])
    assert frames == COUNT if share == 1 else frames <= share * COUNT


def test_examine_meets_damage_in_every_frame() -> None:
    """An import looks at frames that this sampling leaves out: other samplings will want them."""
    content = bytearray(coded(*CODED["no pyramid"]))
    with av.open(io.BytesIO(bytes(content))) as container:
        packets = [packet for packet in container.demux(video=0) if packet.dts is not None]
    latest = packets[0].pts
    for spare in packets[9:]:
        if spare.pts < (latest := max(latest, spare.pts)):  # between others, none of which refers to it
            break
    place = bytes(content).index(bytes(spare))
    content[place + 6 : place + spare.size] = bytes(255 for _ in range(spare.size - 6))
    video.decode(bytes(content), SAMPLINGS[1], 2)  # two frames, none of them this one
    with pytest.raises(VideoAlignError, match=r"damaged|cannot be decoded"):
        video.examine(bytes(content), SAMPLINGS[1])
