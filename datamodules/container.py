"""Video containers: which stream a player shows, how many frames of it, and at which frame rate.

Reads packets and decodes nothing. The header of a container is compared with its packets: headers of live recordings
are guesses, a file may hold more samples than its edit list shows, and a truncated file declares more than it holds.
"""

import io
import itertools
import statistics
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
from av.stream import Disposition

from .. import VideoAlignError
from .gif import check_gif
from .limits import FILE_BYTES, FRAME_PIXELS, VIDEO_PIXELS

# Containers of video files; libav also knows texts, lists of further files, devices and bare streams.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif,mxf,ivf"
_READ = "mp4, mov, mkv, webm, avi, ts, mpg, flv, wmv, ogg, mxf, ivf and gif"
# Errors that libav raises on damaged files: its own, and those of sizes that no memory holds.
_LIBAV = (av.error.FFmpegError, MemoryError, OverflowError)
_STILLS = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
_SLACK = 2
"""Number of frames that may be missing at the end: recordings and copies often stop in the middle of a frame."""
_JUMP = 10.0
"""Seconds between two frames above which the clock has jumped (FFmpeg's ``dts_delta_threshold``)."""
_LEAST_PIXELS = 512 * 512
_TS_DISCONT = 0x200
"""libav's AVFMT_TS_DISCONT: streams of broadcasts, which begin, jump and end anywhere and declare nothing."""


class VideoError(VideoAlignError):
    """Raised for a clip that cannot be used; the message names the clip and the reason."""


@dataclass(frozen=True)
class Clip:
    """Frame count, frame rate and size of a video as a player shows it.

    Attributes:
        frames: Number of frames that are shown; an edit list may hide some of the file's.
        fps: Average frames per second, see :func:`frame_rate`; None where nothing tells it.
        height: Height as shown, in pixels.
        width: Width as shown, in pixels; pixels that are not square are stretched.
    """

    frames: int
    fps: float | None
    height: int
    width: int


def frame_rate(stated: float | None, frames: int, times: Iterable[int], hold: int, tick: Fraction) -> float | None:
    """Frames per second of a clip: the stated rate, or the measured one where the two disagree.

    For containers without a rate, such as those of browsers' recordings, libav guesses one from the resolution of the
    clock (1000 frames a second in WebM) or from the first few frames. A stated rate is taken exactly if it agrees with
    the clip's length to one frame or 2 %, whichever is more: no time stamp tells how long the last frame is shown, and
    the released reward model was trained with stated rates. Otherwise the average over the time stamps is taken.
    Backward steps of the clock, and steps above both ten seconds and ten times the median, are jumps (joined
    recordings, a counter that wraps) and are left out; so is the time before the first frame.

    Args:
        stated: Frames per second that the container states or libav guesses; None or 0 where there is none.
        frames: Number of frames.
        times: Time stamps in the order of decoding, in ticks.
        hold: Duration of the last frame in ticks; 0 where unknown.
        tick: Seconds per tick.

    Returns:
        Frames per second; None without a stated rate and two time stamps.

    Example:
        >>> frame_rate(24.0, 5, [0, 42, 83, 125, 167], 0, Fraction(1, 1000))
        24.0
        >>> frame_rate(1000.0, 5, [0, 40, 80, 120, 160], 0, Fraction(1, 1000))
        25.0
    """
    times = list(times)
    steps = [after - before for before, after in itertools.pairwise(times) if after >= before]
    bound = max(_JUMP / float(tick), 10 * statistics.median([step for step in steps if step] or [0]))
    steps = [step for step in steps if step <= bound]
    if not sum(steps):
        return stated or None
    mean = sum(steps) / len(steps)
    if mean < hold <= bound:
        mean = (sum(steps) + hold) / (len(steps) + 1)
    length = frames * mean
    unsaid = max(mean, 0.02 * length) + 1  # time stamps are rounded to ticks
    if stated and abs(frames / stated / float(tick) - length) <= unsaid:
        return stated
    return 1 / (mean * float(tick))


@dataclass
class Track:
    """Counts and time stamps of the packets of a video stream.

    Attributes:
        stream: The stream.
        samples: Number of packets.
        shown: Number of packets that lead to a frame on the screen.
        decoding: Decoding time stamps of shown packets, in ticks; packets may have none.
        showing: Presentation time stamps of shown packets, in ticks; packets may have none.
        latest: The latest presentation time stamp.
        hold: Duration of the frame at that time, in ticks.
        broken: Number of the first packet that is incomplete.
    """

    stream: av.VideoStream
    samples: int = 0
    shown: int = 0
    decoding: list[int] = field(default_factory=list)
    showing: list[int] = field(default_factory=list)
    latest: int | None = None
    hold: int = 0
    broken: int | None = None

    def add(self, packet: av.Packet) -> None:
        """Add a packet to the counts."""
        self.samples += 1
        if packet.is_corrupt and self.broken is None:
            self.broken = self.samples
        if packet.is_discard or not packet.size:  # outside of the edit list, or a repetition without content
            return
        self.shown += 1
        if packet.dts is not None:
            self.decoding.append(packet.dts)
        if packet.pts is not None:
            self.showing.append(packet.pts)
            if self.latest is None or packet.pts >= self.latest:
                self.latest, self.hold = packet.pts, packet.duration or 0

    def rate(self) -> float | None:
        """Frames per second; see :func:`frame_rate`."""
        stated = self.stream.average_rate or self.stream.guessed_rate
        # decoding times grow steadily even where frames are stored in another order than they are shown in
        times = self.decoding if len(self.decoding) > 1 else sorted(self.showing)
        return frame_rate(float(stated) if stated else None, self.shown, times, self.hold, self.stream.time_base)

    def times(self) -> tuple[int, ...]:
        """Presentation time stamps of the shown packets, ascending.

        Empty where packets have none or equal ones, or have them in the order of decoding: AVI numbers packets, and so
        do files that were made of AVI, whatever the order in which their frames are shown.
        """
        alone, ordered = len({*self.showing}) == self.shown, sorted(self.showing)
        return tuple(ordered) if alone and ordered != self.showing else ()

    def seconds(self) -> float:
        """Length of the clip in seconds."""
        return self.shown / (self.rate() or 1.0)

    def size(self) -> tuple[int, int]:
        """Height and width as shown, before rotation."""
        shape = self.stream.sample_aspect_ratio or 1  # width of a pixel / its height; 0 where unknown
        return self.stream.height, max(1, round(self.stream.width * shape))

    def pixels(self) -> int:
        """Number of pixels of a decoded frame."""
        return self.stream.height * self.stream.width


@dataclass(frozen=True)
class Film:
    """The video stream of a file that a player shows.

    Attributes:
        index: Number of the stream in its file.
        clip: Its frame count, frame rate and size, before rotation.
        strict: Whether damage can be told from the usual state of such a container.
        times: Presentation time stamps of its frames in the order in which they are shown, in ticks; empty where they
            are not known to tell this order, see :meth:`Track.times`.
    """

    index: int
    clip: Clip
    strict: bool
    times: tuple[int, ...] = ()


def survey(source: bytes | str | Path, name: str = "video") -> Film:
    """Read all packets of a file, without decoding one, and choose its film.

    Args:
        source: Path or content of a video file.
        name: What to call the file in messages.

    Raises:
        VideoError: If the file is missing, empty, truncated, too large, or no video.
    """
    with opened(source, name) as container:
        tracks = {s.index: Track(s) for s in container.streams.video if s.codec_context is not None}
        end = 0.0
        for packet in container.demux():
            if packet.pts is None and packet.dts is None and not packet.size:  # PyAV's mark of a stream's end
                continue
            if track := tracks.get(packet.stream_index):
                track.add(packet)
                if track.shown % 1024 == 1:
                    _bound(track, name)
            if packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        track = _best(container, list(tracks.values()), name)
        _bound(track, name)
        strict = not container.format.flags & _TS_DISCONT
        if strict:
            _check_whole(container, track, end, name)
        clip = Clip(track.shown, track.rate(), *track.size())
        return Film(track.stream.index, clip, strict, track.times())


def _bound(track: Track, name: str) -> None:
    pixels = track.pixels()
    if not pixels:
        raise VideoError(
            f"{name}: the size of its frames cannot be told; it is damaged, or they are above the limit of "
            f"{FRAME_PIXELS.value} pixels ({FRAME_PIXELS.variable})"
        )
    if why := FRAME_PIXELS.excess(pixels) or VIDEO_PIXELS.excess(track.shown * max(pixels, _LEAST_PIXELS)):
        raise VideoError(f"{name} ({track.stream.width}x{track.stream.height}) {why}")


def _best(container: av.container.InputContainer, tracks: list[Track], name: str) -> Track:
    """The stream that is no cover, thumbnail or preview: the longest one; of equally long ones the largest."""
    if not container.streams.video:
        raise VideoError(f"{name} holds no video stream")
    if not tracks:
        raise VideoError(f"{name} is of a video codec that this build of libav cannot decode")
    films = [track for track in tracks if not track.stream.disposition & _STILLS]
    if not films:
        raise VideoError(f"{name} holds no video stream but a cover picture or thumbnails")
    films = [track for track in films if track.shown]
    if not films:
        raise VideoError(f"{name} holds no frame, or is cut short")
    longest = max(track.seconds() if track.shown > 1 else 0.0 for track in films)
    films = [track for track in films if track.shown > 1 and track.seconds() >= 0.9 * longest] or films
    return max(films, key=lambda track: (track.pixels(), track.shown))


def _check_whole(container: av.container.InputContainer, track: Track, end: float, name: str) -> None:
    """Compare the packets with the declarations of the container.

    Raises:
        VideoError: If frames are missing.
    """
    kind, stream = container.format.name, track.stream
    # The index of an mp4 lists every frame of the edit list; AVI and IVF declare a number of frames, others a duration.
    declared = len(stream.index_entries) if kind.startswith("mov") else stream.frames if kind in ("avi", "ivf") else 0
    if declared - track.samples > _SLACK:
        raise VideoError(
            f"{name} is truncated: it declares {declared} frames, but only {track.samples} are there; fetch it again"
        )
    if track.broken:
        raise VideoError(
            f"{name} is truncated or damaged: packet {track.broken} of {track.samples} is not whole; fetch it again"
        )
    if kind.startswith(("matroska", "flv", "mxf")) and container.duration:
        seconds = container.duration / av.time_base
        if seconds - end > _SLACK * track.seconds() / track.shown + 0.05:
            raise VideoError(
                f"{name} is truncated: it declares {seconds:.2f} s, but ends after {end:.2f} s; fetch it again"
            )


@contextmanager
def opened(source: bytes | str | Path, name: str) -> Iterator[av.container.InputContainer]:
    """Open a container; errors of libav become messages that name the file.

    Args:
        source: Path or content of a video file.
        name: What to call the file in messages.

    Raises:
        VideoError: If the file is missing, empty, too large, no video, or fails to be decoded within the block.
    """
    _check_content(source, name)
    # The prefix keeps libav from taking "a:b.mp4" for the address of a server.
    target = io.BytesIO(source) if isinstance(source, bytes) else f"file:{source}"
    pixels = {"max_pixels": str(FRAME_PIXELS.value)}  # libav refuses larger frames before it makes room for them
    try:
        # Tags may have any encoding, and nobody reads them.
        formats = {"format_whitelist": _FORMATS}
        container = av.open(target, options=pixels, container_options=formats, metadata_errors="replace")
    except (*_LIBAV, ValueError) as error:
        raise VideoError(f"{name} is no readable video, or is cut short ({_short(error)}); read are {_READ}") from None
    try:
        with container:
            for stream in container.streams.video:
                if stream.codec_context is not None:
                    # One thread: the loader's workers are the parallelism, and frame threads delay the first picture.
                    stream.codec_context.thread_count = 1
                    stream.codec_context.options = pixels
            yield container
    except _LIBAV as error:
        raise VideoError(f"{name} cannot be decoded ({_short(error)})") from None


def _check_content(source: bytes | str | Path, name: str) -> None:
    """Refuse files that are missing, empty, too large, or of a format that is not read."""
    if isinstance(source, bytes):
        size, head = len(source), source[:4096]
    else:
        if not Path(source).is_file():
            raise VideoError(f"{name}: there is no file {source}")
        size = Path(source).stat().st_size
        with open(source, "rb") as file:
            head = file.read(4096)
    if not size:
        raise VideoError(f"{name} is empty (0 bytes)")
    if why := FILE_BYTES.excess(size):
        raise VideoError(f"{name} {why}")
    if kind := _other_kind(head):
        raise VideoError(
            f"{name} is {kind}, which is not read; convert it to mp4, or get the original. Read are {_READ}"
        )
    if head.startswith(b"GIF8"):
        try:
            check_gif(source if isinstance(source, bytes) else Path(source).read_bytes())
        except VideoAlignError as error:
            raise VideoError(f"{name} {error}") from None


def _other_kind(head: bytes) -> str | None:
    """Name the format of a file that is no video, for formats that are often taken for videos; None for others."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "an animated WebP picture" if b"ANIM" in head[:64] else "a WebP picture"
    if head.startswith(b"\x89PNG"):
        return "an animated PNG (APNG) picture" if b"acTL" in head else "a PNG picture"
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis", b"heic", b"heix", b"hevc", b"hevx", b"mif1", b"msf1"):
        return f"a picture of the {'AVIF' if head[8:10] == b'av' else 'HEIF'} format"
    text = head[:256].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for start, kind in _STARTS.items():
        if text.startswith(start):
            return kind
    return None


_STARTS = {
    b"\xff\xd8\xff": "a JPEG picture", b"\xff\x0a": "a JPEG XL picture", b"\x00\x00\x00\x0cjxl ": "a JPEG XL picture",
    b"ii*\x00": "a TIFF picture", b"mm\x00*": "a TIFF picture", b"bm": "a BMP picture", b"pk\x03\x04": "a zip archive",
    b"<!doctype html": "a web page", b"<html": "a web page", b"%pdf": "a PDF document",
    b"version https://git-lfs": "a pointer of Git LFS (`git lfs pull` fetches the video)",
}  # fmt: skip


def _short(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:120]
