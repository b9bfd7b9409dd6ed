"""The page ``samples.html`` in a run's folder: clips of every validation, which play in step and can be scrubbed."""

import re
import shutil
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from .. import VideoAlignError
from ..models.files import read_json, write_bytes, write_json, write_text
from .side_clips import Clip, mp4

NAME = "samples.html"
"""File name of the page."""
KEEP = 20
"""Number of validations that the page shows unless another one is given."""
_INDEX = "clips.json"
_STEP = re.compile(r"\d{6,}")
_PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=select_autoescape(["html"]),
    undefined=StrictUndefined,
)


class SamplesPage:
    """Clips of a run: ``samples/STEP/`` holds the mp4 files and ``clips.json``, from which the page is made.

    The page needs no server and no network. It is made from what is on the disk, so that a run that goes on adds to it.

    Args:
        folder: The run's folder.
        keep: Number of validations that stay: the first one, and the latest ones. :data:`KEEP` if not given.
    """

    def __init__(self, folder: Path, keep: int | None = None) -> None:
        self.folder, self.keep = folder, keep or KEEP

    def add(self, tag: str, clip: Clip, step: int) -> None:
        """Add videos to the page; a clip of the same name and step is replaced.

        Args:
            tag: Name of the clip, such as ``val/examples/1``.
            clip: The videos.
            step: Optimizer step of the validation.
        """
        place = self.folder / "samples" / f"{step:06d}"
        entries = [entry for entry in _entries(place) if entry["tag"] != tag]
        stem = re.sub(r"[^A-Za-z0-9]+", "-", tag).strip("-")[:80]
        while any(entry["stem"] == stem for entry in entries):  # another tag that differs in its punctuation
            stem += "-"
        sides = []
        for number, (label, frames) in enumerate(clip.sides.items()):
            name = f"{stem}.{number}.mp4"
            write_bytes(place / name, mp4(frames, clip.fps, clip.height))
            sides.append({"label": label, "file": f"samples/{place.name}/{name}", "frames": len(frames)})
        about = {"prompt": clip.prompt, "table": [list(row) for row in clip.table], "fps": clip.fps}
        entries.append({"tag": tag, "stem": stem, "sides": sides, **about})
        write_json(place / _INDEX, entries)
        self.write()

    def write(self) -> None:
        """Remove validations that are too many, and make the page anew."""
        places = sorted(
            (place for place in (self.folder / "samples").iterdir() if _STEP.fullmatch(place.name)),
            key=lambda place: int(place.name),
        )
        for place in places[1 : max(1, len(places) - self.keep + 1)] if self.keep > 1 else places[:-1]:
            shutil.rmtree(place, ignore_errors=True)
            places.remove(place)
        validations = [{"step": int(place.name), "clips": entries} for place in places if (entries := _entries(place))]
        text = _PAGES.get_template(NAME).render(run="/".join(self.folder.parts[-3:]), validations=validations)
        write_text(self.folder / NAME, text)


def _entries(place: Path) -> list[dict[str, Any]]:
    """The clips of a validation; none where the folder holds no readable index."""
    try:
        return read_json(place / _INDEX, "the clips of a validation") if (place / _INDEX).is_file() else []
    except VideoAlignError:
        return []
