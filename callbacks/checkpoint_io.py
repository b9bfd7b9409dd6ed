"""Checkpoint files that are whole or absent, and that are read without running any code that they contain.

Lightning writes through fsspec: to a temporary file under TMPDIR and, where that is another file system, by a copy onto
the old checkpoint, which a full disk or a killed process leaves in pieces.
"""

import contextlib
import io
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import Strategy
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.api import CheckpointException

from .. import VideoAlignError
from ..errors import damaged, unusable_checkpoint
from ..models.files import check_readable, new_file, settle, sweep
from ..models.locks import real, temporary
from ..models.renames import swap_in

_META, _INDEX = "meta.pt", ".metadata"
"""Files of a sharded checkpoint: the one that Lightning adds, and the one that torch writes."""
_PLAIN = {
    ("torch", "Size"), ("torch", "device"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
}  # fmt: skip
"""Classes outside of torch's metadata module that the index of a sharded checkpoint may hold."""
_UNREADABLE = (
    OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, EOFError, IndexError, OverflowError,
    pickle.UnpicklingError, zipfile.BadZipFile, CheckpointException,
)  # fmt: skip
"""Errors that reading a damaged or foreign file raises."""


class WholeFiles(TorchCheckpointIO):
    """Writes checkpoints whole, through :func:`~videoalign.models.files.new_file`.

    Remote addresses are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; an earlier one of that name stays until the new one is on the disk."""
        if not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        # a link, such as last.ckpt with save_last: link, is replaced rather than what it points to
        with writing(path), new_file(path, follow=False) as partial, open(partial, "wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint through :func:`read_checkpoint`."""
        _refuse_objects(weights_only)
        if not _is_local_file_protocol(path):
            with reading(path):
                return super().load_checkpoint(path, map_location, weights_only=True)
        return read_checkpoint(path, map_location)


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn the failure of writing a checkpoint into a message."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError, CheckpointException) as error:
        # torch closes its archive after a failed write, and fails there for a second time
        cause = next((e for e in (error, error.__context__, error.__cause__) if isinstance(e, OSError)), error)
        raise VideoAlignError(
            f"checkpoint {path} cannot be written ({_reason(cause)}). Earlier checkpoints are whole: make room, and go "
            "on from the newest with --ckpt_path"
        ) from None


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn the failure of reading a checkpoint into a message, without torch's advice to run its content."""
    try:
        yield
    except FileNotFoundError:
        raise VideoAlignError(f"checkpoint {path}: there is no such file") from None
    except torch.OutOfMemoryError:
        raise
    except _UNREADABLE as error:
        raise VideoAlignError(unusable_checkpoint(path, damaged(_reason(error)))) from None


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):  # it holds the errors of several processes; the first one is reported
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = (str(error).splitlines() or [""])[0][:160]
    if "weights_only" in text or "Weights only" in text or isinstance(error, pickle.UnpicklingError):
        return "it holds more than tensors and plain values, and nothing of it was run"
    return text.strip().rstrip(".") or type(error).__name__


def check_checkpoint(path: str | Path) -> None:
    """Refuse a local file or folder that is not a whole checkpoint; the checksums of all bytes are compared.

    Args:
        path: Checkpoint file, or folder of a sharded checkpoint.

    Raises:
        VideoAlignError: Where it is missing, damaged, of another kind, or not readable by this user.
    """
    path = Path(path)
    with reading(path):
        if path.is_dir():
            _check_folder(path)
            return
        check_readable(path)
        if not path.exists():
            raise FileNotFoundError
        if not zipfile.is_zipfile(path):
            raise ValueError("the file is cut short, or of another kind")
        with zipfile.ZipFile(path) as archive:
            # torch itself does not compare the checksums
            if broken := archive.testzip():
                raise ValueError(f"the checksum of {broken} does not fit")


def _check_folder(path: Path) -> None:
    for name in (_META, _INDEX):
        check_readable(path / name)
        if not (path / name).is_file():
            raise ValueError(f"the folder has no {name}")
    check_checkpoint(path / _META)
    with open(path / _INDEX, "rb") as file:
        index = _Index(file).load()
    for place in index.storage_data.values():
        check_readable(path / place.relative_path)
        with open(path / place.relative_path, "rb") as file:
            file.seek(place.offset)
            content = file.read(place.length)
        if len(content) < place.length:
            raise ValueError(f"{place.relative_path} is cut short")
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if archive.testzip():
                raise ValueError(f"a checksum in {place.relative_path} does not fit")


class _Index(pickle.Unpickler):
    """Reads the index of a sharded checkpoint; torch itself would unpickle anything that the file holds."""

    def find_class(self, module: str, name: str) -> Any:
        """Give the index's own classes, and refuse every other name."""
        if (module, name) in _PLAIN:
            return super().find_class(module, name)
        if module == "torch" and isinstance(kind := getattr(torch, name, None), torch.dtype):
            return kind
        found = getattr(metadata, name, None) if module == metadata.__name__ else None
        if isinstance(found, type) and found.__module__ == module:
            return found
        raise pickle.UnpicklingError(f"{module}.{name}")


def _refuse_objects(weights_only: bool | None) -> None:
    if weights_only is False:
        raise VideoAlignError("checkpoints are read as tensors and plain values only: leave weights_only out")


def read_checkpoint(path: str | Path, map_location: Any = "cpu", mmap: bool = False) -> dict[str, Any]:
    """The content of a checkpoint file. Only tensors and plain values are loaded.

    Args:
        path: Checkpoint file.
        map_location: Device of the tensors, as :func:`torch.load` takes it.
        mmap: Whether tensors stay on the disk until they are used.

    Raises:
        VideoAlignError: Where it is missing, damaged, of another kind, or not readable by this user.
    """
    check_checkpoint(path)
    with reading(path):
        if Path(path).is_dir():
            raise ValueError("it is a folder, as several processes write it; resume with the strategy that wrote it")
        checkpoint = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
        if not isinstance(checkpoint, dict) or not {"state_dict", "pytorch-lightning_version"} <= checkpoint.keys():
            raise ValueError("it holds no state of a training")
    return checkpoint


def read_entries(path: str | Path) -> dict[str, Any]:
    """What a checkpoint holds beside the state of model and optimizers, which stays on the disk.

    Args:
        path: Checkpoint file, or folder of a sharded checkpoint.

    Raises:
        VideoAlignError: Where it is missing, damaged, of another kind, or not readable by this user.
    """
    if not Path(path).is_dir():
        return read_checkpoint(path, mmap=True)
    with reading(path):
        return torch.load(Path(path) / _META, map_location="cpu", weights_only=True)


def whole_checkpoints(trainer: L.Trainer) -> L.Trainer:
    """Make a trainer write and read its checkpoints through this module, and return it.

    Strategies that shard a model bypass Lightning's CheckpointIO: they write and read folders by themselves.

    Args:
        trainer: Trainer to change, before it fits or tests.
    """
    strategy = trainer.strategy
    plugin = strategy.checkpoint_io
    if isinstance(plugin, _WrappingCheckpointIO) and type(plugin.checkpoint_io) is TorchCheckpointIO:
        plugin._checkpoint_io = WholeFiles()  # the setter keeps the first one
    elif type(plugin) is TorchCheckpointIO:
        strategy.checkpoint_io = WholeFiles()
    if type(strategy).load_checkpoint is not Strategy.load_checkpoint:
        strategy.load_checkpoint = _checked(strategy, strategy.load_checkpoint)
    if _writes_folders(strategy):
        strategy.save_checkpoint = _whole_folder(strategy, strategy.save_checkpoint)
    return trainer


def _writes_folders(strategy: Strategy) -> bool:
    fsdp = getattr(strategy, "_state_dict_type", None) == "sharded"
    return fsdp or getattr(strategy, "_save_distributed_checkpoint", False)


@runtime_checkable
class NamesGroups(Protocol):
    """A LightningModule whose checkpoints name the groups of its optimizer's parameters."""

    def compare_groups(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuse a checkpoint whose groups are other ones, before its state is loaded into the optimizer.

        Args:
            checkpoint: What a checkpoint holds beside the state of model and optimizers.
        """


def _checked(strategy: Strategy, load: Callable) -> Callable:
    def load_checkpoint(checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Check a checkpoint, then let Lightning load it."""
        _refuse_objects(weights_only)
        if Path(checkpoint_path).is_dir():
            check_checkpoint(checkpoint_path)
        elif _is_local_file_protocol(checkpoint_path):
            read_checkpoint(checkpoint_path, mmap=True)
        if strategy.optimizers and isinstance(strategy.lightning_module, NamesGroups):
            strategy.lightning_module.compare_groups(read_entries(checkpoint_path))
        with reading(checkpoint_path):
            return load(checkpoint_path, weights_only=True)

    return load_checkpoint


def _whole_folder(strategy: Strategy, save: Callable) -> Callable:
    def save_checkpoint(checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Let Lightning write a temporary folder, which takes the name when all processes have written. Collective."""
        path = Path(strategy.broadcast(filepath))
        partial = Path(strategy.broadcast(str(temporary(real(path.parent) / path.name))))
        try:
            with writing(path):
                if strategy.is_global_zero:
                    partial.parent.mkdir(parents=True, exist_ok=True)
                    sweep(partial.parent)
                save(checkpoint, partial, storage_options)
                strategy.barrier()
                if strategy.is_global_zero:
                    settle(partial)
                    swap_in(partial, path)
            strategy.barrier()
        finally:
            if strategy.is_global_zero:
                shutil.rmtree(partial, ignore_errors=True)

    return save_checkpoint
