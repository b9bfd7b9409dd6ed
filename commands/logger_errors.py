"""Errors of loggers' packages as messages: a package that is missing, or that refuses its settings."""

import contextlib
import re
from collections.abc import Iterator

from .. import VideoAlignError

EXTERNAL = ("wandb", "mlflow", "comet_ml")
"""Packages of loggers, whose own errors speak of settings and accounts."""


@contextlib.contextmanager
def explained_loggers() -> Iterator[None]:
    """Turn the errors of loggers' packages into messages of one line.

    Raises:
        VideoAlignError: Where a logger's package is missing, or raises an error of its own.
    """
    try:
        yield
    except Exception as error:
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        text = " ".join(str(root).split())
        package = type(root).__module__.partition(".")[0]
        if isinstance(root, ModuleNotFoundError) and (found := re.match(r"Requirement '(\S+)' not met", text)):
            raise VideoAlignError(
                f"trainer.logger: the logger of this configuration needs a package that is not installed; "
                f"pip install '{found[1]}'"
            ) from None
        if package in EXTERNAL:
            raise VideoAlignError(f"trainer.logger: {package} says: {text}") from None
        raise
