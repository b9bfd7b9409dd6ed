"""The text around a video: where the video, the rubrics, the prompt and the reward tokens stand.

A template is a text with the marks ``<video>`` (once), ``<prompt>`` (once) and either ``<reward:VQ>``,
``<reward:MQ>`` and ``<reward:TA>`` (separate tokens) or ``<reward:VQ,MQ,TA>`` (one shared token, the paper's
ablation). Under causal attention a reward token sees only what stands before it: with VQ and MQ before the prompt,
these two cannot depend on it (VideoAlign, section 3.2).
"""

import re
from dataclasses import dataclass
from pathlib import Path

from .. import VideoAlignError
from .preference import DIMENSIONS

SHIPPED = Path(__file__).parent / "templates"
_MARK = re.compile(r"<(video|prompt|reward:[A-Z,]+)>")


@dataclass(frozen=True)
class Template:
    """A parsed template.

    Attributes:
        text: the text as written, kept with the exported model.
        parts: alternating text and marks, in order.
    """

    text: str
    name: str = "template"

    @classmethod
    def load(cls, name_or_file: str | Path) -> "Template":
        """A shipped template by name (``rubrics``, ``plain``, ``shared``) or any text file by path."""
        path = SHIPPED / f"{name_or_file}.txt"
        if not path.exists():
            path = Path(name_or_file)
        try:
            text = path.read_text(encoding="utf-8").rstrip("\n")
        except (OSError, UnicodeDecodeError) as error:
            names = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.txt")))
            raise VideoAlignError(
                f"template {str(name_or_file)!r} cannot be read ({error}). Name a UTF-8 text file or one of: {names}"
            ) from None
        return cls(text, str(name_or_file))

    def __post_init__(self) -> None:
        marks = _MARK.findall(self.text)
        tokens = [m for m in marks if m.startswith("reward:")]
        rewards = [dimension for token in tokens for dimension in token.removeprefix("reward:").split(",")]
        problems = [
            f"<{m}> occurs {marks.count(m)} times, not once" for m in ("video", "prompt") if marks.count(m) != 1
        ]
        if rewards != list(DIMENSIONS):
            problems.append(f"the reward marks are {rewards}, not {list(DIMENSIONS)} in this order, each once")
        elif len(tokens) not in (1, len(DIMENSIONS)):
            problems.append("the reward marks are neither all apart nor all in one token")
        elif not problems and marks.index("video") > marks.index(tokens[0]):
            problems.append("<video> stands behind a reward mark, which then cannot see it")
        elif not problems and marks.index("prompt") > marks.index(tokens[-1]):
            problems.append("<prompt> stands behind the last reward mark, which then cannot see it")
        if problems:
            raise VideoAlignError(f"template {self.name!r}: " + "; ".join(problems))

    @property
    def parts(self) -> list[str]:
        """Text and marks in order; a mark keeps its angle brackets."""
        return [piece for piece in re.split(r"(<(?:video|prompt|reward:[A-Z,]+)>)", self.text) if piece]

    @property
    def marks(self) -> list[str]:
        """The marks alone, in order."""
        return [f"<{mark}>" for mark in _MARK.findall(self.text)]

    @property
    def separate(self) -> bool:
        """Three reward tokens rather than one."""
        return "<reward:VQ>" in self.text

    @property
    def tokens(self) -> list[str]:
        """The reward tokens' names in the vocabulary, in order of appearance."""
        return [f"<|{d}_reward|>" for d in DIMENSIONS] if self.separate else ["<|reward|>"]
