"""`videoalign paper`: the paper's findings in the miniature world, over seeds, with intervals and verdicts.

Every seed is a closed loop of its own (:mod:`.pipeline`), from which the cells of the paper's tables start:

    (a) losses and tokens of the reward model           (Table 6)
    (b) accuracy over the share of pairs                (Figure 2)
    (c) rewards and foreign prompts                     (section 3.2)
    (d) SFT, Flow-RWR and Flow-DPO                      (Table 3)
    (e) text alignment alone                            (Table 4)
    (f) sweep of beta                                   (Figure 6)
    (g) Flow-NRG: weights, strengths, clean rewards     (Table 5)
    (h) adapters against full training                  (section 5.2)
    (i) conditions under which the order of (d) holds
    (k) what keeps the judge from seeing motion
    (l) raters with a bias                              (Table 6)
    (m) the judge on the output of (d) and (g)

Settings are chosen on seeds that are not reported, in rounds (:mod:`.tuning`). What needs no chosen setting is done
beside these rounds, so that no process waits for them.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from ... import VideoAlignError
from ...commands.arms import Arm, Sweep
from ...commands.reward_judge import RewardJudge
from ...datamodules.judgements import Weights
from ...datamodules.shards import ShardSet, ShardWriter
from ...models.dimensions import DIMENSIONS
from ...models.files import read_json, write_json
from ...models.guidance import Guidance
from .configured import Settings
from .judge_cells import STUDIED, JudgeCells, causes_done
from .judge_tables import cause_tables
from .loop_size import STUDY, LoopSize, begin
from .paper_claims import BETAS, GUIDES, POOLS, SHARES, STRENGTHS
from .paper_page import earlier, write_page
from .pipeline import BENCHMARKS
from .rater_cells import RaterCells
from .seed_units import EQUAL
from .tuning import ALGORITHMS, Tuned, arm_of, choose, choosing, planned
from .tuning_rounds import TRIED, TUNED, TUNING_SEEDS, reported, tuning_place
from .units import Unit
from .whole_study import whole_study
from .workers import work

NOISES = 32
"""Noises per prompt in every comparison of a cell. Eight prompts make 256 judged videos, whose noise in a share of wins
is at most sqrt((1 + 1) / 12 / 256) = .026; seeds of an earlier study, with half as many, differed by .03 to .06.
RESULTS.md splits the variance, and says how many videos decide most for the same time."""
SHARED = ("reg", "bt", "btt")
"""Losses at one shared token (rows I to III of Table 6). Row IV, separate tokens, is the loop's own model."""
TA_ONLY = Weights(VQ=0.0, MQ=0.0, TA=1.0)
SWEEP_RATE = 2.5e-4
"""Learning rate of the sweep of beta."""


class Pool(NamedTuple):
    """Pairs of cell (i), which differ from the loop's own in one respect."""

    samples: str
    """Set of videos."""
    judge: str = "reward"
    """Reward model that labels them."""
    mode: str = "margin"
    """Which pairs of a prompt's videos."""
    margin: float = 0.3
    """Least difference of the rewards, in deviations."""


ORIGINS = {
    "guided": Pool("pools/guided"),
    "rendered": Pool("pools/rendered"),
    "many": Pool("pools/many", margin=1.5),
    "best": Pool("pools/many", mode="best-worst", margin=0.0),
    "two": Pool("pools/two", mode="best-worst", margin=0.0),
    "weak": Pool("samples/fresh", judge="rm/bt-1"),
}
"""The pools of :data:`.paper_claims.POOLS`."""


class Paper(Tuned, JudgeCells, RaterCells):
    """The units of one seed's cells.

    It takes the arguments of :class:`.steps.Steps`.
    """

    def cells(self) -> list[Unit]:
        """All cells of one seed."""
        return [
            *self.base(),
            *self.reward_cells(),
            *self.generator_cells(),
            *self.conditions(),
            *self.output_cell(),
            *self.rater_cells(),
        ]

    # --- reward models ----------------------------------------------------------------------------------------

    def reward_cells(self) -> list[Unit]:
        """Cells (a), (b) and (c)."""
        trained = self._reward_models()
        sets, units = [f"world/{name}" for name in BENCHMARKS], [*trained]
        for unit in trained:
            name = unit.name.removeprefix(self.place)
            units.append(self.benchmarking(f"bench/{name.removeprefix('rm/')}", name, sets, f"benchmarking {name}"))
        needs = ("reward_rendered", "rm/btt", "world")
        return [*units, self.unit("cells/prompts.json", "do rewards change with the prompt?", 10, needs, self._prompts)]

    def _reward_models(self) -> list[Unit]:
        """Reward models at one shared token: all losses on all pairs, two losses on shares of them."""
        size, units = self.size, []

        def add(name: str, text: str, loss: str, steps: int, settings: Settings) -> None:
            common = {
                "model.init_args.network.init_args.template": "plain_shared",
                "model.init_args.loss": loss,
                "trainer.val_check_interval": steps,
            }
            units.append(self.reward_model(f"rm/{name}", f"training a reward model: {text}", {**common, **settings}))

        for loss in SHARED:
            add(loss, f"{loss}, shared token", loss, size.reward, {})
        for share, loss in itertools.product(SHARES, ("reg", "bt")):
            # fewer pairs are learnt in fewer steps, but not in proportion: steps per pair rise as pairs fall
            steps, batch = math.ceil(size.reward * share**0.3), max(1, min(24, int(share * size.world.train)))
            settings = {
                "trainer.max_steps": steps,
                "data.init_args.train_share": share,
                "data.init_args.batch_size": batch,
            }
            add(f"{loss}-{100 * share:g}", f"{loss}, {share:.0%} of the pairs", loss, steps, settings)
        return units

    def _prompts(self) -> None:
        """Measure for cell (c) how far rewards move, in deviations, when a video has another video's prompt."""
        place = self.folder / "cells"
        shards = ShardSet(self.folder / "world/recent")
        contents = list(shards.contents())[:128]
        prompts = [content.record["prompt"] for content in contents]
        foreign = [next(p for p in prompts[i:] + prompts[:i] if p != own) for i, own in enumerate(prompts)]
        sets = {}
        for name, texts in (("own", prompts), ("foreign", foreign)):
            sets[name] = place / f"prompts_{name}"
            if not sets[name].exists():
                with ShardWriter(sets[name], "videos") as writer:
                    for content, text in zip(contents, texts):
                        writer.write(content.key, {"": content.read("mp4")}, {**content.record, "prompt": text})
        found = {}
        for name, model in (("separate", "reward_rendered"), ("shared", "rm/btt")):
            judge = RewardJudge(model=str(self.folder / model), batch_size=48, device="cpu")
            keys = [content.key for content in contents]
            raw = [
                judge.score_set(ShardSet(path), keys, place / f"prompts_{name}_{which}") for which, path in sets.items()
            ]
            moved = (raw[0] - raw[1]).abs().mean(0) / raw[0].std(0)
            found[name] = dict(zip(DIMENSIONS, moved.tolist()))
        write_json(place / "prompts.json", found)

    # --- generators -------------------------------------------------------------------------------------------

    def generator_cells(self) -> list[Unit]:
        """Cells (d) to (h)."""
        units = [self.trained(f"aligned/{name}", name, "preferred") for name in ALGORITHMS]
        units.append(self.trained("aligned/control", "sft", "fresh"))
        aligned = {name: arm_of(f"aligned/{name}", name) for name in ("control", *ALGORITHMS)}

        labels = "the reward model labels pairs by text alignment alone"
        units.append(self.labelling("preferred_ta", labels, "samples/fresh", weights=TA_ONLY))
        units.append(self.encoding("preferred_ta", "preferred_ta"))
        ta = {"data.init_args.weights": asdict(TA_ONLY)}
        alone = [name for name in ALGORITHMS if not name.endswith("-full")]
        units += [self.trained(f"TA/{name}", name, "preferred_ta", settings=ta) for name in alone]

        betas = {}
        for (name, algorithm), beta in itertools.product((("constant", "dpo"), ("time", "dpo-time")), BETAS):
            result = f"beta/{name}-{beta:g}"
            betas[f"{name}-{beta:g}"] = Arm(lora=result)
            # one learning rate for both: only the schedule differs
            units.append(self.trained(result, algorithm, "preferred_ta", {"lr": SWEEP_RATE, "beta": beta}, ta))

        clean = {"model.init_args.clean": True}
        units.append(self.noisy_reward("clean_reward", "training a reward on clean latents", clean))
        sweeps = {
            name: Sweep(noisy_reward=reward, strengths=self._strengths(), guide=Guidance(weights=weights))
            for name, (reward, weights) in GUIDES.items()
        }
        for name, arms, swept in (
            ("aligned", aligned, {}),
            ("ta", {name: Arm(lora=f"TA/{name}") for name in alone}, {}),
            ("beta", betas, {}),
            ("nrg", {}, sweeps),
        ):
            units += self.comparison(f"cells/{name}", f"cell {name}", arms, swept, samples=NOISES)
        units[-1] = replace(units[-1], needs=(*units[-1].needs, TUNED))  # which strengths are judged
        return units

    def _strengths(self) -> list[float]:
        """Strengths of guidance: the common ones, and the one that tuning chose when it is known."""
        tuned = self.out / TUNED
        chosen = [read_json(tuned, "settings")["nrg"]["strength"]] if tuned.exists() else []
        return sorted({*STRENGTHS, *chosen})

    # --- conditions -------------------------------------------------------------------------------------------

    def conditions(self) -> list[Unit]:
        """Cell (i): pairs of other origins, and another judge."""
        size, arms = self.size, {}
        units = [
            self.sampling("pools/guided", "sampling videos with guidance", 8, "prompts.txt", size.fresh, 3, 2.0),
            self.sampling("pools/many", "sampling many videos", 20, "prompts.txt", 3 * size.fresh, 4),
            self.sampling("pools/two", "sampling two videos of each prompt", 3, "prompts.txt", 2, 5),
            self.unit("pools/rendered", "choosing rendered clips", 2, ("world",), self._rendered_pool),
        ]
        for name, pool in ORIGINS.items():
            pairs, text = f"pairs/{name}", f"labelling: {POOLS[name]}"
            units.append(self.labelling(pairs, text, pool.samples, pool.mode, EQUAL, pool.margin, pool.judge, cost=6))
            units.append(self.encoding(name, pairs))
            runs = [(algorithm, algorithm, name) for algorithm in ("sft", "rwr", "dpo")]
            if name in ("guided", "rendered"):  # no other unit trains on all of these samples
                units.append(self.encoding(f"all_{name}", pool.samples, text=f"all {name}", cost=6))
                runs.insert(0, ("control", "sft", f"all_{name}"))
            for arm, algorithm, latents in runs:
                units.append(self.trained(f"conditions/{name}-{arm}", algorithm, latents))
                arms[f"{name}-{arm}"] = Arm(lora=f"conditions/{name}-{arm}")
        return [*units, *self.comparison("cells/conditions", "cell conditions", arms, samples=NOISES)]

    def _rendered_pool(self) -> None:
        """Take as many rendered clips per prompt as samples are drawn."""
        left: dict[str, int] = {}
        with ShardWriter(self.folder / "pools/rendered", "videos") as writer:
            for content in ShardSet(self.folder / "world/clips").contents():
                prompt = content.record["prompt"]
                left[prompt] = left.get(prompt, self.size.fresh) - 1
                if left[prompt] >= 0:
                    kept = {key: value for key, value in content.record.items() if key != "quality"}
                    writer.write(content.key, {"": content.read("mp4")}, kept)


def units(out: Path, size: LoopSize, seeds: Iterable[int]) -> list[Unit]:
    """All units that can be planned by now: while settings are not chosen, none that needs them.

    Args:
        out: Folder of all results.
        size: How much is trained and sampled.
        seeds: The seeds.
    """
    plan = planned(out)
    studied = [Paper(out, size, seed, tuning_place(seed)) for seed in TUNING_SEEDS]
    causes = [unit for one in studied for unit in one.cause_cells()]
    made = [*(unit for one in studied for unit in one.tuning(plan.rounds)), *causes, causes_done(out, causes)]
    cells = [unit for seed in seeds for unit in Paper(out, size, seed, f"seed{seed}").cells()]
    if (out / TUNED).exists():
        return [*made, choosing(out, plan), *cells]
    waiting = {TUNED}
    while more := {unit.name for unit in cells if unit.name not in waiting and waiting & {*unit.needs}}:
        waiting |= more
    return [*made, *(unit for unit in cells if unit.name not in waiting)]


def _tune(out: Path, size: LoopSize, seeds: Iterable[int], processes: int, threads: int) -> None:
    """Do rounds of tuning until the settings are chosen.

    Raises:
        VideoAlignError: Where a round failed; what else failed is tried again with the cells.
    """
    while not (out / TUNED).exists():
        plan = planned(out)
        if plan.whole:
            choose(out)
            return
        print(f"tuning: round {len(plan.rounds)}, beside everything that needs no chosen setting", flush=True)
        try:
            work(out, units(out, size, seeds), processes, threads)
        except VideoAlignError:
            if planned(out) == plan:
                raise


def paper(
    out: str | Path, seeds: int = 5, first: int = 0, processes: int | None = None, size: LoopSize | None = None
) -> dict[str, Any]:
    """Reproduce the paper's findings; write ``OUT/RESULTS.md``, its figures and the numbers behind them.

    Args:
        out: Folder of all results; several machines that see it may be called at once, and each takes what is left.
            Seeds of another folder join the page where its ``docs/results/results.json`` was copied to the same place.
        seeds: Number of seeds; a later call with more adds the missing ones.
        first: The first seed.
        processes: Number of processes that work at once on this machine; one per core if not given.
        size: How much is trained and sampled; :data:`.loop_size.STUDY` if not given.

    Returns:
        The numbers that are saved as ``OUT/docs/results/results.json``.

    Raises:
        VideoAlignError: Where units failed; the page shows what there is all the same.
    """
    out, size = Path(out).resolve(), size or STUDY
    chosen = reported(seeds, first)
    begin(out, asdict(size))
    known = earlier(out, size)
    if cause_tables(known.get("tuning seeds", {})) and not (out / STUDIED).exists():
        write_json(out / STUDIED, known["tuning seeds"])

    def do(processes: int, threads: int) -> None:
        _tune(out, size, chosen, processes, threads)
        work(out, units(out, size, chosen), processes, threads)

    settings = {"trials": TRIED, "tuned": TUNED}
    return whole_study(out, known, settings, processes, do, lambda: write_page(out, chosen, size))
