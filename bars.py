"""Progress bars of long work: tqdm's, and a line now and then where standard error is a log."""

import re
import sys
from typing import Any

from tqdm import tqdm

from . import stopping

LINE = "{desc}: {n_fmt}/{total_fmt}, {rate_noinv_fmt}, {remaining} left{postfix}"
"""What a log's line says."""
SAID = re.compile(r"^(\S.*?): +(\d+)/(\d+), .*?, ((?:\d+:)?\d+:\d+) left", re.MULTILINE)
"""Finds such lines again: what is counted, how many are done, of how many, and the time that is left."""


class Bar(tqdm):
    """A bar on a terminal; in a log whole lines, none of which overwrites another.

    Args:
        what: What is counted, such as ``videos``.
        total: How many there are.
        first: How many of them are done already, and do not count in the rate.
        seconds: Time between two lines of a log.
    """

    monitor_interval = 0  # no thread of its own: processes are forked while bars are shown

    def __init__(self, what: str, total: int, first: int = 0, seconds: float = 20.0) -> None:
        terminal = sys.stderr.isatty()
        form: dict[str, Any] = (
            {"dynamic_ncols": True} if terminal else {"bar_format": LINE, "leave": False, "smoothing": 0}
        )
        pause = 0.2 if terminal else seconds
        super().__init__(desc=what, total=total, initial=first, miniters=1, mininterval=pause, file=sys.stderr, **form)

    @staticmethod
    def status_printer(file: Any) -> Any:
        """What writes a line; tqdm's own returns to the beginning of the same line each time."""
        if file.isatty():
            return tqdm.status_printer(file)
        return lambda text: print(text, file=file, flush=True)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Show the bar; a log need not say that nothing is done yet, and has no line to clear."""
        if not self.fp.isatty() and (msg == "" or self.n == self.initial):
            return False
        return super().display(msg, pos)

    def close(self) -> None:
        """Show the last count."""
        if not self.disable and not self.fp.isatty() and self.n > self.last_print_n:
            self.display()
        super().close()


class Progress:
    """Bars for a function that reports how far it is: one for each kind of work.

    Every report is also a moment at which long work notices that it should stop.
    """

    def __init__(self) -> None:
        self.bar: Bar | None = None

    def __call__(self, what: str, done: int, of: int) -> None:
        """Show that ``done`` of ``of`` things called ``what`` are done."""
        stopping.check()
        if self.bar is not None and (self.bar.desc, self.bar.total) != (what, of):
            self.bar.close()  # it may have ended early; two open bars would share the terminal's lines
            self.bar = None
        self.bar = self.bar or Bar(what, of)
        self.bar.update(done - self.bar.n)
        if done == of:
            self.bar.close()
            self.bar = None
