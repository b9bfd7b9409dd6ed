"""videoalign: video generation with human feedback, from rated pairs to measured improvement."""

__version__ = "0.1.0"


class VideoAlignError(Exception):
    """A mistake that the user can correct: the message says what is wrong, where, why, and the remedy.

    It is no ValueError, because configuration parsers catch those and hide the message. The command line prints the
    message without a traceback and exits with status 2.
    """


class EverywhereError(VideoAlignError):
    """A mistake of the user that every process of a run raises, so that the first process reports it for all."""
