"""Files that a table of ratings names, videos and images: in a folder, or in a zip archive, which stays packed."""

import filecmp
import lzma
import os
import re
import stat
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from .. import VideoAlignError
from ..models.hub_address import in_cache
from .limits import FILE_BYTES
from .sample_images import SampleImage, read_image


class MissingVideo(VideoAlignError):
    """Raised for a path that names no file."""


class Media:
    """Files by their path relative to a root; paths that lead out of it are refused.

    Args:
        root: Folder or zip archive.
        within: Names of folders that either the paths or the root may leave out, as ``videos`` in ``videos/a.mp4``.
    """

    def __init__(self, root: Path, within: tuple[str, ...] = ()) -> None:
        self.root, self.within = root, within

    def find(self, path: str) -> str:
        """The name of a file for :meth:`source` and :meth:`read`.

        A file that a table names by its address in the web is found by the longest end of the address that exists.

        Args:
            path: Path or address, as the table spells it.

        Raises:
            MissingVideo: If there is no such file.
            VideoAlignError: If the path leads out of the root.
        """
        if re.match(r"https?://", path):
            parts = [part for part in unquote(urlsplit(path).path).split("/") if part not in ("", ".", "..")]
            names = ["/".join(parts[first:]) for first in range(len(parts))]
            missing = f"{path} is not downloaded: no end of this address is a file in {self.root}"
        else:
            pure = PurePosixPath(path.strip().replace("\\", "/"))
            if not pure.name or pure.is_absolute() or ".." in pure.parts or re.match(r"[A-Za-z]:", pure.parts[0]):
                raise VideoAlignError(f"path {path!r} is not a path inside the videos' folder")
            inner = [folder for folder in self.within if pure.parts[0] == folder and len(pure.parts) > 1]
            names = [str(pure), *(f"{f}/{pure}" for f in self.within), *(str(pure.relative_to(f)) for f in inner)]
            missing = f"there is no file {self.root / pure}"
            if len(pure.parts) > 1 and pure.parts[0] == self.root.name and (self.root.parent / pure).is_file():
                missing += f"; its path begins with {self.root.name} already: name {self.root.parent} instead"
        for name in names:
            if self._has(name):
                return name
        raise MissingVideo(missing)

    def _has(self, name: str) -> bool:
        raise NotImplementedError

    def source(self, name: str) -> Path | bytes:
        """Path or content of a file, for the video decoder."""
        raise NotImplementedError

    def read(self, name: str) -> bytes:
        """Content of a file."""
        raise NotImplementedError

    def same(self, one: str, other: str) -> bool:
        """Whether two files have the same content."""
        raise NotImplementedError


class Folder(Media):
    """Files of a folder."""

    def _has(self, name: str) -> bool:
        file = self.root / name
        try:
            if not file.is_file():
                return False
        except OSError:  # a name that is too long, such as a prompt in the column of paths
            return False
        if not file.resolve().is_relative_to(self.root.resolve()) and not in_cache(file):
            raise VideoAlignError(f"path {name!r} is a link out of the videos' folder; copy the files into one folder")
        return True

    def source(self, name: str) -> Path:
        """Path of a file, because a decoder reads no more of it than it needs."""
        return self.root / name

    def read(self, name: str) -> bytes:
        """Content of a file."""
        return (self.root / name).read_bytes()

    def same(self, one: str, other: str) -> bool:
        """Whether two files have the same content; read where their sizes are equal."""
        return filecmp.cmp(self.root / one, self.root / other, shallow=False)


@lru_cache(maxsize=4)
def _opened(path: Path, changed: int, process: int) -> tuple[zipfile.ZipFile, frozenset[str]]:
    """An archive and the names of its files, read once per process, however many tasks a pool is given.

    A forked process opens the archive anew, because it would share the position in the file with its parent.

    Args:
        path: Path of the archive.
        changed: Time of its last change; a changed file is read anew.
        process: Id of the process.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise VideoAlignError(f"{path} is no zip archive, or was cut short ({error})") from None
    return archive, frozenset(i.filename for i in archive.infolist() if not i.is_dir())


class Archive(Media):
    """Files of a zip archive; names that lead out of it, and links, are refused."""

    def __init__(self, root: Path, within: tuple[str, ...] = ()) -> None:
        super().__init__(root, within)
        archive, names = self._open()
        escaping = [n for n in names if PurePosixPath(n).is_absolute() or ".." in PurePosixPath(n).parts or "\\" in n]
        links = [i.filename for i in archive.infolist() if stat.S_ISLNK(i.external_attr >> 16)]
        if escaping or links:
            raise VideoAlignError(
                f"{root}: {len(escaping)} names lead out of the archive and {len(links)} are links "
                f"(such as {(escaping + links)[0]!r}); an archive of videos has neither, so it was not read"
            )

    def _open(self) -> tuple[zipfile.ZipFile, frozenset[str]]:
        return _opened(self.root.resolve(), self.root.stat().st_mtime_ns, os.getpid())

    def _has(self, name: str) -> bool:
        return name in self._open()[1]

    def same(self, one: str, other: str) -> bool:
        """Whether two files have the same content, by their sizes and checksums."""
        a, b = (self._open()[0].getinfo(name) for name in (one, other))
        return (a.file_size, a.CRC) == (b.file_size, b.CRC)

    def read(self, name: str) -> bytes:
        """Content of a file; files above the limit are not unpacked."""
        archive = self._open()[0]
        size = archive.getinfo(name).file_size
        if why := FILE_BYTES.excess(size):
            raise VideoAlignError(f"{self.root}, {name}: {why}")
        try:
            with archive.open(name) as file:
                # read() without a size would unpack everything before it compares the size with the declared one
                return file.read(size) + file.read(1)
        except (OSError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError) as error:
            raise VideoAlignError(f"{self.root}, {name}: cannot be read ({error})") from None

    source = read


class ImageFile(NamedTuple):
    """A file of an image.

    Attributes:
        media: Files that it belongs to.
        name: Its name among them.
    """

    media: Media
    name: str

    def read(self) -> SampleImage:
        """The image, which can be decoded."""
        return read_image(self.media.read(self.name), self.name)

    def why_not(self) -> str:
        """The reason why it cannot be used; empty if it can."""
        try:
            self.read()
        except (VideoAlignError, OSError) as error:
            return str(error)
        return ""


class Images:
    """Finds the images that a table names in its column ``image``: among its videos, or else beside the table.

    Args:
        media: Files of the videos.
        table: Path of the table.
    """

    def __init__(self, media: Media, table: Path) -> None:
        self.places = (media, Folder(table.parent))

    def find(self, cells: dict[str, str]) -> ImageFile | None:
        """The image of a row; None where the table has no such column, or an empty cell in it.

        Args:
            cells: Cells of the row by column.

        Raises:
            MissingVideo: If there is no such file.
            VideoAlignError: If the path leads out of its folder.
        """
        path = cells.get("image", "").strip()
        if not path:
            return None
        missing = []
        for media in self.places:
            try:
                return ImageFile(media, media.find(path))
            except MissingVideo as error:
                missing.append(str(error))
        raise MissingVideo(", and ".join(dict.fromkeys(missing)))


def open_media(path: Path, within: tuple[str, ...] = ()) -> Media:
    """Open a folder, or a file that ends in ``.zip``.

    Args:
        path: Folder or zip archive.
        within: Names of folders that either the paths or the root may leave out; see :class:`Media`.

    Raises:
        VideoAlignError: If the path is neither, or an archive that names files outside itself.
    """
    if path.is_dir():
        return Folder(path, within)
    if path.is_file() and path.suffix.lower() == ".zip":
        return Archive(path, within)
    raise VideoAlignError(f"--videos {path}: there is no such folder or zip archive")
