"""Faults of a family's class, told when it is first used: what it does not define, or names wrongly."""

import inspect

from .. import VideoAlignError
from .family import Family
from .generator import PARTS, Generator

NEEDED = ("class_name", "blocks", "max_tokens", "side", "ratios", "moments", "velocity")
"""What every family defines; beside these ``text_width`` or ``prompt_shapes``."""


def check_family(kind: type[Generator]) -> None:
    """Refuse a family that lacks what it must define, or names parts that its pipeline does not have.

    Args:
        kind: Class of the family.

    Raises:
        VideoAlignError: With all that is lacking.
    """
    lacking = [name for name in NEEDED if getattr(kind, name, None) in (None, getattr(Family, name, None))]
    if kind.text_width is Family.text_width and kind.prompt_shapes is Family.prompt_shapes:
        lacking.append("text_width (or prompt_shapes())")
    if lacking:
        raise VideoAlignError(f"family {kind.__qualname__} does not define {', '.join(lacking)} (docs/howto/extend.md)")
    parts = inspect.signature(kind.pipeline_class().__init__).parameters
    named = [name for further in kind.further_parts.values() for name in further] + [*kind.left_out]
    if wrong := [*(name for name in named if name not in parts), *(kind.further_parts.keys() - set(PARTS))]:
        has = ", ".join(name for name in parts if name != "self")
        raise VideoAlignError(
            f"family {kind.__qualname__}: further_parts or left_out name {', '.join(wrong)}, but a {kind.class_name} "
            f"has {has}; and parts come with {', '.join(PARTS)}"
        )


def check_blocks(generator: Generator) -> None:
    """Refuse a family whose transformer has no blocks of the name that it gives.

    Args:
        generator: Generator that was built.

    Raises:
        VideoAlignError: Where there are none; names the lists of blocks that there are.
    """
    net, kind = generator.structure["transformer"], type(generator)
    if not hasattr(net, kind.blocks):
        lists = [name for name, module in net.named_children() if type(module).__name__ == "ModuleList"]
        raise VideoAlignError(
            f"family {kind.__qualname__}: a {type(net).__name__} has no blocks {kind.blocks!r}; its lists are {lists}"
        )
