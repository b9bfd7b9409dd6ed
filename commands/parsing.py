"""What the commands' files share to register themselves: types of arguments, and one way to add a command."""

import argparse
import math
from collections.abc import Callable
from typing import Any


def count(least: int, most: float = math.inf) -> Callable[[str], int]:
    """The type of an argument that is a whole number.

    Args:
        least: Smallest number that is accepted.
        most: Largest number that is accepted.
    """

    def parse(text: str) -> int:
        if not text.lstrip("-").isdigit() or not least <= int(text) <= most:
            upto = "on" if most == math.inf else f"to {most}"
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} {upto}, got {text!r}")
        return int(text)

    return parse


def command(
    group: Any, name: str, run: Callable[[argparse.Namespace], int | None] | None, help: str
) -> argparse.ArgumentParser:
    """Add a command.

    Args:
        group: What ``add_subparsers`` returned.
        name: The word that calls the command.
        run: The command: takes the options, returns an exit status or None. None for a group of commands.
        help: What the command does, as a phrase that begins with a verb.
    """
    parser = group.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(command=run)
    return parser
