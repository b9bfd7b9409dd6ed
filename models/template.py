"""The text around a video: the order of the video, the rubrics, the prompt and the reward tokens.

A template is a text with the marks ``<video>`` (once), ``<prompt>`` (once) and either ``<reward:VQ>``,
``<reward:MQ>`` and ``<reward:TA>`` (separate tokens) or ``<reward:VQ,MQ,TA>`` (one shared token, the paper's
ablation). Under causal attention a reward token sees only the tokens before it: with VQ and MQ before the prompt,
these two cannot depend on it (VideoAlign, section 3.2). The mark ``<image>`` (at most once) shows the picture that an
image-to-video sample begins with; it is part of what was asked for, so the rewards that cannot see the prompt must not
see it either.

The notation of the official repository is read as well: its text comes after the video, with ``{text_prompt}`` for the
prompt and ``<|VQ_reward|>``, ``<|MQ_reward|>``, ``<|TA_reward|>`` for the tokens.
"""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

from .. import VideoAlignError
from .dimensions import DIMENSIONS

SHIPPED = Path(__file__).parent / "templates"
"""Folder of the templates that come with this package."""
_MARK = re.compile(r"<(video|prompt|image|reward:[A-Z,]+)>")
_IMAGE = "_image"
"""End of the names of shipped templates that show the image too."""
_OFFICIAL_PROMPT = "{text_prompt}"
_PROMPT_AND_IMAGE = "<prompt>\nIt was to begin with this picture: <image>"
LONGEST = 30_000
"""Largest number of characters of a template: the time of a step grows with the square. The official one has 6,000."""
OFFICIAL_CONSTANT = "DETAILED_PROMPT_WITH_SPECIAL_TOKEN"
"""Name of the official repository's constant that holds the text of the released model."""


def _ours(official: str) -> str:
    """Convert the official notation to this package's marks. Newlines stay, so that rewards equal the official ones."""
    for dimension in DIMENSIONS:
        official = official.replace(f"<|{dimension}_reward|>", f"<reward:{dimension}>")
    return "<video>" + official.replace(_OFFICIAL_PROMPT, "<prompt>")


@dataclass(frozen=True)
class Template:
    """A checked template.

    Args:
        text: Text with marks, which exported models keep.
        name: Name of the template or path of its file, for messages.

    Raises:
        VideoAlignError: Where the text is too long, a mark is missing or occurs twice, or the order of marks does not
            work.
    """

    text: str
    name: str = "template"

    @classmethod
    def load(cls, name_or_file: str | Path) -> "Template":
        """Load a shipped template or a text file in either notation.

        Args:
            name_or_file: ``rubrics``, ``shared``, ``plain`` or ``plain_shared``, also with ``_image`` behind them; or
                the path of a UTF-8 text file.

        Raises:
            VideoAlignError: Where there is no such template or file, or its text is refused.
        """
        name = str(name_or_file)
        if name.endswith(_IMAGE) and (SHIPPED / f"{name.removesuffix(_IMAGE)}.txt").exists():
            shown = cls.load(name.removesuffix(_IMAGE)).text.replace("<prompt>", _PROMPT_AND_IMAGE)
            return cls(shown, name)
        path = SHIPPED / f"{name_or_file}.txt"
        if not path.exists():
            path = Path(name_or_file)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            names = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.txt")))
            raise VideoAlignError(
                f"template {str(name_or_file)!r} cannot be read ({error}). Name a UTF-8 text file or one of: {names}"
            ) from None
        if _OFFICIAL_PROMPT in text:
            return cls(_ours(text), str(name_or_file))
        return cls(text.rstrip("\n"), str(name_or_file))

    @classmethod
    def from_repository(cls, folder: str | Path) -> "Template":
        """Load the official text from ``prompt_template.py`` in a clone of the official repository.

        The file is parsed for the constant, never executed.

        Args:
            folder: Folder of the clone.

        Raises:
            VideoAlignError: Where the file or the constant is missing.
        """
        path = Path(folder) / "prompt_template.py"
        try:
            tree = ast.parse(path.read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError, SyntaxError, ValueError, RecursionError) as error:
            raise VideoAlignError(
                f"--official-repo {folder}: {path.name} cannot be read in it ({error}). Name a clone of the VideoAlign "
                "repository."
            ) from None
        for node in tree.body:
            names = [target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
            value = getattr(node, "value", None)
            if OFFICIAL_CONSTANT in names and isinstance(value, ast.Constant) and isinstance(value.value, str):
                return cls(_ours(value.value), str(path))
        raise VideoAlignError(f"--official-repo {folder}: {path.name} assigns no text to {OFFICIAL_CONSTANT}")

    def __post_init__(self) -> None:
        if len(self.text) > LONGEST:
            raise VideoAlignError(
                f"template {self.name!r} has {len(self.text)} characters, more than {LONGEST}: every pair would be "
                "computed with all of them. Name a text of rubrics"
            )
        marks = _MARK.findall(self.text)
        tokens = [m for m in marks if m.startswith("reward:")]
        rewards = [dimension for token in tokens for dimension in token.removeprefix("reward:").split(",")]
        counts = {mark: marks.count(mark) for mark in ("video", "prompt")}
        problems = [f"<{mark}> occurs {count} times, not once" for mark, count in counts.items() if count != 1]
        problems += ["<image> occurs more than once"] if marks.count("image") > 1 else []
        if rewards != list(DIMENSIONS):
            problems.append(f"the reward marks are {rewards}, not {list(DIMENSIONS)} in this order, each once")
        elif len(tokens) not in (1, len(DIMENSIONS)):
            problems.append("the reward marks are neither all apart nor all in one token")
        elif not problems and marks.index("video") > marks.index(tokens[0]):
            problems.append("<video> stands behind a reward mark, which then cannot see it")
        elif not problems and marks.index("prompt") > marks.index(tokens[-1]):
            problems.append("<prompt> stands behind the last reward mark, which then cannot see it")
        elif not problems and self.image:
            before = [[m for m in marks[: marks.index(mark)] if m in tokens] for mark in ("image", "prompt")]
            if before[0] != before[1]:
                problems.append("<image> must stand behind the same reward marks as <prompt>, whose part it is")
        if problems:
            raise VideoAlignError(f"template {self.name!r}: " + "; ".join(problems))

    @property
    def parts(self) -> list[str]:
        """Texts and marks in order; marks keep their angle brackets."""
        return [piece for piece in re.split(r"(<(?:video|prompt|image|reward:[A-Z,]+)>)", self.text) if piece]

    @property
    def marks(self) -> list[str]:
        """Marks in order, with their angle brackets."""
        return [f"<{mark}>" for mark in _MARK.findall(self.text)]

    @property
    def image(self) -> bool:
        """Whether the template shows the image that a video begins with."""
        return "<image>" in self.text

    @property
    def separate(self) -> bool:
        """Whether the template has three reward tokens rather than one."""
        return "<reward:VQ>" in self.text

    @property
    def tokens(self) -> list[str]:
        """Names of the reward tokens in the vocabulary, in order of appearance."""
        return [f"<|{d}_reward|>" for d in DIMENSIONS] if self.separate else ["<|reward|>"]
