"""Learning rates, betas and the strength of guidance, chosen on a seed of their own.

Every algorithm has the same number of trials. The one that the reward model prefers is taken, as nobody outside of this
world has an oracle.
"""

from collections.abc import Mapping
from dataclasses import replace

from ...commands.arms import Arm, Sweep
from ...models.dimensions import OVERALL
from ...models.files import read_json, write_json
from ...models.guidance import Guidance
from .configured import Settings, check
from .paper_claims import GUIDES, STRENGTHS, TRIALS
from .pipeline import ALIGNED, Loop
from .units import Unit

TUNING = "tuning"
"""Folder of the seed that settings are chosen on."""
NOISES = 16
"""Noises per prompt in every comparison."""
_WHOLE = "[{class_path: videoalign.callbacks.ExportGenerator, init_args: {pipeline: true}}]"
"""Full training exports a pipeline, not adapters."""

Values = Mapping[str, float]
"""Learning rate ``lr``, and ``beta`` where an algorithm has one."""


class Tuned(Loop):
    """Trainings whose learning rate and beta were chosen, and what chooses them.

    It takes the arguments of :class:`.steps.Steps`.
    """

    def tuned(
        self, result: str, algorithm: str, latents: str, values: Values | None = None, settings: Settings | None = None
    ) -> None:
        """Train an algorithm on a set of latents.

        Args:
            result: Folder of the trained model.
            algorithm: Key of :data:`.paper_claims.TRIALS`.
            latents: Name of the latents.
            values: Learning rate and beta; those that tuning chose if not given.
            settings: Settings that override the experiments.
        """
        if values is None:
            values = read_json(self.out / TUNING / "tuned.json", "a folder of the paper's cells")[algorithm]
        experiments, settings = self._configured(result, algorithm, latents, values, settings or {})
        self.fit(result, experiments, settings)

    def _configured(
        self, result: str, algorithm: str, latents: str, values: Values, settings: Settings
    ) -> tuple[tuple[str, ...], Settings]:
        """Experiments of an algorithm, and all of their settings."""
        own = {"model.init_args.optimizer.init_args.lr": values["lr"], **settings}
        if "beta" in values:
            own["model.init_args.beta.init_args.beta"] = values["beta"]
        if algorithm.endswith("-full"):
            own |= {"model.init_args.lora": "null", "trainer.callbacks": _WHOLE}
        experiments = ALIGNED[algorithm.removesuffix("-full")][0]
        return experiments, self.settings(result, self.on_latents(latents, own))

    def trained(
        self, result: str, algorithm: str, latents: str, values: Values | None = None, settings: Settings | None = None
    ) -> Unit:
        """A unit of :meth:`tuned`, whose settings are checked here.

        Args:
            result: Folder of the trained model.
            algorithm: Key of :data:`.paper_claims.TRIALS`.
            latents: Name of the latents.
            values: Learning rate and beta; those that tuning chose if not given.
            settings: Settings that override the experiments.
        """
        trial = values or TRIALS[algorithm][0]  # any trial has the keys that tuning will choose
        check(self.place + result, *self._configured(result, algorithm, latents, trial, settings or {}))
        needs, cost = ("generator", f"latents/{latents}"), 0.25 * self.size.align
        args = (result, algorithm, latents, values, settings)
        unit = self.unit(result, f"training {result}", cost, needs, self.tuned, *args)
        return unit if values else replace(unit, needs=(*unit.needs, f"{TUNING}/tuned.json"))

    def tuning(self) -> list[Unit]:
        """Units that decide the values: every trial of every algorithm, compared on this seed's unseen prompts."""
        units, arms = [*self.base(whole=False)], {}
        for algorithm, trials in TRIALS.items():
            for number, values in enumerate(trials):
                name = f"trials/{algorithm}-{number}"
                units.append(self.trained(name, algorithm, "preferred", values))
                arms[f"{algorithm}-{number}"] = arm_of(name, algorithm)
        # guidance has as many trials as the algorithms have
        reward, weights = GUIDES["even"]
        sweeps = {"nrg": Sweep(noisy_reward=reward, strengths=STRENGTHS, guide=Guidance(weights=weights))}
        units += self.comparison("cells/trials", "choosing settings", arms, sweeps, samples=NOISES)
        compared = ("cells/trials/comparison.json",)
        return [*units, self.unit("tuned.json", "choosing settings", 1, compared, self._choose)]

    def _choose(self) -> None:
        """Take of each algorithm the trial that the reward model prefers most often to the base, at other noise."""
        arms = read_json(self.folder / "cells/trials/comparison.json", "a comparison")["arms"]

        def liked(name: str) -> float:
            return arms[name]["against_base"]["reward model"][OVERALL]["superiority"]

        chosen = {
            algorithm: max(enumerate(trials), key=lambda trial: liked(f"{algorithm}-{trial[0]}"))[1]
            for algorithm, trials in TRIALS.items()
        }
        strengths = [name for name in arms if name.startswith("nrg@")]
        best = float(max(strengths, key=liked).removeprefix("nrg@"))
        write_json(self.folder / "tuned.json", {**chosen, "nrg": {"strength": best}})


def arm_of(name: str, algorithm: str) -> Arm:
    """An arm of a comparison: adapters, or a transformer of its own after full training.

    Args:
        name: Folder of the trained model.
        algorithm: Key of :data:`.paper_claims.TRIALS`.
    """
    return Arm(generator=name) if algorithm.endswith("-full") else Arm(lora=name)
