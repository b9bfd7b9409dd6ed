"""Video files that a table of ratings names: in a folder, or in a zip archive, which need not be unpacked."""

import stat
import zipfile
from functools import cached_property
from pathlib import Path, PurePosixPath

from .. import VideoAlignError


class MissingVideo(VideoAlignError):
    """A path that names no file."""


class Media:
    """Files by their path relative to a root; what leads out of it is refused.

    Args:
        root: folder or zip archive. within: names of folders that either the paths or the root may leave out, as
            ``videos`` in ``videos/a.mp4``.
    """

    def __init__(self, root: Path, within: tuple[str, ...] = ()) -> None:
        self.root, self.within = root, within

    def find(self, path: str) -> str:
        """The name under which :meth:`source` has the file.

        Raises:
            MissingVideo: where there is no such file. VideoAlignError: where the path leads out of the root.
        """
        pure = PurePosixPath(path.strip().replace("\\", "/"))
        if not pure.name or pure.is_absolute() or ".." in pure.parts or ":" in pure.parts[0]:
            raise VideoAlignError(f"path {path!r} is not a path inside the videos' folder")
        inner = [folder for folder in self.within if pure.parts[0] == folder and len(pure.parts) > 1]
        names = [str(pure), *(f"{folder}/{pure}" for folder in self.within)]
        for name in names + [str(pure.relative_to(folder)) for folder in inner]:
            if self._has(name):
                return name
        raise MissingVideo(f"there is no file {self.root / pure}")

    def _has(self, name: str) -> bool:
        raise NotImplementedError

    def source(self, name: str) -> Path | bytes:
        """What the video decoder takes."""
        raise NotImplementedError

    def read(self, name: str) -> bytes:
        """The file's content."""
        raise NotImplementedError


class Folder(Media):
    """Files of a folder."""

    def _has(self, name: str) -> bool:
        file = self.root / name
        if not file.is_file():
            return False
        if not file.resolve().is_relative_to(self.root.resolve()):
            raise VideoAlignError(f"path {name!r} is a link out of the videos' folder")
        return True

    def source(self, name: str) -> Path:
        """The path: a decoder reads no more of it than it needs."""
        return self.root / name

    def read(self, name: str) -> bytes:
        """The file's content."""
        return (self.root / name).read_bytes()


class Archive(Media):
    """Members of a zip archive; goes to other processes as its path."""

    def __init__(self, root: Path, within: tuple[str, ...] = ()) -> None:
        super().__init__(root, within)
        escaping = [
            n for n in self._names if PurePosixPath(n).is_absolute() or ".." in PurePosixPath(n).parts or "\\" in n
        ]
        links = [i.filename for i in self._zip.infolist() if stat.S_ISLNK(i.external_attr >> 16)]
        if escaping or links:
            raise VideoAlignError(
                f"{root}: {len(escaping)} names lead out of the archive and {len(links)} are links "
                f"(such as {(escaping + links)[0]!r}); an archive of videos has neither, so it was not read"
            )

    def __getstate__(self) -> dict:
        return {"root": self.root, "within": self.within}

    @cached_property
    def _zip(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self.root)
        except (OSError, zipfile.BadZipFile) as error:
            raise VideoAlignError(f"{self.root} is no zip archive, or was cut short ({error})") from None

    @cached_property
    def _names(self) -> set[str]:
        return {i.filename for i in self._zip.infolist() if not i.is_dir()}

    def _has(self, name: str) -> bool:
        return name in self._names

    def read(self, name: str) -> bytes:
        """The member's content."""
        try:
            return self._zip.read(name)
        except (OSError, RuntimeError, NotImplementedError, zipfile.BadZipFile, EOFError) as error:
            raise VideoAlignError(f"{self.root}, {name}: cannot be read ({error})") from None

    source = read


def open_media(path: Path, within: tuple[str, ...] = ()) -> Media:
    """A folder, or a zip archive by its ending.

    Raises:
        VideoAlignError: where it is neither, or an archive that names files outside itself.
    """
    if path.is_dir():
        return Folder(path, within)
    if path.is_file() and path.suffix.lower() == ".zip":
        return Archive(path, within)
    raise VideoAlignError(f"--videos {path}: there is no such folder or zip archive")
