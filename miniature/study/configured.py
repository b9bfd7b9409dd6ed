"""Settings of experiments, read by the Lightning CLI's parser before any work begins.

A unit that trains may run an hour after the first one. A setting whose key an experiment does not take is refused when
the units are built, not then. So is an experiment that would still read the folders that its file names.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ... import VideoAlignError
from ...commands.lightning_cli import ExperimentCLI, run

Settings = Mapping[str, Any]
"""Dotted keys of an experiment's configuration, such as ``model.init_args.loss``, and their values."""


def arguments(experiments: Sequence[str], settings: Settings) -> list[str]:
    """Arguments of `videoalign fit`.

    Args:
        experiments: Names of files in experiments/sprites, without their ending; later ones override earlier ones.
        settings: Settings that override the files.
    """
    configs = [part for name in experiments for part in ("--config", f"experiments/sprites/{name}.yaml")]
    return ["fit", *configs, *(f"--{key}={value}" for key, value in settings.items())]


class _Parsing(ExperimentCLI):
    """Reads a configuration, and makes nothing of it."""

    def _set_seed(self) -> None:
        """Parsing leaves the random numbers of this process as they are."""

    def instantiate_classes(self) -> None:
        """Nothing is made, so that no path needs to exist."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing is run."""


_OWN = re.compile(r"(^|')runs/")
"""Where a value of a file in experiments/sprites is a place of the runs that its own comments describe."""
_sound: set[tuple[tuple[str, ...], frozenset[str]]] = set()


def check(name: str, experiments: Sequence[str], settings: Settings) -> None:
    """Refuse settings that an experiment does not take, and those that leave it a file or folder of its own.

    Keys are the same over seeds and sizes, so that each combination is parsed once (about a quarter of a second).

    Args:
        name: Name of the unit, for the message.
        experiments: Names of files in experiments/sprites, as :func:`arguments` takes them.
        settings: Settings that override the files.

    Raises:
        VideoAlignError: Where a setting does not fit; it names the unit and the experiments, and says what is wrong.
    """
    kind = (*experiments,), frozenset(settings)
    if kind in _sound:
        return
    where = f"{name} (experiments/sprites, {' + '.join(experiments)})"
    try:
        config = run(arguments(experiments, settings), _Parsing).config["fit"]
    except VideoAlignError as error:
        raise VideoAlignError(f"{where}: {error}") from error
    if unknown := [key for key in settings if key not in config]:  # the parser passes over them if their value is {}
        raise VideoAlignError(f"{where}: there is no setting {unknown[0]}; correct its name")
    if kept := [key for key, value in config.items() if key not in settings and _OWN.search(str(value))]:
        raise VideoAlignError(f"{where}: {kept[0]} is still the experiment's own, {config[kept[0]]}; set it")
    _sound.add(kind)
