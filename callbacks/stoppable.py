"""Trainers that end at the next step or batch when a signal asks for it, all ranks at the same one."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.strategies.launchers import subprocess_script
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from .. import ranks, stopping

PATIENCE = 20.0
"""Seconds in which the first rank may end by itself when another one has ended with an error."""


def stoppable(trainer: L.Trainer) -> L.Trainer:
    """Let a trainer end as :mod:`videoalign.stopping` describes; returns the trainer.

    Every Trainer of this package is wrapped so. Lightning's own handlers are replaced, because its SIGTERM ends `fit`
    with status 0 and broadcasts inside the handler, where ranks may be at different collectives; its Ctrl-C is an
    exception that a destructor can swallow; and its observer of the other ranks kills the first one before that has
    reported its error.
    """
    trainer._signal_connector = _Signals(trainer)
    trainer.callbacks.append(StopAtSignal())  # behind all others, also those that write checkpoints
    subprocess_script._ChildProcessObserver = _Observer
    return trainer


class _Signals(_SignalConnector):
    """Replaces Lightning's signal handlers: only SLURM's signal to requeue is handled, between two steps."""

    requeue = requeued = False

    def register_signal_handlers(self) -> None:
        """Register a handler of SLURM's signal to requeue only."""
        environment = self.trainer._accelerator_connector.cluster_environment
        if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
            return
        number = environment.requeue_signal
        if number and not self._has_already_handler(number) and threading.current_thread() is threading.main_thread():
            self._original_handlers = {number: signal.getsignal(number)}
            signal.signal(number, self._asked)

    def _asked(self, number: int, frame: object) -> None:
        self.requeue = True

    def save_and_requeue(self) -> None:
        """Save a checkpoint and requeue the job, as Lightning does inside its handler. Collective."""
        self.requeue, self.requeued = False, True
        self._slurm_sigusr_handler_fn(self.trainer._accelerator_connector.cluster_environment.requeue_signal, None)


class _Observer(subprocess_script._ChildProcessObserver):
    """Ends the run with the status of the rank that failed, after the first rank had time to report its error."""

    def __init__(self, main_pid: int, child_processes: list[subprocess.Popen], sleep_period: int = 1) -> None:
        super().__init__(main_pid, child_processes, sleep_period)
        ranks.children[:] = child_processes

    def _run(self) -> bool:
        codes = [process.poll() for process in self._child_processes]
        if failed := next(filter(None, codes), 0):
            time.sleep(PATIENCE)  # in most cases the first rank gets an error in this time, and ends with it
            self._end(failed if failed > 0 else 128 - failed, self._child_processes)
        return all(code == 0 for code in codes)

    @staticmethod
    def _end(status: int, processes: list[subprocess.Popen]) -> None:
        for process in processes:
            process.kill()
        os._exit(status)


class StopAtSignal(L.Callback):
    """Ends training, evaluation and prediction between two steps or batches when a signal has asked for it.

    Training writes a checkpoint first and resumes from it exactly; if it was stopped within a validation, it repeats
    that validation. Ranks agree, so that all of them end at the same step, whichever of them got the signal.
    """

    def __init__(self) -> None:
        self.group: Any = None
        self.step = 0
        self.common: list[float] = []
        self.ending = 0
        self.validation: dict[str, Any] = {}

    # --- hooks --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make a process group for agreement on the CPU, so that no rank waits for its GPU. Collective."""
        if trainer.world_size > 1 and self.group is None and dist.is_initialized():
            self.group = dist.new_group(backend="gloo")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on, let signals wait for the end of a step."""
        stopping.defer(_silently)
        self.step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop only after an optimizer step: a checkpoint holds no accumulated gradients."""
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        self.ending, requeue = self._agreed(trainer)
        if requeue:
            trainer._signal_connector.save_and_requeue()
        loop = trainer.fit_loop.epoch_loop
        if self.ending and not loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
            self._stop_training(trainer)
        # Where a validation is due, training stops at its first batch, so that the resumed training validates.

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on, let signals wait for the end of a batch. Collective."""
        self._begin(trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches)
        if trainer.training or trainer.validating:
            self.validation = trainer.fit_loop.epoch_loop.val_loop.batch_progress.state_dict()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop within a validation, if a signal has asked for it."""
        ending, requeue = (self.ending, False) if self.ending else self._look(trainer, batch_idx, dataloader_idx)
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        if not fitting:
            self._stop(ending)
        elif requeue or ending:
            with self._before_validation(trainer):
                if requeue:
                    trainer._signal_connector.save_and_requeue()
                if ending:
                    self.ending = ending
                    self._stop_training(trainer)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on, let signals wait for the end of a batch. Collective."""
        self._begin(trainer.num_test_batches)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop within a test, if a signal has asked for it."""
        self._stop(self._look(trainer, batch_idx, dataloader_idx)[0])

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on, let signals wait for the end of a batch. Collective."""
        self._begin(trainer.num_predict_batches)

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop after a batch, which other callbacks have written by then."""
        self._stop(self._look(trainer, batch_idx, dataloader_idx)[0])

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let signals act at once again: no step is left to wait for."""
        stopping.resume(_silently)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let signals act at once again: no step is left to wait for."""
        stopping.resume(_silently)

    # --- agreement and end --------------------------------------------------------------------------------------------

    def _begin(self, counts: list[int | float]) -> None:
        """Find how many batches all ranks have, because those of a prediction may have different numbers of them."""
        stopping.defer(_silently)
        self.common = [float(count) for count in counts]
        if self.group and self.common:
            least = torch.tensor(self.common, dtype=torch.float64)
            dist.all_reduce(least, dist.ReduceOp.MIN, self.group)
            self.common = [count if count < float("inf") else 0.0 for count in least.tolist()]

    def _look(self, trainer: L.Trainer, batch_idx: int, dataloader_idx: int) -> tuple[int, bool]:
        if dataloader_idx >= len(self.common) or batch_idx >= self.common[dataloader_idx]:
            return 0, False
        return self._agreed(trainer)

    def _agreed(self, trainer: L.Trainer) -> tuple[int, bool]:
        """Number of the signal to end by, 0 for none, and whether to requeue; the same on all ranks."""
        heard = [stopping.asked() or 0, int(trainer._signal_connector.requeue)]
        if self.group:
            both = torch.tensor(heard)
            dist.all_reduce(both, dist.ReduceOp.MAX, self.group)
            heard = both.tolist()
        return heard[0], bool(heard[1])

    @staticmethod
    def _stop(signum: int) -> None:
        if signum:
            raise stopping.Stopped(signum)

    @contextlib.contextmanager
    def _before_validation(self, trainer: L.Trainer) -> Iterator[None]:
        """Reset progress to the start of the validation, so that the resumed training repeats all of it."""
        progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
        now = progress.state_dict()
        progress.load_state_dict(self.validation)
        progress.increment_ready()
        progress.increment_started()
        try:
            yield
        finally:
            progress.load_state_dict(now)

    def _stop_training(self, trainer: L.Trainer) -> None:
        """Write a checkpoint, and end with a message that names it. Collective."""
        step, kept = trainer.global_step, "it writes no checkpoints (trainer.enable_checkpointing), so nothing is kept"
        if trainer.checkpoint_callbacks:
            path = self._path(trainer)
            trainer.save_checkpoint(path)
            kept = (
                "its job was requeued, and goes on from there"
                if trainer._signal_connector.requeued
                else f"{path} holds all of it; the same command with --ckpt_path {path} goes on"
            )
        raise stopping.Stopped(self.ending, f"at step {step}: {kept}")

    @staticmethod
    def _path(trainer: L.Trainer) -> str:
        if trainer._signal_connector.requeued:
            return trainer._checkpoint_connector.hpc_save_path(trainer.default_root_dir)
        folder = getattr(trainer.checkpoint_callbacks[0], "dirpath", None)
        folder = folder or f"{trainer.log_dir or trainer.default_root_dir}/checkpoints"
        return f"{folder}/stopped-step={trainer.global_step}.ckpt"


def _silently() -> None:
    """Do nothing when a signal comes: the trainer asks for it between two steps."""
