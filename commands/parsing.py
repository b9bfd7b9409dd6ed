"""What the commands' files share to register themselves: types of arguments, one way to add a command, progress."""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from .. import stopping


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
        group: Result of ``add_subparsers``.
        name: Word that calls the command.
        run: Function that takes the options and returns an exit status or None.
        help: What the command does, as a phrase that begins with a verb.
    """
    text, style = f"{help[0].upper()}{help[1:]}.", argparse.ArgumentDefaultsHelpFormatter
    parser = group.add_parser(name, help=help, description=text, formatter_class=style)
    parser.set_defaults(command=run)
    return parser


def add_workers(parser: argparse.ArgumentParser, least: int) -> None:
    """Add ``--workers``.

    Args:
        parser: Parser of the command.
        least: Smallest number; 0 where the process that computes can decode too.
    """
    most = min(os.cpu_count() or 1, 8)
    parser.add_argument("--workers", type=count(least), default=most, help="processes that decode or render")


class Progress:
    """Rate and time left of long work, on a terminal's last line or now and then in a log."""

    def __init__(self) -> None:
        self.what, self.started, self.shown = "", 0.0, 0.0

    def __call__(self, what: str, done: int, of: int) -> None:
        """Say how far the work is.

        Args:
            what: Name of the things that are done.
            done: Number of them that are done.
            of: Number of all of them.
        """
        stopping.check()
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if what != self.what:
            self.what, self.started, self.shown = what, now, now
        if done == of or now - self.shown > (0.2 if terminal else 20):
            self.shown = now
            rate = done / max(now - self.started, 1e-9)
            text = f"{what}: {done}/{of}, {rate:.0f}/s, {(of - done) / rate:.0f} s left"
            end = "\n" if done == of or not terminal else ""
            print(f"\r{text}\033[K" if terminal else text, end=end, file=sys.stderr, flush=True)
