"""Lines of libraries that ask nothing of the user, left out."""

import logging
import re
import warnings

import diffusers
import transformers

_WARNINGS = (
    "LightningCLI's args parameter",
    ".*treespec, LeafSpec",  # Lightning's own use of a deprecated call
    r"Found \d+ module\(s\) in eval mode",  # what is frozen stays so
    "The dirpath has changed from",  # every run has a folder of its own
    r"It is recommended to use `self.log\(.*sync_dist=True",  # what is logged is the mean of all ranks already
    "Total length of `.*` across ranks is zero",  # the DataModule says which set is missing
    "The `local_dir_use_symlinks` argument",  # diffusers' own use of a deprecated argument
)
_SAID = re.compile(
    r"Tip:|CUDA_VISIBLE_DEVICES|with model summary callbacks|^`Trainer\.\w+` stopped: `max_|^Using .* (precision|AMP)|"
    r"^(\[rank: \d+\] )?(Restoring states from|Loaded model weights|Seed set to|[GTH]PU available|`weights_only` was)"
)
"""Lines that the summary of the model, the end of a run or the configuration says better."""


def quiet() -> None:
    """Leave out bars, tips and warnings that ask nothing of the user."""
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in ("pytorch.utilities.rank_zero", "fabric.utilities.rank_zero", "fabric.utilities.seed"):
        logging.getLogger(f"lightning.{name}").addFilter(_asks_something)


def _asks_something(record: logging.LogRecord) -> bool:
    return not _SAID.search(record.getMessage())
