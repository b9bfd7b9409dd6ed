"""The folder of a run, and animations in its TensorBoard."""

import contextlib
import io
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from ..models.locks import first_process


def writer_of(trainer: L.Trainer) -> SummaryWriter | None:
    """The run's TensorBoard writer, or None without that logger and on every rank but the first."""
    if not trainer.is_global_zero:
        return None
    return next((logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)


def folder_of(trainer: L.Trainer) -> Path | None:
    """The folder where the run's logger writes, or None without a logger. Collective: every rank must call it."""
    folder = trainer.log_dir
    return Path(folder) if trainer.loggers else None


def own_folders(trainer: L.Trainer) -> L.Trainer:
    """Give runs that begin at the same time folders of their own; returns the trainer.

    Lightning numbers a run by the folders that it sees, and makes the run's own folder only later.
    """
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and isinstance(logger._fs, LocalFileSystem) and first_process():
            logger._get_next_version = partial(_claimed, logger, logger._get_next_version)
    return trainer


def _claimed(logger: TensorBoardLogger, next_version: Callable[[], int]) -> int:
    """Make the run's folder under the first free number, and return that number."""
    root = Path(logger.root_dir)
    root.mkdir(parents=True, exist_ok=True)
    for version in itertools.count(next_version()):
        with contextlib.suppress(FileExistsError):
            (root / f"version_{version}").mkdir()
            return version


def gif(frames: list[Image.Image], fps: float) -> bytes:
    """Encode frames as an animated GIF that repeats for ever."""
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=max(20, round(1000 / fps)), loop=0)
    return buffer.getvalue()


def add_animation(writer: SummaryWriter, tag: str, frames: list[Image.Image], fps: float, step: int) -> None:
    """Show an animation among TensorBoard's images. (``add_video`` writes nothing with recent moviepy.)

    Args:
        writer: The run's writer.
        tag: Name of the animation.
        frames: Pictures of the animation, all of one size.
        fps: Frame rate.
        step: Optimizer step that the animation belongs to.
    """
    width, height = frames[0].size
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif(frames, fps))
    writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def enlarge(picture: np.ndarray, least: int) -> Image.Image:
    """Enlarge a picture by a whole factor.

    Args:
        picture: (H, W, 3) uint8.
        least: Height in pixels that the result has at least.
    """
    factor = max(1, -(-least // picture.shape[0]))
    return Image.fromarray(picture).resize(
        (picture.shape[1] * factor, picture.shape[0] * factor), Image.Resampling.NEAREST
    )
