"""Units of one seed of `videoalign study on-policy`: a held-out judge, and every algorithm at equal evaluations.

They begin where the closed loop of `videoalign paper` (:mod:`.pipeline`) ends, in the same folder of the seed, and lie
under ``on_policy``. The held-out judge is trained on ratings of other videos, from another seed; no training and no
search reads it, or needs it.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...commands.arms import Arm
from ...datamodules.shards import ShardSet
from ...models.files import new_folder
from ..world.oracle import Oracle
from ..world.rated_samples import rate_pairs
from .configured import Settings
from .loop_size import LoopSize
from .pipeline import Loop
from .policy_recipes import OF_POOL, RECIPES, Recipe, Values, spent, steps_of
from .policy_searches import PLAIN, REWARD, arms, trials
from .policy_size import GUIDED, JUDGED_PROMPTS, SHARES, STEPS, PolicySize
from .steps import HELD_OUT
from .units import Unit

PLACE = "on_policy"
"""Folder of the study's units in a seed's folder, and of what all seeds share."""
HELD = "held-out judge"
"""Name of the judge that nothing is trained against."""
HELD_FOLDER = f"{PLACE}/held/reward"
OTHER_SEED = 5000
"""Distance of the seeds that the held-out judge, its videos and its raters have from the seed's own."""
_SYMMETRIES = {
    "class_path": "videoalign.miniature.world.symmetries.Symmetries",
    "init_args": {"flip": True, "transpose": False, "shift": 3},
}
"""Changes of clips, as the judge itself was trained with."""
BENCHED = {"own": "reward", "held": HELD_FOLDER}
"""Reward models that are measured on generated clips of unseen prompts."""


class Policies(Loop):
    """The units of one seed.

    Args:
        out: Folder of all results.
        size: How much the loop trains and samples.
        seed: Seed of world, weights and training.
        place: Folder of this seed under ``out``.
        policies: Budget and sizes of the study.
    """

    def __init__(self, out: Path, size: LoopSize, seed: int, place: str, policies: PolicySize) -> None:
        super().__init__(out, size, seed, place)
        self.policies = policies

    def made_by(self, folder: str) -> str:
        """Name of the unit that makes a folder: trainings leave one folder for each share of the budget."""
        path = Path(folder)
        return str(path.parent) if path.name in SHARES else folder

    # --- the held-out judge -----------------------------------------------------------------------------------

    def held_out(self) -> list[Unit]:
        """The held-out judge, and how well it and the judge itself order generated clips."""
        count, steps = max(2, self.size.samples // 2), self.size.generated
        videos, rated = f"{PLACE}/held/samples", f"{PLACE}/held/rated"
        settings = {
            "seed_everything": OTHER_SEED + self.seed,
            "data.init_args.seed": OTHER_SEED + self.seed,
            "trainer.max_steps": steps,
            "trainer.val_check_interval": max(1, steps // 2),
            "model.init_args.network.init_args.backbone": self.folder / "backbone",
            "data.init_args.train": self.folder / rated / "train",
            "data.init_args.val": self.folder / rated / "val",
            "data.init_args.augment": json.dumps(_SYMMETRIES),
            "data.init_args.benchmarks": {},
        }
        needs = ("samples/benchmark", "oracle.json")
        return [
            self.sampling(videos, "sampling videos: for the held-out judge", 0.6 * count, "prompts.txt", count, 11),
            self.unit(
                rated,
                "other annotators rate pairs of these",
                5,
                (videos, "oracle.json", "world"),
                self.rate_others,
                videos,
                rated,
            ),
            self.training(
                HELD_FOLDER,
                "training the held-out judge",
                0.4 * steps,
                ("backbone", rated),
                ("reward_btt",),
                settings,
            ),
            *(
                self.benchmarking(
                    f"{PLACE}/bench/{name}",
                    model,
                    ("generated",),
                    f"benchmarking {name} judge",
                    4,
                    (*needs, "generated"),
                )
                for name, model in BENCHED.items()
            ),
        ]

    def rate_others(self, videos: str, result: str) -> None:
        """Let other annotators rate pairs of other videos, and shuffle half as many rendered pairs in.

        Args:
            videos: Set of videos.
            result: Folder of the pairs.
        """
        samples, rendered = ShardSet(self.folder / videos), ShardSet(self.folder / "world/train")
        oracle, count = Oracle.load(self.folder / "oracle.json"), self.size.rated
        with new_folder(self.folder / result) as out:
            rate_pairs(samples, oracle, out, count, HELD_OUT, rendered, count // 2, OTHER_SEED + self.seed)

    # --- algorithms -------------------------------------------------------------------------------------------

    def trained(self, result: str, name: str, values: Values, shares: Mapping[str, float] = SHARES) -> Unit:
        """A unit that trains an algorithm and leaves its adapters at shares of the budget.

        Args:
            result: Folder of the trained models, one folder for each share.
            name: Name of the algorithm.
            values: Its learning rate.
            shares: Shares at which adapters are left; the training ends at the largest.
        """
        recipe, steps = RECIPES[name], steps_of(name, self.policies, self.size.fresh)
        at = {share: steps[share] for share in shares}
        callback = {"class_path": "videoalign.miniature.study.step_exports.ExportAtSteps", "init_args": {"at": at}}
        settings = {
            "trainer.max_steps": max(at.values()),
            "trainer.callbacks": json.dumps([callback]),
            "model.init_args.generator": self.folder / "generator",
            "model.init_args.optimizer.init_args.lr": values["lr"],
            **(self._grouped() if recipe.on_policy else self._paired(name)),
        }
        needs, text = self._needs(name, recipe), f"training {recipe.text}: {Path(result).name}"
        return self.training(result, text, self._seconds(name, recipe), needs, recipe.experiments, settings)

    def _grouped(self) -> Settings:
        """Settings of an on-policy training."""
        judge = {"model": str(self.folder / "reward"), "fps": 8, "batch_size": 32}
        scores = {"class_path": "videoalign.datamodules.video_scores.VideoRewardScores", "init_args": judge}
        return {
            "model.init_args.rewards": json.dumps({"judge": scores}),
            "data.init_args.prompts": self.folder / "world/prompts.txt",
            "data.init_args.groups": self.policies.groups,
            "data.init_args.samples": self.policies.samples,
        }

    def _paired(self, name: str) -> Settings:
        """Settings of a training on the base's samples."""
        latents = {
            "data.init_args.train": self.folder / "latents/preferred",
            "data.init_args.batch_size": self.policies.batch,
        }
        rewards = {"prfl": REWARD, "draft": "reward"}
        return latents | ({"model.init_args.reward": self.folder / rewards[name]} if name in rewards else {})

    @staticmethod
    def _needs(name: str, recipe: Recipe) -> tuple[str, ...]:
        if recipe.on_policy:
            return "generator", "reward", "world"
        return "generator", "latents/preferred", *{"prfl": (REWARD,), "draft": ("reward",)}.get(name, ())

    def _seconds(self, name: str, recipe: Recipe) -> float:
        """Seconds on one core: 1.5 ms an evaluation, and what decoding, rating and their gradients take."""
        whole = steps_of(name, self.policies, self.size.fresh)["full"]
        videos = whole * self.policies.groups * self.policies.samples if recipe.on_policy else 0
        videos += 4 * whole * self.policies.batch if name == "draft" else 0
        return 4 + 0.0015 * spent(name, self.policies, self.size.fresh)["full"] + 0.025 * videos

    def algorithms(self, tuned: Mapping[str, Values]) -> list[Unit]:
        """Every algorithm with its chosen settings, and the comparisons at each share of the budget.

        Args:
            tuned: Chosen settings by name.
        """
        units = [self.trained(f"{PLACE}/{name}", name, tuned[name]) for name in RECIPES]
        for share in SHARES:
            compared = {name: self._arm(f"{PLACE}/{name}/{share}", recipe) for name, recipe in RECIPES.items()}
            compared |= arms(self.policies, share, tuned)
            if share == "full":  # the base in the noisy reward's view
                compared = {PLAIN: Arm(noisy_reward=REWARD), **compared}
            units += self._compared(
                f"{PLACE}/compared/{share}", f"at the {share} budget", compared, {HELD: HELD_FOLDER}
            )
        return units

    @staticmethod
    def _arm(lora: str, recipe: Recipe) -> Arm:
        return Arm(lora=lora, noisy_reward=REWARD if recipe.own in OF_POOL[1:] else None)

    def _compared(self, name: str, text: str, compared: Mapping[str, Arm], held_out: Any = None) -> list[Unit]:
        units = self.comparison(name, text, compared, samples=self.policies.noises, held_out=held_out)
        return [replace(unit, cost=self._sampling_seconds(compared.get(Path(unit.name).name), unit)) for unit in units]

    def _sampling_seconds(self, arm: Arm | None, unit: Unit) -> float:
        """Seconds on one core of a comparison's unit: for a video 1.5 ms an evaluation, and 30 ms for the rest."""
        if unit.name.endswith(".json"):
            return 2 * unit.cost
        count = arm.search.candidates if arm and arm.search else 1
        guided = 1.75 if arm and arm.guide else 1.0
        return 2 + JUDGED_PROMPTS * self.policies.noises * (0.03 + 0.0015 * GUIDED * STEPS * count * guided)

    def tuning(self) -> list[Unit]:
        """Units that try settings at the whole budget, and compare them; no held-out judge is there."""
        units, compared = [], {}
        for name, recipe in RECIPES.items():
            for number, rate in enumerate(recipe.rates):
                result = f"{PLACE}/trials/{name}-{number}"
                units.append(self.trained(result, name, {"lr": rate}, {"full": 1.0}))
                compared[f"{name}-{number}"] = Arm(lora=f"{result}/full")
        for name, tried in trials(self.policies).items():
            compared |= {f"{name}-{number}": arm for number, (_, arm) in enumerate(tried)}
        return [*units, *self._compared(f"{PLACE}/trials/compared", "choosing settings", compared)]
