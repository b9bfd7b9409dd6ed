"""Rated pairs as people see them: both videos side by side, with their labels and the model's probabilities."""

import math

import lightning as L
import torch
from torch import Tensor

from ..datamodules.contracts import HasExamples, ScoresPairs, require
from ..datamodules.ratings import WORDS
from ..datamodules.video_pair import VideoPair
from ..models.dimensions import DIMENSIONS
from ..models.preference import probabilities
from .ema import averaged
from .run_media import media_of
from .side_clips import Clip, frames_of


class ExamplePairs(L.Callback):
    """Shows the same held-out pairs side by side at each validation, in the run's loggers and on ``samples.html``.

    Args:
        count: Number of pairs to show.
        fps: Frame rate at which they are shown, in frames per second.
        height: Least height of a video, in pixels.
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
            [v for p in self.pairs for v in p.videos],
            [p.prompt for p in self.pairs for _ in "AB"],
            [p.image for p in self.pairs for _ in "AB"],
        )
        with averaged(trainer, pl_module), torch.no_grad(), trainer.precision_plugin.val_step_context():
            was_training = pl_module.training
            pl_module.eval()
            rewards = scores(trainer.strategy.batch_to_device(batch)).cpu()  # (2N, 3), A and B in turn
            pl_module.train(was_training)
        if media := media_of(trainer):
            for number, (pair, both) in enumerate(zip(self.pairs, rewards.unflatten(0, (-1, 2))), 1):
                media.clip(f"val/examples/{number}", rated_clip(pair, both, scores.theta, self.fps, self.height))


def rated_clip(pair: VideoPair, rewards: Tensor, theta: float, fps: float, height: int) -> Clip:
    """Both videos of a pair, with the labels that people gave, probabilities and rewards.

    Args:
        pair: The pair, with its videos decoded.
        rewards: Raw rewards (2, 3) of A and B.
        theta: Tie parameter of the probabilities.
        fps: Frame rate at which it is shown, in frames per second.
        height: Least height of a video, in pixels.
    """
    rows = [["", "label", "P(A)", "P(same)", "P(B)", "reward A", "reward B"]]
    predicted = probabilities(rewards[0] - rewards[1], theta).tolist()
    for name, label, outcomes, both in zip(DIMENSIONS, pair.labels.tolist(), predicted, rewards.T.tolist()):
        word = "none" if math.isnan(label) else WORDS[int(label)]
        rows.append([name, word, *(f"{p:.2f}" for p in outcomes), *(f"{r:+.2f}" for r in both)])
    sides = {f"{side} {source}".strip(): frames_of(v) for side, source, v in zip("AB", pair.sources, pair.videos)}
    return Clip(sides, fps, pair.prompt, rows, height)
