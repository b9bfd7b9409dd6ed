"""Training of generators with two experts, one of them a run."""

from typing import Literal

from .. import VideoAlignError
from ..models.generator import Generator

Expert = Literal["high", "low"]
"""Which of two experts trains."""


def require_one_expert(generator: Generator, expert: Expert | None) -> None:
    """Refuse to train a generator with two experts without saying which of them.

    Args:
        generator: Generator that was loaded.
        expert: The expert that was asked for.

    Raises:
        VideoAlignError: Where none was asked for.
    """
    if generator.boundary is not None and expert is None:
        raise VideoAlignError(
            f"this generator has two experts, which train in runs of their own: set model.expert to high (times above "
            f"{generator.boundary:g}) or low"
        )
