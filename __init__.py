"""videoalign: video generation with human feedback, from rated pairs to measured improvement."""

__version__ = "0.1.0"


class VideoAlignError(Exception):
    """A mistake that the user can mend: the message says what is wrong, where, why, and the remedy.

    Not a ValueError: configuration parsers catch those and bury the message.

    The command line prints the message without a traceback and exits with status 2.
    """


class EverywhereError(VideoAlignError):
    """The same mistake, raised on every process of a run: the first one speaks for all."""
