"""What the parts of a run say when it has ended: where their results are, and what can be done with them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import lightning as L


@dataclass(frozen=True)
class Report:
    """Results of a part of a run.

    Attributes:
        results: Files and folders, or a few words, by what they are.
        commands: Commands to type next, each with what it is for. They work as they are; a word in capitals stands for
            something of the user's.
    """

    results: Mapping[str, str | Path] = field(default_factory=dict)
    commands: Mapping[str, str] = field(default_factory=dict)


@runtime_checkable
class Reports(Protocol):
    """A callback with results to show when a run has ended: ExportReward, ExportGenerator, WriteParts."""

    def run_report(self, trainer: L.Trainer) -> Report:
        """What there is to show; called on the first rank, when the run has ended.

        Args:
            trainer: The trainer that ran.
        """


@runtime_checkable
class UsesOfExport(Protocol):
    """A module that knows what can be done with its export: RewardModel, NoisyRewardModel, FlowSFT."""

    def uses_of(self, export: Path) -> dict[str, str]:
        """Commands that use the export, each with what it is for.

        Args:
            export: Folder of the export.
        """


@runtime_checkable
class HasVideoSize(Protocol):
    """A DataModule that knows the size of the videos that were encoded: LatentPairs."""

    def video_size(self) -> dict[str, int]:
        """Options of `videoalign generate`: num_frames, height, width, and fps where it is known."""


def exported(folder: Path | None, trainer: L.Trainer) -> Report:
    """The report of an export.

    Args:
        folder: Folder that was written; None where nothing was.
        trainer: The trainer that ran.
    """
    if folder is None:
        return Report()
    module = trainer.lightning_module
    return Report({"export": folder}, module.uses_of(folder) if isinstance(module, UsesOfExport) else {})


def shown(path: str | Path) -> str:
    """A path as it is shortest: relative to the current folder where it lies in it."""
    path, here = Path(path), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
