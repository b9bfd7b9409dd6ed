"""Which file ``--ckpt_path last`` means: the newest checkpoint of the runs of an experiment.

Every run writes into a folder of its own, and Lightning looks for ``last`` in that of the run that begins, where
nothing is yet. A job that a scheduler starts again goes on from what its earlier runs have written. Where the logger's
version is given, only the runs under that name count.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import lightning as L
from lightning.pytorch.plugins.environments import SLURMEnvironment

from .. import VideoAlignError
from ..callbacks.reports import shown

NAMES = ("last", "best", "hpc", "registry")
"""Words that stand for a checkpoint; ``registry:...`` too."""


def check_exists(path: str | None) -> None:
    """Refuse a checkpoint that is not there, before a model is loaded.

    Args:
        path: Value of ``--ckpt_path``.
    """
    if not path or path.partition(":")[0] in NAMES or "://" in path or Path(path).exists():
        return
    folder = Path(path).parent
    there = sorted(file.name for file in folder.glob("*.ckpt"))
    raise VideoAlignError(
        f"checkpoint {path}: there is no such file; "
        + (
            f"{folder} holds {', '.join(there[:8])}"
            if there
            else "--ckpt_path last finds the newest of this experiment"
        )
    )


def resolved(path: str | None, trainer: L.Trainer, command: str) -> str | None:
    """The file that a value of ``--ckpt_path`` stands for.

    Args:
        path: Value of ``--ckpt_path``.
        trainer: The trainer that will use it.
        command: ``fit``, ``validate``, ``test`` or ``predict``.

    Returns:
        The path; None where a training begins anew, because there is no checkpoint yet.

    Raises:
        VideoAlignError: Where there is nothing to measure, or what was best is not known.
    """
    if path == "best":
        raise VideoAlignError(
            "--ckpt_path best is known only while a run lasts; name the file, which the end of the run shows, or last"
        )
    if path != "last":
        return path
    found = list(_written(trainer))
    if found:
        # a folder or file that was written at the same time under two names is the same state
        return str(max(found, key=lambda file: (file.stat().st_mtime_ns, file.name.startswith("last"))))
    where = " or ".join(dict.fromkeys(shown(folder) for folder, _ in _places(trainer)))
    if command != "fit":
        raise VideoAlignError(f"--ckpt_path last: there is no checkpoint in {where} yet")
    if trainer.is_global_zero:
        print(f"no checkpoint in {where} yet: the run starts from its beginning", file=sys.stderr, flush=True)
    return None


def _written(trainer: L.Trainer) -> Iterator[Path]:
    for folder, pattern in _places(trainer):
        yield from (file for file in folder.glob(pattern) if not file.name.startswith("."))


def _places(trainer: L.Trainer) -> Iterator[tuple[Path, str]]:
    """Folders of the experiment, and what its checkpoints are called below them."""
    folders = [callback.dirpath for callback in trainer.checkpoint_callbacks if getattr(callback, "dirpath", None)]
    yield from ((Path(folder), "*.ckpt") for folder in folders)
    root = Path(trainer.default_root_dir)
    if not trainer.loggers:
        yield root / "checkpoints", "*.ckpt"
    elif not folders or any(not getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks):
        logger = trainer.loggers[0]
        version = getattr(logger, "_version", None)  # given by the user: the property would number the run now
        run = "*" if version is None else version if isinstance(version, str) else f"version_{version}"
        yield Path(logger.save_dir or root) / str(logger.name), f"{run}/checkpoints/*.ckpt"
    if SLURMEnvironment.detect():
        yield root, "hpc_ckpt_*.ckpt"
