"""Adapters as a user names them: ``PATH``, or ``PATH,scale=0.8,expert=high``; one, or several of them."""

import math
import re
from dataclasses import dataclass

from .. import VideoAlignError
from .hub import commit_of

FORM = "PATH[,scale=S][,expert=high|low]"
"""How adapters are named, for help texts and messages."""
_SPEC = re.compile(r"(?P<path>.*?)(?P<options>(?:,(?:scale|expert)=[^,]*)*)", re.DOTALL)
Loras = str | list[str] | None
"""Adapters as a user names them: none, one, or several."""


@dataclass(frozen=True)
class LoraSpec:
    """Adapters that are applied to a generator.

    Attributes:
        path: Folder, file or hub id.
        scale: Factor of their update.
        expert: Expert that they belong to, of a generator with two; what their file states if None.
    """

    path: str
    scale: float = 1.0
    expert: str | None = None


def parse(text: str) -> LoraSpec:
    """Read adapters as they are named on the command line. Only commas before ``scale=`` and ``expert=`` are ours.

    Args:
        text: The words, in the form of :data:`FORM`.

    Raises:
        VideoAlignError: Where an option is given twice, is empty, or a scale is no finite number.
    """
    found = _SPEC.fullmatch(text)
    pairs = [option.split("=", 1) for option in found["options"].split(",")[1:]]
    options = dict(pairs)
    wrong = f"adapters {text!r} are not like {FORM}"
    if len(options) < len(pairs):
        raise VideoAlignError(f"{wrong}: an option is given twice")
    if not found["path"]:
        raise VideoAlignError(f"{wrong}: the path is empty")
    if "expert" in options and options["expert"] not in ("high", "low"):
        raise VideoAlignError(f"{wrong}: expert={options['expert']} is unknown; experts are high and low")
    try:
        scale = float(options.get("scale", 1.0))
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise VideoAlignError(f"{wrong}: scale={options['scale']} is no finite number")
    return LoraSpec(found["path"], scale, options.get("expert"))


def specs_of(loras: Loras) -> list[LoraSpec]:
    """Read what a user gives as adapters, in the order given.

    Args:
        loras: None, one adapter's words, or those of several.
    """
    return [parse(text) for text in ([loras] if isinstance(loras, str) else loras or [])]


def adapter_commits(loras: Loras) -> dict[str, str]:
    """Commits of adapters that are on the hub, as entries ``lora_revision``, ``lora_revision_2`` and so on of a record.

    Args:
        loras: None, one adapter's words, or those of several.
    """
    commits = {number: commit_of(spec.path) for number, spec in enumerate(specs_of(loras), 1)}
    return {f"lora_revision_{n}" if n > 1 else "lora_revision": commit for n, commit in commits.items() if commit}
