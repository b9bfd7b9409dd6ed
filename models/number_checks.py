"""Numbers that users give: refused where they are not finite, or out of range, with the name of the key."""

import math

from .. import VideoAlignError


def at_least(least: float, where: str = "", **values: float | None) -> None:
    """Refuse numbers that are not finite, or below a bound; None stands for a default, and passes.

    Args:
        least: The least number that is allowed.
        where: What stands before the names in messages, such as ``sampling.``.
        **values: Numbers by name.

    Raises:
        VideoAlignError: Where a number is refused; names it.
    """
    for name, value in values.items():
        if value is not None and not (value >= least and math.isfinite(value)):
            finite = "" if math.isfinite(value) else " and finite"
            raise VideoAlignError(f"{where}{name} must be at least {least}{finite}, got {value}")


def share_of_one(where: str = "", **values: float) -> None:
    """Refuse numbers that are no share in [0, 1).

    Args:
        where: What stands before the names in messages, such as ``data.``.
        **values: Numbers by name.

    Raises:
        VideoAlignError: Where a number is refused; names it.
    """
    for name, value in values.items():
        if not 0 <= value < 1:
            raise VideoAlignError(f"{where}{name} is a share in [0, 1), got {value}")


def positive(where: str = "", **values: float | None) -> None:
    """Refuse numbers that are not finite, or not above 0; None stands for a default, and passes.

    Args:
        where: What stands before the names in messages, such as ``sampling.``.
        **values: Numbers by name.

    Raises:
        VideoAlignError: Where a number is refused; names it.
    """
    for name, value in values.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            finite = "" if math.isfinite(value) else " and finite"
            raise VideoAlignError(f"{where}{name} must be above 0{finite}, got {value}")
