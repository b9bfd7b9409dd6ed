"""What every run shows besides its metrics: vitals, hyper-parameters, a layout, and where its clips are."""

import inspect
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard.summary import hparams

from .. import VideoAlignError
from ..datamodules.data_ranks import data_ranks
from .run_folder import own_folder
from .run_media import media_of
from .samples_page import KEEP, NAME
from .vitals import Vitals, group_names

EXPERT = r"(/high|/low)?"
"""End of the names of values that belong to one of a generator's two experts."""
LAYOUT = {
    "Training": {
        "loss": (rf"train/loss{EXPERT}", rf"val/loss{EXPERT}"),
        "accuracy": (r"train/accuracy/.*",),
        "implicit reward accuracy": (rf"(train|val)/rewards/accuracies{EXPERT}",),
        "implicit rewards": (rf"train/rewards/(chosen|rejected){EXPERT}",),
        "margins": (r"train/rewards/margins.*",),
        "weights": (r"train/weights/.*",),
        "velocity errors": (r"train/velocity_error/.*",),
    },
    "Held-out": {
        "accuracy without ties": (r"val/accuracy/.*",),
        "accuracy with ties": (r"val/accuracy_with_ties/.*", r"val/tie_floor/.*"),
        "calibration error": (r"val/calibration/.*",),
        "benchmarks, without ties": (r"val/bench/.*/accuracy/.*",),
        "implicit rewards": (rf"val/rewards/(chosen|rejected|margins){EXPERT}",),
    },
    "Vitals": {
        "gradient norm": (r"vitals/grad_norm/.*",),
        "learning rate": (r"vitals/learning_rate.*",),
        "samples per second": (r"vitals/samples_per_second",),
        "share of time waiting for data": (r"vitals/data_wait_share",),
        "GPU memory, GiB": (r"vitals/gpu_memory_gib",),
    },
}
"""Charts of TensorBoard's tab Custom Scalars, by category: patterns of the tags that a chart draws."""
FINAL = re.compile(
    rf"val/(loss{EXPERT}|accuracy/.*|accuracy_with_ties/.*|rewards/(accuracies|margins){EXPERT}|bench/.*/accuracy/.*)"
)
"""Metrics that the table of hyper-parameters has a column for."""
_KEPT = (bool, int, float, str)


class Dashboard(Vitals):
    """Logs the vitals of a training, and arranges what a run shows.

    - TensorBoard's tab Custom Scalars gets charts that put together what belongs together.
    - Its tab HParams gets a row per run: the module's and the training's settings, beside its final metrics. Other
      loggers get the same settings as their hyper-parameters.
    - Its tab Text says where the page of clips, ``samples.html``, is.

    `videoalign fit` has it always, with options under ``dashboard``.

    Args:
        keep_validations: Number of validations whose clips stay in the run's folder: the first one, and the latest.
    """

    def __init__(self, keep_validations: int = KEEP) -> None:
        super().__init__()
        if keep_validations < 1:
            raise VideoAlignError(f"dashboard.keep_validations must be at least 1, got {keep_validations}")
        self.keep_validations = keep_validations
        self._arranged: set[str] = set()
        self._described = self._linked = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the hyper-parameters."""
        super().on_train_start(trainer, pl_module)
        self._arranged, self._described, self._linked = set(), False, False
        for logger in trainer.loggers:
            logger.log_hyperparams(settings(trainer, pl_module))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the vitals, and arrange the charts when the first step is logged."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if not self._arranged and trainer.logged_metrics:
            self._arrange(trainer, trainer.logged_metrics)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Describe the run by its settings and the metrics that are there now, and name the page of clips."""
        if trainer.sanity_checking or trainer.state.fn != "fit" or not trainer.is_global_zero:
            return
        self._describe(trainer, pl_module)
        if not self._linked and (page := page_of(trainer)) and (media := media_of(trainer)):
            self._linked = True
            media.text("samples", f"Clips that play in step, of each validation: open `{page.resolve()}` in a browser.")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Describe a run that had no validation, and say that it is finished."""
        if trainer.is_global_zero:
            self._describe(trainer, pl_module)
            self._summarise(trainer, pl_module, 2)

    def _arrange(self, trainer: L.Trainer, tags: Iterable[str]) -> None:
        """Write TensorBoard's layout; it reads the first one of a run alone, so the validation's tags are foreseen."""
        trained = {tag for tag in tags if tag.startswith(("train/", "vitals/"))}
        if not any(tag.startswith("train/") for tag in trained):
            return
        self._arranged = trained
        layout = {
            category: {title: ["Multiline", list(tags)] for title, tags in charts.items() if _expected(tags, trained)}
            for category, charts in LAYOUT.items()
        }
        for logger in trainer.loggers:
            if trainer.is_global_zero and isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars({name: charts for name, charts in layout.items() if charts})

    def _describe(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Write the settings and the names of the metrics for the tab HParams, once; it reads the metrics itself."""
        if not self._described:
            self._described = True
            self._summarise(trainer, module, 0, 1)

    @staticmethod
    def _summarise(trainer: L.Trainer, module: L.LightningModule, *parts: int) -> None:
        """Write parts of TensorBoard's description of a run: 0 its columns, 1 its beginning, 2 its end."""
        metrics = {name: 0.0 for name in sorted(trainer.callback_metrics) if FINAL.fullmatch(name)}
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                summaries: tuple[Summary, ...] = hparams(settings(trainer, module), metrics)
                for part in parts:
                    logger.experiment._get_file_writer().add_summary(summaries[part])


def _expected(tags: Iterable[str], trained: set[str]) -> bool:
    """Whether a run that trains with these tags will have one that a chart draws."""
    foreseen = {f"val/{tag.removeprefix('train/')}" for tag in trained if tag.startswith("train/")}
    if "train/accuracy/VQ" in trained:
        foreseen |= {f"val/{name}/VQ" for name in ("accuracy_with_ties", "calibration", "bench/any/accuracy")}
    return any(re.fullmatch(pattern, tag) for pattern in tags for tag in trained | foreseen)


def settings(trainer: L.Trainer, module: L.LightningModule) -> dict[str, bool | int | float | str]:
    """The settings of a training that one compares runs by, as plain values.

    They are the arguments of the module's class that it keeps under their names, if they are numbers or words, the
    rank of its adapters, and what a step consists of.

    Args:
        trainer: The trainer; its optimizers exist.
        module: The module that it trains.
    """
    names = {name for kind in type(module).__mro__ for name in _arguments(kind)}
    found: dict[str, Any] = {"module": type(module).__name__}
    found |= {name: getattr(module, name, None) for name in sorted(names)}
    adapters = getattr(module, "lora", None)
    found |= {"lora_rank": getattr(adapters, "rank", None), "lora_alpha": getattr(adapters, "alpha", None)}
    for optimizer in trainer.optimizers:
        found["optimizer"] = type(optimizer).__name__
        initial = {n: g.get("initial_lr", g["lr"]) for n, g in zip(group_names(optimizer), optimizer.param_groups)}
        found |= {f"lr/{name}" if len(initial) > 1 else "lr": float(rate) for name, rate in initial.items()}
        found["weight_decay"] = max(float(group.get("weight_decay", 0.0)) for group in optimizer.param_groups)
    batch = getattr(trainer.datamodule, "batch_size", None)
    if isinstance(batch, int):
        found["samples_per_step"] = batch * data_ranks(trainer)[1] * trainer.accumulate_grad_batches
    found |= {"precision": str(trainer.precision), "gradient_clip_val": trainer.gradient_clip_val}
    found |= {"seed": os.environ.get("PL_GLOBAL_SEED")}
    return {name: value for name, value in found.items() if isinstance(value, _KEPT)}


def _arguments(kind: type) -> list[str]:
    own = kind.__dict__.get("__init__")
    if own is None or issubclass(L.LightningModule, kind):
        return []
    return [name for name in inspect.signature(own).parameters if name not in ("self", "args", "kwargs")]


def page_of(trainer: L.Trainer) -> Path | None:
    """The page of clips of a run, or None where it has none. Only the first rank knows."""
    folder = own_folder(trainer)
    return folder / NAME if folder and (folder / NAME).is_file() else None
