"""The end of `fit`, `validate`, `test` and `predict`: what was measured, where everything is, and what to type next."""

import math
import re
import shlex
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.model_helpers import is_overridden

from ..callbacks import samples_page
from ..callbacks.dashboard import EXPERT
from ..callbacks.plots import text_table
from ..callbacks.reports import Report, Reports, shown
from ..callbacks.run_folder import folder_of, forget
from .config_files import configs_in

DONE = {"fit": "trained", "validate": "validated", "test": "tested", "predict": "predicted with"}
STOPPED = {"fit": "training", "validate": "validation", "test": "test", "predict": "prediction"}
"""Beginnings of the block of a run that ended, and of one that was stopped."""
STAGES = ("val/", "test/")
"""Beginnings of the names of what is measured on held-out data."""
ROWS = 14
"""Largest number of rows of a table."""
VIEWERS: Mapping[str, Callable[[Any], str]] = {
    "TensorBoardLogger": lambda logger: f"tensorboard --logdir {_quoted(logger.root_dir)}",
    "MLFlowLogger": lambda logger: f"mlflow ui --backend-store-uri {shlex.quote(str(logger._tracking_uri))}",
    "WandbLogger": lambda logger: (
        f"wandb sync {_quoted(logger.save_dir)}/wandb/offline-run-*-{logger.version}" if logger._offline else ""
    ),
}
"""Commands that show what a logger wrote, by the logger's class."""


class RunEnd(L.Callback):
    """Remembers when a run began and what its validations measured, and prints the block at its end."""

    def __init__(self) -> None:
        self.began: float | None = None
        self.first_step = 0
        self.folder: Path | None = None
        self.measured: list[tuple[int, dict[str, float]]] = []
        self.ran = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """The time counts from here on. Collective: every rank must call it."""
        self.began, self.folder = time.perf_counter(), folder_of(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A resumed training begins at a later step."""
        self.first_step = trainer.global_step

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember what was measured."""
        if not trainer.sanity_checking:
            self.measured.append((trainer.global_step, _held_out(trainer)))

    on_test_end = on_validation_end

    def on_train_batch_start(self, *given: Any) -> None:
        """From the first batch on a run leaves something worth keeping."""
        self.ran = True

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = on_train_batch_start

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """A run that was refused, for its data for instance, leaves no folder."""
        if not self.ran:
            forget(trainer)

    def block(self, trainer: L.Trainer, done: bool) -> str:
        """The text to print.

        Args:
            trainer: The trainer that ran.
            done: Whether it ran to its end; a run that was stopped names no next commands, because the message that
                says why it was stopped does.
        """
        fit = trainer.state.fn == "fit"
        reports = [part.run_report(trainer) for part in trainer.callbacks if isinstance(part, Reports)]
        results = [*(_checkpoints(trainer) if fit else ()), *self._results(reports)]
        width = max((len(name) for name, _ in results), default=0) + 2
        lines = ["", self._head(trainer, done), *self._tables(), ""]
        lines += [f"{name:{width}}{text}" for name, text in results]
        if done and (commands := self._commands(trainer, reports)):
            wide = max(map(len, commands.values())) + 2
            lines += ["", *(f"{what:{wide}}{command}" for command, what in commands.items())]
        return "\n".join(lines).rstrip()

    def _head(self, trainer: L.Trainer, done: bool) -> str:
        name = type(trainer.lightning_module).__name__
        text = f"{DONE[trainer.state.fn]} {name}" if done else f"unfinished {STOPPED[trainer.state.fn]} of {name}"
        if trainer.state.fn == "fit":
            steps = trainer.global_step
            before = f", {self.first_step} of them before" if self.first_step else ""
            text += f": {steps} step{'s' * (steps != 1)}{before}{_passes(trainer)}"
        elif trainer.ckpt_path:
            text += f" at {shown(trainer.ckpt_path)}"
        text += f" in {spent(time.perf_counter() - self.began)}"
        loss = _loss(trainer.callback_metrics, "train")
        text += f"; last train/loss {float(loss):.3f}" if loss is not None and trainer.state.fn == "fit" else ""
        why = [m for part in trainer.callbacks if (m := getattr(part, "stopping_reason_message", None))]
        return "\n".join([text, *(f"ended early: {message}" for message in why)])

    def _tables(self) -> list[str]:
        if not self.measured:
            return []
        step, values = self.measured[-1]
        lines = [f"measured at step {step}{self._lowest()}"] if step else []
        return [*lines, "", tables(values)] if values else []

    def _lowest(self) -> str:
        losses = [(_loss(values, "val"), step) for step, values in self.measured]
        losses = [(loss, step) for loss, step in losses if loss is not None and not math.isnan(loss)]
        if len(losses) < 2:
            return ""
        loss, step = min(losses)
        return f"; the lowest val/loss was {loss:.3f} at step {step}"

    def _results(self, reports: list[Report]) -> list[tuple[str, str]]:
        every = [found for report in reports for found in report.results.items()]
        found = [(name, shown(what) if isinstance(what, Path) else what) for name, what in every]
        if self.folder:
            page = self.folder / samples_page.NAME
            found += [("clips", f"{shown(page)}   (open it in a browser)")] if page.exists() else []
            found.append(("logs", shown(self.folder)))
        return found

    def _commands(self, trainer: L.Trainer, reports: list[Report]) -> dict[str, str]:
        commands = {}
        for logger in trainer.loggers:
            if viewer := VIEWERS.get(type(logger).__name__):
                commands[viewer(logger)] = "look at curves"
        configs = configs_in(self.folder) if self.folder else []
        checkpoint = best_checkpoint(trainer)
        if trainer.state.fn == "fit" and checkpoint and self.measured and configs:
            options = f"--config {_quoted(configs[-1])} --ckpt_path {_quoted(checkpoint)}"
            kind = "test" if is_overridden("test_step", trainer.lightning_module) else "validate"
            commands[f"videoalign {kind} {options}"] = "measure again"
        for report in reports:
            commands |= report.commands
        commands.pop("", None)
        return commands


def best_checkpoint(trainer: L.Trainer) -> str:
    """The best checkpoint where one is chosen by a metric, else the last one; empty without any."""
    for callback in trainer.checkpoint_callbacks:
        for path in (callback.best_model_path if callback.monitor else "", callback.last_model_path):
            if path and Path(path).exists():
                return path
    return next(
        (c.best_model_path for c in trainer.checkpoint_callbacks if Path(c.best_model_path or "-").exists()), ""
    )


def _checkpoints(trainer: L.Trainer) -> list[tuple[str, str]]:
    found = []
    for callback in trainer.checkpoint_callbacks:
        score = callback.best_model_score
        by = f"   ({callback.monitor} {float(score):.4g})" if callback.monitor and score is not None else ""
        paths = {"best": callback.best_model_path if callback.monitor else "", "last": callback.last_model_path}
        paths["last"] = paths["last"] or ("" if callback.monitor else callback.best_model_path)
        found += [(f"{n} checkpoint", f"{shown(p)}{by if n == 'best' else ''}") for n, p in paths.items() if p]
    return list(dict.fromkeys(found)) or [("checkpoints", "none were written")]


def _held_out(trainer: L.Trainer) -> dict[str, float]:
    return {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith(STAGES)}


def tables(values: Mapping[str, float]) -> str:
    """Metrics as tables. Names of more than two parts, such as ``val/accuracy/VQ``, are cells; others have a line.

    Args:
        values: Metrics by name.
    """
    single = {name: value for name, value in values.items() if name.count("/") < 2}
    cells: dict[str, dict[str, float]] = {}
    for name, value in values.items():
        if name not in single:
            row, _, column = name.rpartition("/")
            cells.setdefault(row, {})[column] = value
    kinds: dict[tuple[str, ...], list[str]] = {}
    for row, columns in cells.items():
        kinds.setdefault(tuple(columns), []).append(row)
    parts = ["   ".join(f"{name} {value:.4g}" for name, value in single.items())] if single else []
    for columns, rows in kinds.items():
        shown_rows = rows[:ROWS]
        lines = [[row, *(f"{cells[row][column]:.3f}" for column in columns)] for row in shown_rows]
        more = f"\n... and {len(rows) - ROWS} more rows, which the logs hold" if len(rows) > ROWS else ""
        parts.append(text_table(["", *columns], lines) + more)
    return "\n\n".join(parts)


def _passes(trainer: L.Trainer) -> str:
    """How often the training set was gone through."""
    batches = trainer.num_training_batches
    done = trainer.fit_loop.epoch_loop.total_batch_idx + 1
    return f" ({done / batches:.3g} epochs)" if 0 < batches < math.inf else ""


def spent(seconds: float) -> str:
    """A duration: 12 s, 2 min 47 s, 3 h 5 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _quoted(path: str | Path) -> str:
    return shlex.quote(shown(path))


def _loss(values: Mapping[str, Any], stage: str) -> Any:
    """The loss of a stage, which is one of a generator's two experts' or the whole one's; None without one."""
    return next((value for name, value in values.items() if re.fullmatch(f"{stage}/loss{EXPERT}", name)), None)
