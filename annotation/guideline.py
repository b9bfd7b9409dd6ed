"""What annotators are told (after VideoAlign, appendix G, in our own words), one key away on the page."""

from dataclasses import dataclass, fields
from pathlib import Path

from .. import VideoAlignError
from ..models.files import read_yaml


@dataclass(frozen=True)
class Part:
    """One dimension: the question, what counts, and what a good and a bad example look like."""

    title: str
    question: str
    points: tuple[str, ...]
    good: str
    bad: str


GUIDELINE = (
    Part(
        "Visual quality", "Frame by frame, motion aside: which one looks better?",
        ("things are formed as they should be, nothing broken or implausible", "sharp; no noise, haze, blocks or other artefacts",
         "rich detail, material and light", "pleasing composition and colour", "nothing that should not be shown (then press the flag)"),
        "A cat whose fur, eyes and shadow hold up in every still picture.", "A cat with five legs, or a face that dissolves in blur.",
    ),
    Part(
        "Motion quality", "Between the frames: which one moves better?",
        ("stable, without flicker, jumps or sudden changes of shape", "obeys physics: speed, weight, contact",
         "moving parts blend cleanly with what surrounds them", "moving things stay clear", "graceful and continuous",
         "enough of it: what hardly moves is worse than what moves well"),
        "A runner whose feet meet the ground, at an even pace.", "A runner who slides, melts into the wall, or stands still.",
    ),
    Part(
        "Text alignment", "Beside the request: which one shows more of what was asked for?",
        ("the subjects, with their attributes and in the right number", "what they do, in the way and direction asked for",
         "the surroundings", "the style", "the camera movement"),
        "“Two red birds fly to the left”: two, red, birds, flying, to the left.", "One bird, or red ones that sit.",
    ),
)  # fmt: skip


def read_guideline(path: str | Path) -> tuple[Part, ...]:
    """A guideline of one's own: YAML, a list of parts with the fields of :class:`Part`."""
    found = read_yaml(path, "--guideline")
    names = {field.name for field in fields(Part)}
    if not isinstance(found, list) or not found:
        raise VideoAlignError(f"--guideline {path} holds no list of parts, each with {', '.join(sorted(names))}")
    for number, part in enumerate(found, 1):
        if not (
            isinstance(part, dict)
            and part.keys() == names
            and isinstance(part["points"], list)
            and all(isinstance(text, str) for text in (*part["points"], *(part[name] for name in names - {"points"})))
        ):
            raise VideoAlignError(
                f"--guideline {path}, part {number} must have {', '.join(sorted(names))}: texts, points a list of them"
            )
    return tuple(Part(**{**part, "points": tuple(part["points"])}) for part in found)
