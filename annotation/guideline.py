"""The guideline for annotators, which one key opens on the page (after VideoAlign, appendix G, in our own words)."""

from dataclasses import dataclass, fields
from pathlib import Path

from .. import VideoAlignError
from ..models.files import read_yaml


@dataclass(frozen=True)
class Part:
    """One part of the guideline, about one dimension.

    Attributes:
        title: Name of the dimension.
        question: The question to answer about two videos.
        points: What to look at.
        good: A good example.
        bad: A bad example.
    """

    title: str
    question: str
    points: tuple[str, ...]
    good: str
    bad: str


GUIDELINE = (
    Part(
        "Visual quality", "Frame by frame, motion aside: which one looks better?",
        ("things have the form that they should have; nothing is broken or implausible",
         "the picture is sharp, without noise, haze, blocks or other artefacts",
         "detail, materials and light are rich", "composition and colours please",
         "nothing is shown that should not be shown (if it is, press the flag)"),
        "A cat whose fur, eyes and shadow look right in every still picture.",
        "A cat with five legs, or a face that dissolves in blur.",
    ),
    Part(
        "Motion quality", "Between the frames: which one moves better?",
        ("motion is stable, without flicker, jumps or sudden changes of shape",
         "motion obeys physics: speed, weight, contact", "moving parts blend cleanly with their surroundings",
         "moving things stay clear", "motion is graceful and continuous",
         "there is enough motion: a video that hardly moves is worse than one that moves well"),
        "A runner at an even pace, whose feet meet the ground.",
        "A runner who slides, melts into the wall, or stands still.",
    ),
    Part(
        "Text alignment", "Beside the prompt: which one shows more of what was asked for?",
        ("the subjects, with their attributes and in the right number",
         "what they do, in the way and direction that was asked for",
         "the surroundings", "the style", "the movement of the camera"),
        "“Two red birds fly to the left”: two birds, both red, flying, to the left.",
        "One bird, or red birds that sit.",
    ),
)  # fmt: skip


def read_guideline(path: str | Path) -> tuple[Part, ...]:
    """Read a guideline of your own: YAML with a list of parts, each with the fields of :class:`Part`."""
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
            named = ", ".join(sorted(names))
            raise VideoAlignError(f"--guideline {path}, part {number} must have {named}: texts, points a list of them")
    return tuple(Part(**{**part, "points": tuple(part["points"])}) for part in found)
