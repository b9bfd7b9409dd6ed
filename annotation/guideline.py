"""What annotators are told (after VideoAlign, appendix G, in our own words), one key away on the page."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One dimension: the question, what counts, and what a good and a bad example look like."""

    key: str
    title: str
    question: str
    points: tuple[str, ...]
    good: str
    bad: str


GUIDELINE = (
    Part(
        "VQ", "Visual quality", "Frame by frame, motion aside: which one looks better?",
        ("things are formed as they should be, nothing broken or implausible", "sharp; no noise, haze, blocks or other artefacts",
         "rich detail, material and light", "pleasing composition and colour", "nothing that should not be shown (then press the flag)"),
        "A cat whose fur, eyes and shadow hold up in every still picture.", "A cat with five legs, or a face that dissolves in blur.",
    ),
    Part(
        "MQ", "Motion quality", "Between the frames: which one moves better?",
        ("stable, without flicker, jumps or sudden changes of shape", "obeys physics: speed, weight, contact",
         "moving parts blend cleanly with what surrounds them", "moving things stay clear", "graceful and continuous",
         "enough of it: what hardly moves is worse than what moves well"),
        "A runner whose feet meet the ground, at an even pace.", "A runner who slides, melts into the wall, or stands still.",
    ),
    Part(
        "TA", "Text alignment", "Beside the request: which one shows more of what was asked for?",
        ("the subjects, with their attributes and in the right number", "what they do, in the way and direction asked for",
         "the surroundings", "the style", "the camera movement"),
        "“Two red birds fly to the left”: two, red, birds, flying, to the left.", "One bird, or red ones that sit.",
    ),
)  # fmt: skip
