"""Texts, tables, charts, pictures, histograms and clips for every logger of a run.

:func:`media_of` gives the one object through which callbacks show what is no number. Each kind of logger has a class in
:data:`WRITERS`; clips also go to the page ``samples.html`` in the run's folder.
"""

import html
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from ..models.files import new_file, write_text
from .plots import csv_table, distribution, markdown_table, pixels
from .run_folder import own_folder
from .samples_page import SamplesPage
from .side_clips import Clip, drawn, gif, mp4


class Writer:
    """Shows media in one logger; what it has no place for is shown in another form.

    Tags are names such as ``val/reliability``; steps are optimizer steps.
    """

    def text(self, tag: str, text: str, step: int) -> None:
        """Show a text in Markdown."""

    def document(self, name: str, text: str) -> None:
        """Show a plain text that belongs to the whole run, such as ``config.yaml``."""

    def table(self, tag: str, head: Sequence[str], rows: Sequence[Sequence[str]], step: int) -> None:
        """Show a table of texts."""
        self.text(tag, markdown_table(head, rows), step)

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        """Show a chart."""
        self.image(tag, pixels(figure), step)

    def image(self, tag: str, picture: np.ndarray, step: int) -> None:
        """Show a picture (H, W, 3) of uint8."""

    def histogram(self, tag: str, values: np.ndarray, step: int) -> None:
        """Show the distribution of values (N,)."""
        self.figure(tag, distribution(tag, values), step)

    def clip(self, tag: str, clip: Clip, step: int) -> None:
        """Show videos side by side."""


class TensorBoardMedia(Writer):
    """Shows media in TensorBoard; clips are animated images, because it plays no videos.

    Args:
        writer: The run's SummaryWriter.
    """

    def __init__(self, writer: SummaryWriter) -> None:
        self.writer = writer

    def text(self, tag: str, text: str, step: int) -> None:
        """Show a text under the tab Text."""
        self.writer.add_text(tag, text, step)

    def document(self, name: str, text: str) -> None:
        """Show a document under the tab Text, as it is."""
        self.text(Path(name).stem, "\n".join(f"    {line}" for line in text.splitlines()), 0)

    def image(self, tag: str, picture: np.ndarray, step: int) -> None:
        """Show a picture. (``SummaryWriter.add_figure`` would import pyplot.)"""
        self.writer.add_image(tag, picture, step, dataformats="HWC")

    def histogram(self, tag: str, values: np.ndarray, step: int) -> None:
        """Show a histogram."""
        self.writer.add_histogram(tag, values, step)

    def clip(self, tag: str, clip: Clip, step: int) -> None:
        """Show an animation among the images."""
        self.animation(tag, drawn(clip), clip.fps, step)

    def animation(self, tag: str, frames: Sequence[Image.Image], fps: float, step: int) -> None:
        """Show an animation. (``add_video`` writes nothing with recent moviepy.)

        Args:
            tag: Name of the animation.
            frames: Pictures of the animation, all of one size.
            fps: Frame rate, in frames per second.
            step: Optimizer step that the animation belongs to.
        """
        width, height = frames[0].size
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif(frames, fps))
        self.writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


class WandbMedia(Writer):
    """Shows media in Weights & Biases.

    Args:
        logger: The run's logger.
    """

    def __init__(self, logger: WandbLogger) -> None:
        import wandb  # an extra of the package: only who has that logger has it

        self.logger, self.kinds = logger, wandb

    def _log(self, tag: str, value: Any, step: int) -> None:
        self.logger.log_metrics({tag: value}, step)

    def text(self, tag: str, text: str, step: int) -> None:
        """Show a text as a panel of HTML; its markup stays as it is."""
        self._log(tag, self.kinds.Html(f"<pre>{html.escape(text)}</pre>", inject=False), step)

    def document(self, name: str, text: str) -> None:
        """Keep a document among the run's files, and show it."""
        run = self.logger.experiment
        path = Path(run.dir) / "videoalign" / name  # a config.yaml of its own stands beside that folder
        write_text(path, text)
        run.save(str(path), base_path=run.dir, policy="now")
        self.text(Path(name).stem, text, 0)

    def table(self, tag: str, head: Sequence[str], rows: Sequence[Sequence[str]], step: int) -> None:
        """Show a table."""
        self._log(tag, self.kinds.Table(columns=list(head), data=[list(row) for row in rows]), step)

    def image(self, tag: str, picture: np.ndarray, step: int) -> None:
        """Show a picture."""
        self._log(tag, self.kinds.Image(picture), step)

    def histogram(self, tag: str, values: np.ndarray, step: int) -> None:
        """Show a histogram."""
        self._log(tag, self.kinds.Histogram(values), step)

    def clip(self, tag: str, clip: Clip, step: int) -> None:
        """Show a video that holds all of them side by side."""
        with TemporaryDirectory() as folder:
            path = Path(folder) / "clip.mp4"
            path.write_bytes(mp4(drawn(clip, texts=False), clip.fps))
            self._log(tag, self.kinds.Video(str(path), caption="\n".join(clip.lines()), format="mp4"), step)


class FileMedia(Writer):
    """Writes media as files: ``media/TAG/STEP`` with the extension of their kind.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, tag: str, step: int, extension: str) -> str:
        plain = re.sub(r"[^\w ./-]", "_", tag).replace("..", "_").strip("/ ")
        return f"media/{plain}/{step:06d}.{extension}"

    def write(self, name: str, content: bytes) -> None:
        """Write a file.

        Args:
            name: Path below the run's folder.
            content: Content of the file.
        """
        with new_file(self.folder / name) as partial:
            partial.write_bytes(content)

    def text(self, tag: str, text: str, step: int) -> None:
        """Write a Markdown file."""
        self.write(self._path(tag, step, "md"), text.encode())

    def table(self, tag: str, head: Sequence[str], rows: Sequence[Sequence[str]], step: int) -> None:
        """Write a CSV file."""
        self.write(self._path(tag, step, "csv"), csv_table(head, rows).encode())

    def image(self, tag: str, picture: np.ndarray, step: int) -> None:
        """Write a PNG file."""
        with TemporaryDirectory() as folder:
            path = Path(folder) / "picture.png"
            Image.fromarray(picture).save(path)
            self.write(self._path(tag, step, "png"), path.read_bytes())


class MLFlowMedia(FileMedia):
    """Sends the files of :class:`FileMedia` to MLflow as artifacts of the run, and clips as mp4 files.

    Args:
        logger: The run's logger.
    """

    def __init__(self, logger: MLFlowLogger) -> None:
        self.logger = logger

    def write(self, name: str, content: bytes) -> None:
        """Send a file.

        Args:
            name: Path among the run's artifacts.
            content: Content of the file.
        """
        with TemporaryDirectory() as folder:
            path = Path(folder) / Path(name).name
            path.write_bytes(content)
            self.logger.experiment.log_artifact(self.logger.run_id, str(path), str(Path(name).parent).lstrip("."))

    def document(self, name: str, text: str) -> None:
        """Send a document."""
        self.write(name, text.encode())

    def clip(self, tag: str, clip: Clip, step: int) -> None:
        """Send a video that holds all of them side by side."""
        self.write(self._path(tag, step, "mp4"), mp4(drawn(clip), clip.fps))


class PageMedia(Writer):
    """Adds clips to the page ``samples.html`` of a run.

    Args:
        page: The page.
    """

    def __init__(self, page: SamplesPage) -> None:
        self.page = page

    def clip(self, tag: str, clip: Clip, step: int) -> None:
        """Add videos to the page, as an mp4 file each."""
        self.page.add(tag, clip, step)


WRITERS: Mapping[type[Logger], Callable[[Any], Writer]] = {
    TensorBoardLogger: lambda logger: TensorBoardMedia(logger.experiment),
    WandbLogger: WandbMedia,
    MLFlowLogger: MLFlowMedia,
    CSVLogger: lambda logger: FileMedia(Path(logger.log_dir)),
}
"""What shows media in each kind of logger; of any other kind, Lightning logs numbers alone."""


class Media:
    """Shows media in all loggers of a run, at one step.

    Args:
        writers: A writer per logger.
        step: Optimizer step that the media belong to.
    """

    def __init__(self, writers: Sequence[Writer], step: int) -> None:
        self.writers, self.step = list(writers), step

    def text(self, tag: str, text: str) -> None:
        """Show a text in Markdown."""
        for writer in self.writers:
            writer.text(tag, text, self.step)

    def document(self, name: str, text: str) -> None:
        """Show a plain text that belongs to the whole run, such as ``config.yaml``."""
        for writer in self.writers:
            writer.document(name, text)

    def table(self, tag: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Show a table of texts."""
        for writer in self.writers:
            writer.table(tag, head, rows, self.step)

    def figure(self, tag: str, figure: Figure) -> None:
        """Show a chart."""
        for writer in self.writers:
            writer.figure(tag, figure, self.step)

    def image(self, tag: str, picture: np.ndarray) -> None:
        """Show a picture (H, W, 3) of uint8."""
        for writer in self.writers:
            writer.image(tag, picture, self.step)

    def histogram(self, tag: str, values: np.ndarray) -> None:
        """Show the distribution of values (N,)."""
        for writer in self.writers:
            writer.histogram(tag, values, self.step)

    def clip(self, tag: str, clip: Clip) -> None:
        """Show videos side by side."""
        for writer in self.writers:
            writer.clip(tag, clip, self.step)


def media_of(trainer: L.Trainer) -> Media | None:
    """What shows media in the run's loggers, or None without a logger and on every rank but the first."""
    if not trainer.is_global_zero or not trainer.loggers:
        return None
    writers = []
    for logger in trainer.loggers:
        make = next((make for kind, make in WRITERS.items() if isinstance(logger, kind)), None)
        if make is None:
            _say_once(type(logger).__name__)
        else:
            writers.append(make(logger))
    folder = own_folder(trainer)
    if "://" not in str(trainer.loggers[0].save_dir):
        keep = next((c.keep_validations for c in trainer.callbacks if hasattr(c, "keep_validations")), None)
        writers.append(PageMedia(SamplesPage(folder, keep)))
    return Media(writers, trainer.global_step)


_SAID: set[str] = set()


def _say_once(kind: str) -> None:
    if kind not in _SAID:
        _SAID.add(kind)
        known = ", ".join(logger.__name__ for logger in WRITERS)
        rank_zero_warn(f"{kind} gets numbers only; tables, charts and clips are shown by {known}")
