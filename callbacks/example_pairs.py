"""Rated pairs as people see them: both videos side by side, with their labels and the model's probabilities."""

import lightning as L
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..datamodules.contracts import HasExamples, ScoresPairs, require
from ..datamodules.ratings import WORDS
from ..datamodules.video_pair import VideoPair
from ..models.dimensions import DIMENSIONS
from ..models.preference import probabilities
from .tensorboard import add_animation, enlarge, writer_of


class ExamplePairs(L.Callback):
    """Shows the same held-out pairs as animations in TensorBoard at each validation.

    Args:
        count: Number of pairs to show.
        fps: Frame rate of the animations, in frames per second.
        height: Least height of a video in the animations, in pixels.
    """

    def __init__(self, count: int = 4, fps: float = 4.0, height: int = 160) -> None:
        self.count, self.fps, self.height = count, fps, height
        self.pairs: list[VideoPair] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a module that scores no pairs, and a DataModule that has none to show."""
        if stage == "fit":
            require(pl_module, ScoresPairs, "callbacks.ExamplePairs")
            require(trainer.datamodule, HasExamples, "callbacks.ExamplePairs")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score the pairs on every rank, because sharded models need all ranks, and draw them on the first."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        scores = require(pl_module, ScoresPairs, "callbacks.ExamplePairs")
        if not scores.has_held_out():
            return
        if not self.pairs:
            data = require(trainer.datamodule, HasExamples, "callbacks.ExamplePairs")
            self.pairs = list(data.examples(self.count))
        batch = scores.processor(
            [v for p in self.pairs for v in p.videos], [p.prompt for p in self.pairs for _ in "AB"]
        )
        with torch.no_grad(), trainer.precision_plugin.val_step_context():
            was_training = pl_module.training
            pl_module.eval()
            rewards = scores(trainer.strategy.batch_to_device(batch)).cpu()  # (2N, 3), A and B in turn
            pl_module.train(was_training)
        if writer := writer_of(trainer):
            outcome = probabilities(rewards[::2] - rewards[1::2], scores.theta)  # (N, 3, outcomes)
            for number, (pair, predicted) in enumerate(zip(self.pairs, outcome), 1):
                frames = draw_pair(pair, predicted, self.height)
                add_animation(writer, f"examples/{number}", frames, self.fps, trainer.global_step)


def draw_pair(pair: VideoPair, predicted: Tensor, height: int = 160) -> list[Image.Image]:
    """Draw both videos of a pair beside each other, with labels and predictions below them.

    Args:
        pair: The pair, with its videos decoded.
        predicted: (3, 3) probabilities of A, tie and B per dimension.
        height: Least height of a video, in pixels.

    Returns:
        Frames of the animation.
    """
    videos = [[enlarge(frame.permute(1, 2, 0).numpy(), height) for frame in video] for video in pair.videos]
    lines = [f"A {pair.sources[0]}   |   B {pair.sources[1]}", *_wrapped(pair.prompt)]
    for name, label, (a, tie, b) in zip(DIMENSIONS, pair.labels, predicted.tolist()):
        word = "none" if label.isnan() else WORDS[int(label)]
        lines.append(f"{name}: label {word:5} P(A) {a:.2f}  P(same) {tie:.2f}  P(B) {b:.2f}")
    widths = [video[0].width for video in videos]
    high = max(video[0].height for video in videos)
    canvas_size = max(sum(widths) + 8, 340), high + 14 * len(lines) + 8
    frames = []
    for i in range(max(map(len, videos))):
        canvas = Image.new("RGB", canvas_size, "white")
        canvas.paste(videos[0][min(i, len(videos[0]) - 1)], (0, 0))
        canvas.paste(videos[1][min(i, len(videos[1]) - 1)], (widths[0] + 8, 0))
        draw = ImageDraw.Draw(canvas)
        for row, line in enumerate(lines):
            draw.text((4, high + 4 + 14 * row), line, fill="black")
        frames.append(canvas)
    return frames


def _wrapped(prompt: str, width: int = 56, most: int = 3) -> list[str]:
    lines = [""]
    for word in prompt.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines[:most]
