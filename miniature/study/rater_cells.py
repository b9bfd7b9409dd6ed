"""Cell (l): from which rater bias on comparisons teach more than scores do.

Raters of a pool rate the same rendered pairs at several biases. Only scores change with the bias: the sets have equal
labels, so the losses of votes are trained once, and the two regressions at each bias. All have equal pairs, steps and
networks.

Each bias has a set of its own with the decoded frames of its pairs (75 MB of 1,500), copied from ``frames/train``: four
of them are as large as that set. So VideoPairs need not know of biases, and nothing is decoded again in ten trainings.
"""

from dataclasses import replace

from ...datamodules.shards import ShardSet
from ..world.rater_sets import rate_anew
from .configured import Settings
from .pipeline import Loop
from .rater_claims import BIASES, SCORED, VOTED, at, model_name
from .units import Unit

PAIRS = 1500
"""Pairs that are trained on, of the world's training set: a quarter of the demo's."""
HELD_OUT = 100
"""Pairs that the reward models are validated on."""
BATCH = 12
"""Pairs of a step; half of the usual number gives more steps at the same cost."""
STEPS = 500
"""Steps of a training, four times over all pairs: about 75 seconds on one core."""


class RaterCells(Loop):
    """The units of the cell.

    It takes the arguments of :class:`.steps.Steps`.
    """

    def rater_cells(self) -> list[Unit]:
        """Sets of every bias, a reward model for each loss that learns from them, and its accuracy."""
        units = [
            self.unit(
                _set(bias), f"raters score pairs: {at(bias)}", 5, ("frames/train", "world"), self._rate_anew, bias
            )
            for bias in BIASES
        ]
        trained = [(loss, BIASES[0]) for loss in VOTED] + [(loss, bias) for bias in BIASES for loss in SCORED]
        for loss, bias in trained:
            name, text = model_name(loss, bias), (VOTED | SCORED)[loss] + (f", {at(bias)}" if loss in SCORED else "")
            model = f"rm/{name}"
            unit = self.reward_model(model, f"training a reward model: {text}", self._settings(loss, bias))
            cost = 0.27 * BATCH / 24 * self._steps + 8
            units.append(replace(unit, needs=(*unit.needs, self.place + _set(bias)), cost=cost))
            units.append(self.benchmarking(f"bench/{name}", model, ["world/recent"], f"benchmarking {model}", 4))
        return units

    @property
    def _steps(self) -> int:
        return min(STEPS, self.size.reward)

    def _settings(self, loss: str, bias: float) -> Settings:
        """Settings of a training that override experiments/sprites/reward_btt.yaml."""
        place = self.folder / _set(bias)
        return {
            "trainer.max_steps": self._steps,
            "trainer.val_check_interval": self._steps,
            "model.init_args.network.init_args.template": "plain_shared",
            "model.init_args.loss": loss if loss in VOTED else "reg",
            "data.init_args.train": place / "train",
            "data.init_args.val": place / "val",
            "data.init_args.benchmarks": {},
            "data.init_args.batch_size": min(BATCH, self.size.world.train),
            "data.init_args.scores": "standardised" if loss == "std" else "mean",
        }

    def _rate_anew(self, bias: float) -> None:
        """Let the raters of one bias rate pairs."""
        train, val = ShardSet(self.folder / "frames/train"), ShardSet(self.folder / "world/val")
        rate_anew(train, val, self.folder / _set(bias), bias, PAIRS, HELD_OUT, self.seed)


def _set(bias: float) -> str:
    """Folder of the pairs that raters of one bias rated."""
    return f"raters/{bias:g}"
