"""The folder of a run, whatever logger it has, and loggers that are prepared for it."""

import contextlib
import itertools
import re
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from fsspec.implementations.local import LocalFileSystem
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from ..models.locks import first_process

_AT_THE_BEGINNING = re.compile(r"events\.out\.tfevents\..*|hparams\.yaml|config(-\d+)?\.yaml")
"""Names of the files that a run has written before its first batch."""


def own_folder(trainer: L.Trainer) -> Path | None:
    """The folder of a run as this process knows it, or None without a logger. Only the first rank's is right.

    It is where Lightning puts the checkpoints: a logger that only names the folder of all runs, such as Weights &
    Biases and MLflow, gets one per run.
    """
    if not trainer.loggers:
        return None
    logger = trainer.loggers[0]
    if isinstance(logger, TensorBoardLogger | CSVLogger):
        return Path(logger.log_dir)
    _ = logger.experiment  # before it begins, a run of Weights & Biases has no version
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or trainer.default_root_dir) / str(logger.name) / version


def folder_of(trainer: L.Trainer) -> Path | None:
    """The folder of a run, or None without a logger. Collective: every rank must call it."""
    folder = own_folder(trainer) if trainer.is_global_zero else None
    return trainer.strategy.broadcast(folder)


def own_folders(trainer: L.Trainer) -> L.Trainer:
    """Give runs that begin at the same time folders of their own, and leave out what they need not log.

    Lightning numbers a run by the folders that it sees, and makes the run's own folder only later. TensorBoard would
    show Lightning's ``epoch`` before every loss, and ``hp_metric`` -1 where no metric was given.

    Returns:
        The trainer.
    """
    for logger in trainer.loggers:
        if not isinstance(logger, TensorBoardLogger):
            continue
        logger._default_hp_metric = False
        logger.log_metrics = partial(_sorted_last, logger.log_metrics)
        if isinstance(logger._fs, LocalFileSystem) and first_process():
            logger._get_next_version = partial(_claimed, logger, logger._get_next_version)
    return trainer


def forget(trainer: L.Trainer) -> None:
    """Remove the folder of a run that ended before it did anything: it would take a number, and a line of TensorBoard.

    A folder that holds more than a logger and the configuration write at the beginning stays.
    """
    for logger in trainer.loggers if trainer.is_global_zero else []:
        if isinstance(logger, TensorBoardLogger) and isinstance(logger._fs, LocalFileSystem):
            folder = Path(logger.log_dir)
            if folder.is_dir() and all(_AT_THE_BEGINNING.fullmatch(path.name) for path in folder.iterdir()):
                if logger._experiment is not None:  # its thread would write to a file that is gone
                    logger._experiment.close()
                    logger._experiment = None
                shutil.rmtree(folder, ignore_errors=True)


def _sorted_last(log: Callable[..., None], metrics: Mapping[str, Any], step: int | None = None) -> None:
    log({"vitals/epoch" if name == "epoch" else name: value for name, value in metrics.items()}, step)


def _claimed(logger: TensorBoardLogger, next_version: Callable[[], int]) -> int:
    """Make the run's folder under the first free number, and return that number."""
    root = Path(logger.root_dir)
    root.mkdir(parents=True, exist_ok=True)
    for version in itertools.count(next_version()):
        with contextlib.suppress(FileExistsError):
            (root / f"version_{version}").mkdir()
            return version
