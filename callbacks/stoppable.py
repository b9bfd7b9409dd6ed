"""Trainers that end at the next step or batch when a signal asks for it, on all ranks at the same one."""

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
"""Seconds that the first rank may take to end by itself when another one has ended with an error."""


def stoppable(trainer: L.Trainer) -> L.Trainer:
    """Let a trainer end as :mod:`videoalign.stopping` has it. For every Trainer that this package makes.

    Lightning's own handlers are left out here, in one place: its SIGTERM ends `fit` with status 0 and broadcasts inside
    the handler, where ranks stand at different collectives; its Ctrl-C is an exception that a destructor can swallow;
    and its observer of the other ranks kills the first one before it has said why (issue C22 and C31).
    """
    trainer._signal_connector = _Signals(trainer)
    trainer.callbacks.append(StopAtSignal())  # behind all others, also those that write checkpoints
    subprocess_script._ChildProcessObserver = _Observer
    return trainer


class _Signals(_SignalConnector):
    """In the place of Lightning's handlers: none but SLURM's signal to requeue, heeded between two steps."""

    requeue = requeued = False

    def register_signal_handlers(self) -> None:
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
        """What Lightning does inside its handler. Collective."""
        self.requeue, self.requeued = False, True
        self._slurm_sigusr_handler_fn(self.trainer._accelerator_connector.cluster_environment.requeue_signal, None)


class _Observer(subprocess_script._ChildProcessObserver):
    """Ends the run with the status of the rank that failed, not by killing the first one unheard."""

    def __init__(self, main_pid: int, child_processes: list[subprocess.Popen], sleep_period: int = 1) -> None:
        super().__init__(main_pid, child_processes, sleep_period)
        ranks.children[:] = child_processes

    def _run(self) -> bool:
        codes = [process.poll() for process in self._child_processes]
        if failed := next(filter(None, codes), 0):
            time.sleep(PATIENCE)  # mostly the first rank gets an error by then, and ends with it
            self._end(failed if failed > 0 else 128 - failed, self._child_processes)
        return all(code == 0 for code in codes)

    @staticmethod
    def _end(status: int, processes: list[subprocess.Popen]) -> None:
        for process in processes:
            process.kill()
        os._exit(status)


class StopAtSignal(L.Callback):
    """Ends training, evaluation and prediction between two steps or batches when a signal has asked for it.

    Training writes a checkpoint first, from which it goes on exactly; one that is stopped within a validation repeats
    that validation. Ranks agree, so that all of them end at the same step, whichever of them got the signal.
    """

    def __init__(self) -> None:
        self.group: Any = None
        self.step = 0
        self.common: list[float] = []
        self.ending = 0
        self.validation: dict[str, Any] = {}

    # --- when to look -------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """A group to agree in, on the CPU, so that no rank waits for its GPU. Collective."""
        if trainer.world_size > 1 and self.group is None and dist.is_initialized():
            self.group = dist.new_group(backend="gloo")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on signals wait for the end of a step."""
        stopping.defer(_silently)
        self.step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop where the optimizer has stepped: accumulated gradients are in no checkpoint."""
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        self.ending, requeue = self._agreed(trainer)
        if requeue:
            trainer._signal_connector.save_and_requeue()
        loop = trainer.fit_loop.epoch_loop
        if self.ending and not loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
            self._stop_training(
                trainer
            )  # else at the validation's first batch, so that it is done when training goes on

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on signals wait for the end of a batch. Collective."""
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
        """Stop within a validation."""
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
        """From here on signals wait for the end of a batch. Collective."""
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
        """Stop within a test."""
        self._stop(self._look(trainer, batch_idx, dataloader_idx)[0])

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on signals wait for the end of a batch. Collective."""
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
        """Stop behind a batch that others have written."""
        self._stop(self._look(trainer, batch_idx, dataloader_idx)[0])

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """No step is left whose end a signal could wait for."""
        stopping.resume(_silently)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """No step is left whose end a signal could wait for."""
        stopping.resume(_silently)

    # --- what to do ---------------------------------------------------------------------------------------------------

    def _begin(self, counts: list[int | float]) -> None:
        """Ranks of a prediction may have different numbers of batches: they agree on those that all of them have."""
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
        """The signal to end by (0: none), and whether to requeue; the same on all ranks."""
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
        """Progress as if the validation had just begun: Lightning then repeats all of it when training goes on."""
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
        """Write a checkpoint and end. Collective."""
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
    """The flag says all that a trainer needs."""
