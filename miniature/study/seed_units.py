"""Kinds of units: each method makes a unit of one step of :mod:`.steps`, with names relative to the seed's folder."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from ...datamodules.judgements import Weights
from .configured import Settings, check
from .steps import Steps
from .units import Unit

EQUAL = Weights()
"""All dimensions count alike."""


class SeedUnits(Steps):
    """Makes units of one seed.

    It takes the arguments of :class:`.steps.Steps`.
    """

    def unit(
        self, result: str, text: str, cost: float, needs: Iterable[str], run: Any, *args: Any, kind: str = ""
    ) -> Unit:
        """A unit that calls a function.

        Args:
            result: File or folder that the function leaves.
            text: Description for people.
            cost: Seconds that it takes on one core.
            needs: Results that it reads.
            run: The function.
            args: Its arguments.
            kind: Kind of work, see :class:`.units.Unit`; the function's name if not given.
        """
        needs = tuple(self.place + need for need in needs)
        return Unit(self.place + result, text, partial(run, *args), needs, cost, kind or run.__name__)

    def training(
        self,
        result: str,
        text: str,
        cost: float,
        needs: Iterable[str],
        experiments: Sequence[str],
        settings: Settings,
        export: bool = True,
    ) -> Unit:
        """A unit that trains; its settings are checked here, before any unit runs.

        Args:
            result: Folder of the trained model.
            text: Description for people.
            cost: Seconds that the unit takes on one core.
            needs: Results that the training reads.
            experiments: Names of files in experiments/sprites.
            settings: Settings that override the files.
            export: Whether a callback exports the result; else the module writes it itself.

        Raises:
            VideoAlignError: Where the experiments do not take the settings.
        """
        settings = self.settings(result, settings, export)
        check(self.place + result, experiments, settings)
        # a language model in bfloat16 and a generator in float32 are not slow on the same machines
        kind = f"training a {'generator' if 'model.init_args.generator' in settings else 'judge'}"
        return self.unit(result, text, cost, needs, self.fit, result, experiments, settings, export, kind=kind)

    def encoding(self, name: str, data: str, text: str = "", cost: float = 7) -> Unit:
        """A unit that encodes a set as ``latents/NAME``.

        Args:
            name: Name of the latents.
            data: Set of videos or pairs.
            text: Description, if it is not the name.
            cost: Seconds that the unit takes on one core.
        """
        result, needs = f"latents/{name}", (data.removesuffix("/val"), "generator")
        return self.unit(result, f"encoding: {text or name}", cost, needs, self.encode, result, data)

    def sampling(self, result: str, text: str, cost: float, *args: Any) -> Unit:
        """A unit that samples videos.

        Args:
            result: Folder of the videos.
            text: Description for people.
            cost: Seconds that the unit takes on one core.
            args: Further arguments of :meth:`.Steps.sample`.
        """
        return self.unit(result, text, cost, ("generator", "world"), self.sample, result, *args)

    def labelling(
        self,
        result: str,
        text: str,
        samples: str,
        mode: str = "margin",
        weights: Weights = EQUAL,
        margin: float = 0.3,
        judge: str = "reward",
        cost: float = 5,
    ) -> Unit:
        """A unit in which a reward model labels pairs.

        Args:
            result: Folder of the pairs.
            text: Description for people.
            samples: Set of videos whose pairs are labelled.
            mode: Which pairs of a prompt's videos: ``best-worst`` or ``margin``.
            weights: Weights of the dimensions in the comparison.
            margin: Least difference of the weighted rewards, at least 0, in standard deviations.
            judge: Folder of the reward model.
            cost: Seconds that the unit takes on one core.
        """
        args = (result, samples, mode, weights, margin, judge)
        return self.unit(result, text, cost, (judge, samples), self.prefer, *args)

    def benchmarking(
        self,
        result: str,
        model: str,
        sets: Sequence[str],
        text: str,
        cost: float = 8,
        needs: Sequence[str] = ("world",),
    ) -> Unit:
        """A unit that measures a reward model.

        Args:
            result: Folder of the accuracies.
            model: Folder of the reward model.
            sets: Folders of the benchmarks.
            text: Description for people.
            cost: Seconds that the unit takes on one core.
            needs: Results that hold the benchmarks.
        """
        return self.unit(result, text, cost, (model, *needs), self.bench, result, model, sets)
