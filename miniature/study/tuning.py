"""Learning rates, betas and the strength of guidance, chosen on seeds that are not reported.

Nobody outside of this world has an oracle, so the reward model chooses; what its choice loses by the oracle is on the
page. :mod:`.tuning_rounds` says which settings are tried.

A trial is a training of about 30 s and 8 s of sampling and judging on one core; of guidance, the latter alone. Six
algorithms with 6 trials at first and 3 in each further round, on three seeds, take 69 core-minutes for the first round,
34 for each further one, and 171 if there are four rounds: three reported seeds' worth, once. All trials of a round are
judged in one comparison, so that the base is sampled and judged once for all of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ... import VideoAlignError
from ...commands.arms import Arm, Sweep
from ...models.dimensions import OVERALL
from ...models.files import read_json, write_json
from ...models.guidance import Guidance
from .configured import Settings, check
from .paper_claims import GUIDES, ORACLE, OTHER, RM
from .pipeline import ALIGNED, Loop
from .tuning_rounds import (
    GRIDS,
    TRIED,
    TUNED,
    TUNING_SEEDS,
    Round,
    Trial,
    Values,
    choice,
    first_round,
    next_round,
    tuning_place,
)
from .units import Unit

NOISES = 16
"""Noises per prompt in comparisons of trials."""
ALGORITHMS = tuple(name for name in GRIDS if name != "nrg")
"""Algorithms that train."""
_WHOLE = "[{class_path: videoalign.callbacks.ExportGenerator, init_args: {pipeline: true}}]"
"""Full training exports a pipeline, not adapters."""


# --- rounds, as files tell them ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Rounds that follow from the results which a folder holds: every process that reads the same files has the same.

    Attributes:
        rounds: All rounds that are known by now; the last one may have no results yet.
        trials: Trials with results on all tuning seeds, by algorithm.
        whole: Whether all rounds have results, and no further one follows.
    """

    rounds: Sequence[Round]
    trials: Mapping[str, Sequence[Trial]]
    whole: bool


def planned(out: Path) -> Plan:
    """Read which rounds are done, and which one is next.

    Args:
        out: Folder of all results.
    """
    rounds: list[Round] = [first_round()]
    trials: dict[str, list[Trial]] = {algorithm: [] for algorithm in GRIDS}
    while rounds[-1]:
        number = len(rounds) - 1
        paths = [out / tuning_place(seed) / _compared(number) for seed in TUNING_SEEDS]
        if not all(path.exists() for path in paths):
            return Plan(rounds, trials, False)
        compared = [(path, read_json(path, "a comparison")["arms"]) for path in paths]
        for algorithm, settings in rounds[-1].items():
            start = len(trials[algorithm])
            for place, values in enumerate(settings, start):
                name = _arm(algorithm, place, values)
                judge, oracle = (tuple(_liked(*one, name, j) for one in compared) for j in (RM, ORACLE))
                trials[algorithm].append(Trial(values, judge, oracle, number))
        rounds.append(next_round(trials, len(rounds)))
    return Plan(rounds[:-1], trials, True)


def _compared(number: int) -> str:
    """Comparison of a round in a seed's folder."""
    return f"cells/trials{number}/comparison.json"


def _arm(algorithm: str, place: int, values: Values) -> str:
    """Name of a trial in its comparison."""
    return f"nrg@{values['strength']:g}" if algorithm == "nrg" else f"{algorithm}-{place}"


def _liked(path: Path, arms: Mapping[str, Any], name: str, judge: str) -> float:
    if name not in arms:
        raise VideoAlignError(f"{path} has no trial {name}: it was begun with other trials; name another --out")
    return arms[name]["against_base"][judge][OVERALL][OTHER]


def choose(out: Path) -> None:
    """Write the chosen settings, and all trials.

    Args:
        out: Folder of all results, in which all rounds are done.
    """
    trials = planned(out).trials
    numbers = {algorithm: [asdict(one) for one in every] for algorithm, every in trials.items()}
    write_json(out / TRIED, {"seeds": TUNING_SEEDS, "trials": numbers})
    write_json(out / TUNED, {algorithm: choice(every).values for algorithm, every in trials.items()})


def choosing(out: Path, plan: Plan) -> Unit:
    """The unit that chooses.

    Args:
        out: Folder of all results.
        plan: All rounds.
    """
    compared = [f"{tuning_place(seed)}/{_compared(n)}" for seed in TUNING_SEEDS for n in range(len(plan.rounds))]
    return Unit(TUNED, "choosing settings", partial(choose, out), tuple(compared), 1)


# --- units ------------------------------------------------------------------------------------------------------------


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
            algorithm: One of :data:`ALGORITHMS`.
            latents: Name of the latents.
            values: Learning rate and beta; those that tuning chose if not given.
            settings: Settings that override the experiments.
        """
        if values is None:
            values = read_json(self.out / TUNED, "a folder of the paper's cells")[algorithm]
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
            algorithm: One of :data:`ALGORITHMS`.
            latents: Name of the latents.
            values: Learning rate and beta; those that tuning chose if not given.
            settings: Settings that override the experiments.
        """
        trial = values or first_round()[algorithm][0]  # any trial has the keys that tuning will choose
        check(self.place + result, *self._configured(result, algorithm, latents, trial, settings or {}))
        needs, cost = ("generator", f"latents/{latents}"), 0.25 * self.size.align
        args = (result, algorithm, latents, values, settings)
        unit = self.unit(result, f"training {result}", cost, needs, self.tuned, *args)
        return unit if values else replace(unit, needs=(*unit.needs, TUNED))

    def tuning(self, rounds: Sequence[Round]) -> list[Unit]:
        """Units that try settings: each round's trials, compared on this seed's unseen prompts.

        Args:
            rounds: The rounds.
        """
        units, begun = [*self.base(whole=False)], dict.fromkeys(GRIDS, 0)
        reward, weights = GUIDES["even"]
        for number, trials in enumerate(rounds):
            arms: dict[str, Arm] = {}
            for algorithm in ALGORITHMS:
                for place, values in enumerate(trials[algorithm], begun[algorithm]):
                    arm = _arm(algorithm, place, values)
                    units.append(self.trained(f"trials/{arm}", algorithm, "preferred", values))
                    arms[arm] = arm_of(f"trials/{arm}", algorithm)
                begun[algorithm] += len(trials[algorithm])
            strengths = sorted(values["strength"] for values in trials["nrg"])
            sweeps = {"nrg": Sweep(noisy_reward=reward, strengths=[0.0, *strengths], guide=Guidance(weights=weights))}
            text = f"choosing settings, round {number + 1}"
            units += self.comparison(str(Path(_compared(number)).parent), text, arms, sweeps, samples=NOISES)
        return units


def arm_of(name: str, algorithm: str) -> Arm:
    """An arm of a comparison: adapters, or a transformer of its own after full training.

    Args:
        name: Folder of the trained model.
        algorithm: One of :data:`ALGORITHMS`.
    """
    return Arm(generator=name) if algorithm.endswith("-full") else Arm(lora=name)
