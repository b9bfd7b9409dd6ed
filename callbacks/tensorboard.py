"""Pictures and texts in TensorBoard."""

import io
from pathlib import Path

import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter


def writer_of(trainer: L.Trainer) -> SummaryWriter | None:
    """The run's TensorBoard writer; None without that logger, and on every rank but the first."""
    if not trainer.is_global_zero:
        return None
    return next((logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)


def folder_of(trainer: L.Trainer) -> Path | None:
    """The run's folder, where the logger writes; None without a logger. Collective: every rank must ask."""
    folder = trainer.log_dir
    return Path(folder) if trainer.loggers else None


def gif(frames: list[Image.Image], fps: float) -> bytes:
    """An animated GIF that repeats for ever."""
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=max(20, round(1000 / fps)), loop=0)
    return buffer.getvalue()


def add_animation(writer: SummaryWriter, tag: str, frames: list[Image.Image], fps: float, step: int) -> None:
    """Show an animation among the images. (``add_video`` writes nothing with today's moviepy.)"""
    width, height = frames[0].size
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif(frames, fps))
    writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def enlarge(picture: np.ndarray, least: int) -> Image.Image:
    """An (H, W, 3) uint8 array as an image at least ``least`` pixels high, in whole multiples."""
    factor = max(1, -(-least // picture.shape[0]))
    return Image.fromarray(picture).resize(
        (picture.shape[1] * factor, picture.shape[0] * factor), Image.Resampling.NEAREST
    )
