"""`videoalign paper`: the paper's findings in the miniature world, over seeds, with intervals and verdicts.

Every seed is a closed loop of its own (:mod:`.loop`), on which the cells of the paper's tables stand:

    (a) losses and tokens of the reward model     (Table 6)      (f) sweep of beta                  (Figure 6)
    (b) accuracy over the share of pairs          (Figure 2)     (g) Flow-NRG: weights, strengths, clean rewards (Table 5)
    (c) rewards and foreign prompts               (section 3.2)  (h) adapters against full training (section 5.2)
    (d) SFT, Flow-RWR and Flow-DPO                (Table 3)      (i) conditions under which their order holds
    (e) text alignment alone                      (Table 4)

Learning rates, betas and the strength of guidance are chosen on a seed of their own, which is not reported: the same
number of trials for each, by what the reward model prefers, as nobody outside of this world has an oracle.
"""

import contextlib
import itertools
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from ... import VideoAlignError
from ...commands.arms import Arm, Sweep
from ...commands.reward_judge import RewardJudge
from ...datamodules.latents import Weights
from ...datamodules.shards import ShardSet, ShardWriter
from ...models.dimensions import DIMENSIONS, OVERALL
from ...models.files import read_json, write_json
from ...models.guidance import Guidance
from .paper_claims import BETAS, GUIDES, POOLS, SHARES, STRENGTHS, TRIALS
from .paper_page import earlier, write_page
from .pipeline import ALIGNED, BENCHMARKS, Loop, LoopSize, begin
from .units import Unit, work

TUNING, TUNING_SEED = "tuning", 1000
"""The seed that settings are chosen on, and its folder."""
SHARED = ("reg", "bt", "btt")
"""Losses at one shared token (rows I to III of Table 6). Row IV, separate tokens, is the loop's own model."""
TA_ONLY = Weights(VQ=0.0, MQ=0.0, TA=1.0)
SWEEP_RATE = 2.5e-4
"""Learning rate of the sweep of beta."""
NOISES = 16
"""Per prompt in every comparison."""

_WHOLE = "[{class_path: videoalign.callbacks.ExportGenerator, init_args: {pipeline: true}}]"
"""Full training exports a pipeline, not adapters."""


class Paper(Loop):
    """The units of one seed's cells.

    Args: see :class:`.loop.Loop`.
    """

    # --- settings that were tuned -------------------------------------------------------------------------------

    def tuned(
        self, result: str, algorithm: str, latents: str, settings: dict[str, float] | None = None, **more: Any
    ) -> None:
        """Train an algorithm on a set of latents, as tuning chose it or with given settings."""
        name = algorithm.removesuffix("-full")
        chosen = {
            **(
                read_json(self.out / TUNING / "tuned.json", "a folder of the paper's cells")[algorithm]
                if settings is None or "lr" not in settings
                else {}
            ),
            **(settings or {}),
        }
        given = {"model__init_args__optimizer__init_args__lr": chosen["lr"], **more}
        if "beta" in chosen:
            given["model__init_args__beta__init_args__beta"] = chosen["beta"]
        if algorithm != name:
            given |= {"model__init_args__lora": "null", "trainer__callbacks": _WHOLE}
        self.align(result, ALIGNED[name][0], latents, **given)

    def trained(
        self, result: str, algorithm: str, latents: str, settings: dict[str, float] | None = None, **more: Any
    ) -> Unit:
        """A unit of :meth:`tuned`."""
        fixed = bool(settings and "lr" in settings)
        made = self.unit(
            result,
            f"training {result}",
            0.25 * self.size.align,
            ("generator", f"latents/{latents}"),
            self.tuned,
            result,
            algorithm,
            latents,
            settings,
            **more,
        )
        return made if fixed else replace(made, needs=(*made.needs, f"{TUNING}/tuned.json"))

    def tuning(self) -> list[Unit]:
        """What decides the settings: every trial of every algorithm, compared on this seed's unseen prompts."""
        units, arms = [*self.base(whole=False)], {}
        for algorithm, trials in TRIALS.items():
            for number, settings in enumerate(trials):
                name = f"trials/{algorithm}-{number}"
                units.append(self.trained(name, algorithm, "preferred", settings))
                arms[f"{algorithm}-{number}"] = _arm(name, algorithm)
        # as many trials as the others have
        sweeps = {
            "nrg": Sweep(noisy_reward=GUIDES["even"][0], strengths=STRENGTHS, guide=Guidance(weights=GUIDES["even"][1]))
        }
        units += self.comparison("cells/trials", "choosing settings", arms, sweeps, samples=NOISES)
        return [
            *units,
            self.unit("tuned.json", "choosing settings", 1, ("cells/trials/comparison.json",), self._choose),
        ]

    def _choose(self) -> None:
        """Of each algorithm the trial that the reward model prefers most often to the base, at other noise."""
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

    # --- cells --------------------------------------------------------------------------------------------------

    def cells(self) -> list[Unit]:
        """All cells of one seed."""
        return [*self.base(), *self.reward_cells(), *self.generator_cells(), *self.conditions()]

    def reward_cells(self) -> list[Unit]:
        """(a), (b) and (c)."""
        units, size = [], self.size
        shared = {"model__init_args__network__init_args__template": "plain_shared", "data__init_args__benchmarks": {}}
        sets = [f"world/{name}" for name in BENCHMARKS]
        for loss in SHARED:
            units.append(
                self.reward_model(
                    f"rm/{loss}",
                    f"training a reward model: {loss}, shared token",
                    **shared,
                    model__init_args__loss=loss,
                    trainer__val_check_interval=size.reward,
                )
            )
        for share, loss in itertools.product(SHARES, ("reg", "bt")):
            # fewer pairs are learnt in fewer steps, though not in as few: steps per pair rise as pairs fall
            steps, batch = math.ceil(size.reward * share**0.3), max(1, min(24, int(share * size.world.train)))
            units.append(
                self.reward_model(
                    f"rm/{loss}-{100 * share:g}",
                    f"training a reward model: {loss}, {share:.0%} of the pairs",
                    **shared,
                    model__init_args__loss=loss,
                    trainer__max_steps=steps,
                    trainer__val_check_interval=steps,
                    data__init_args__train_share=share,
                    data__init_args__batch_size=batch,
                )
            )
        for unit in list(units):
            name = unit.name.removeprefix(self.place)
            result = f"bench/{name.removeprefix('rm/')}"
            units.append(self.unit(result, f"benchmarking {name}", 8, (name, "world"), self.bench, result, name, sets))
        needs = ("reward_rendered", "rm/btt", "world")
        return [*units, self.unit("cells/prompts.json", "do rewards change with the prompt?", 10, needs, self._prompts)]

    def _prompts(self) -> None:
        """(c): how far rewards of the same videos move when another video's prompt stands beside them, in deviations."""
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

    def generator_cells(self) -> list[Unit]:
        """(d) to (h)."""
        ta, text = {"data__init_args__weights": asdict(TA_ONLY)}, "TA"
        units = [self.trained(f"aligned/{name}", name, "preferred") for name in TRIALS]
        units.append(self.trained("aligned/control", "sft", "fresh"))
        units.append(
            self.unit(
                "preferred_ta",
                "the reward model labels pairs by text alignment alone",
                5,
                ("reward", "samples/fresh"),
                self.prefer,
                "preferred_ta",
                "samples/fresh",
                "margin",
                TA_ONLY,
                0.3,
            )
        )
        units.append(
            self.unit(
                "latents/preferred_ta",
                "encoding: preferred_ta",
                7,
                ("preferred_ta", "generator"),
                self.encode,
                "latents/preferred_ta",
                "preferred_ta",
            )
        )
        alone = [name for name in TRIALS if not name.endswith("-full")]
        units += [self.trained(f"{text}/{name}", name, "preferred_ta", **ta) for name in alone]
        betas = {}
        for (name, algorithm), beta in itertools.product((("constant", "dpo"), ("time", "dpo-time")), BETAS):
            betas[f"{name}-{beta:g}"] = Arm(lora=f"beta/{name}-{beta:g}")
            # one learning rate for both: only the schedule differs
            units.append(
                self.trained(f"beta/{name}-{beta:g}", algorithm, "preferred_ta", {"lr": SWEEP_RATE, "beta": beta}, **ta)
            )
        units.append(
            self.noisy_reward("clean_reward", "training a reward on clean latents", model__init_args__clean=True)
        )
        aligned = {name: _arm(f"aligned/{name}", name) for name in ("control", *TRIALS)}
        sweeps = {
            name: Sweep(noisy_reward=reward, strengths=STRENGTHS, guide=Guidance(weights=weights))
            for name, (reward, weights) in GUIDES.items()
        }
        for name, arms, more in (
            ("aligned", aligned, {}),
            ("ta", {n: Arm(lora=f"{text}/{n}") for n in alone}, {}),
            ("beta", betas, {}),
            ("nrg", {}, sweeps),
        ):
            units += self.comparison(f"cells/{name}", f"cell {name}", arms, more, samples=NOISES)
        return units

    def conditions(self) -> list[Unit]:
        """(i): pairs of other origins, and another judge."""
        size, unit, units, arms = self.size, self.unit, [], {}
        pools = {  # samples, judge, which pairs of them
            "guided": ("pools/guided", "reward", "margin", 0.3),
            "rendered": ("pools/rendered", "reward", "margin", 0.3),
            "many": ("pools/many", "reward", "margin", 1.5),
            "best": ("pools/many", "reward", "best-worst", 0.0),
            "two": ("pools/two", "reward", "best-worst", 0.0),
            "weak": ("samples/fresh", "rm/bt-1", "margin", 0.3),
        }
        units.append(
            unit(
                "pools/guided",
                "sampling videos with guidance",
                8,
                ("generator", "world"),
                self.sample,
                "pools/guided",
                "prompts.txt",
                size.fresh,
                3,
                2.0,
            )
        )
        units.append(
            unit(
                "pools/many",
                "sampling many videos",
                20,
                ("generator", "world"),
                self.sample,
                "pools/many",
                "prompts.txt",
                3 * size.fresh,
                4,
            )
        )
        units.append(
            unit(
                "pools/two",
                "sampling two videos of each prompt",
                3,
                ("generator", "world"),
                self.sample,
                "pools/two",
                "prompts.txt",
                2,
                5,
            )
        )
        units.append(unit("pools/rendered", "choosing rendered clips", 2, ("world",), self._rendered_pool))
        for name, (data, judge, mode, margin) in pools.items():
            units.append(
                unit(
                    f"pairs/{name}",
                    f"labelling: {POOLS[name]}",
                    6,
                    (judge, data),
                    self.prefer,
                    f"pairs/{name}",
                    data,
                    mode,
                    Weights(),
                    margin,
                    judge,
                )
            )
            units.append(
                unit(
                    f"latents/{name}",
                    f"encoding: {name}",
                    7,
                    (f"pairs/{name}", "generator"),
                    self.encode,
                    f"latents/{name}",
                    f"pairs/{name}",
                )
            )
            if name in ("guided", "rendered"):  # of these no unselected samples were trained on yet
                units.append(
                    unit(
                        f"latents/all_{name}",
                        f"encoding: all {name}",
                        6,
                        (data, "generator"),
                        self.encode,
                        f"latents/all_{name}",
                        data,
                    )
                )
                units.append(self.trained(f"conditions/{name}-control", "sft", f"all_{name}"))
                arms[f"{name}-control"] = Arm(lora=f"conditions/{name}-control")
            for algorithm in ("sft", "rwr", "dpo"):
                units.append(self.trained(f"conditions/{name}-{algorithm}", algorithm, name))
                arms[f"{name}-{algorithm}"] = Arm(lora=f"conditions/{name}-{algorithm}")
        return [*units, *self.comparison("cells/conditions", "cell conditions", arms, samples=NOISES)]

    def _rendered_pool(self) -> None:
        """As many rendered clips per prompt as samples are drawn."""
        left: dict[str, int] = {}
        with ShardWriter(self.folder / "pools/rendered", "videos") as writer:
            for content in ShardSet(self.folder / "world/clips").contents():
                prompt = content.record["prompt"]
                left[prompt] = left.get(prompt, self.size.fresh) - 1
                if left[prompt] >= 0:
                    kept = {key: value for key, value in content.record.items() if key != "quality"}
                    writer.write(content.key, {"": content.read("mp4")}, kept)


def _arm(name: str, algorithm: str) -> Arm:
    """Adapters, or a transformer of its own."""
    return Arm(generator=name) if algorithm.endswith("-full") else Arm(lora=name)


def units(out: Path, size: LoopSize, seeds: Iterable[int]) -> list[Unit]:
    """All cells of all seeds, and what tunes them."""
    made = Paper(out, size, TUNING_SEED, TUNING).tuning()
    for seed in seeds:
        made += Paper(out, size, seed, f"seed{seed}").cells()
    return made


def paper(
    out: str | Path, seeds: int = 5, first: int = 0, processes: int | None = None, size: LoopSize | None = None
) -> dict[str, Any]:
    """Reproduce the paper's findings; write ``OUT/RESULTS.md``, its figures and the numbers behind them.

    Args:
        out: folder of all results; several machines that see it may be called at once, each takes what is left. Seeds that
            another folder's ``docs/results/results.json`` holds join the page where that file was copied to the same place.
        seeds: how many. first: the first of them. A later call with more adds the missing ones.
        processes: that work at once on this machine. size: how much is trained and sampled.

    Returns:
        What is saved as ``OUT/docs/results/results.json``.
    """
    out, size = Path(out).resolve(), size or LoopSize()
    chosen = range(first, first + seeds)
    if seeds < 1 or first < 0 or TUNING_SEED in chosen:
        raise VideoAlignError(
            f"--seeds must be at least 1, --first not negative, and seed {TUNING_SEED} is for tuning; got {seeds} from {first} on"
        )
    begin(out, asdict(size))
    if (known := earlier(out, size)).get("tuned") and not (out / TUNING / "tuned.json").exists():
        write_json(out / TUNING / "tuned.json", known["tuned"])  # all seeds share the settings
    cores = os.cpu_count() or 1
    processes = processes or cores
    try:
        work(out, partial(units, out, size, chosen), processes, max(1, cores // processes))
    except VideoAlignError:
        with contextlib.suppress(VideoAlignError):  # what is there is shown all the same
            write_page(out, chosen, size)
        raise
    return write_page(out, chosen, size)
