"""Cells about the judge itself: what keeps it from seeing motion (k), and how well it judges aligned generators (m).

Cell (k) runs on the seeds that settings are chosen on, because it looks at no claim. Each of its judges is trained as
the loop's own is (the unit ``reward``), but for one respect, and measured on pairs of generated clips of unseen
prompts. Its cost is that of sampling a pool (1 minute a seed) and of one training for each number of clips and each
cause. Cell (m) trains and samples nothing: it takes the clips and the rewards of cells (d) and (g).
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

from ...commands.judge import ratings_of
from ...commands.reward_judge import RewardJudge
from ...datamodules.shards import ShardSet
from ...models.files import new_folder, read_json, write_json
from ..world.oracle import Oracle, OracleJudge
from ..world.output_accuracy import output_accuracy
from ..world.rated_samples import rate_pairs
from .configured import Settings
from .judge_causes import CAUSES, CLIPS_OF_PROMPT, PAIRS, STEPS, Cause
from .judge_claims import GUIDED
from .paper_findings import findings
from .pipeline import Loop
from .steps import HELD_OUT
from .tuning_rounds import TUNED, TUNING, TUNING_SEEDS
from .units import Unit

STUDIED = f"{TUNING}/causes.json"
"""Findings of the tuning seeds once cell (k) is done on all of them; while it is there, they are not needed for (k)."""


class JudgeCells(Loop):
    """The units of both cells.

    It takes the arguments of :class:`.steps.Steps`.
    """

    # --- what keeps the judge from seeing motion --------------------------------------------------------------------

    def cause_cells(self) -> list[Unit]:
        """Cell (k), and what it needs beside the units of tuning."""
        spare = ("samples/benchmark", "generated", "bench_reward")
        units = [unit for unit in self.base() if unit.name.removeprefix(self.place) in spare]
        cost = 0.025 * 24 * CLIPS_OF_PROMPT[-1]
        units.append(self.sampling("samples/pool", "sampling a pool", cost, "prompts.txt", CLIPS_OF_PROMPT[-1], 6))
        count, steps = min(PAIRS, self.size.rated), min(STEPS, self.size.generated)
        alike = {"trainer.max_steps": steps, "trainer.val_check_interval": steps}
        for clips in CLIPS_OF_PROMPT:
            name, text = f"clips-{clips}", f"{count} ratings of {clips} clips of each prompt"
            units.append(self._rating(name, text, "samples/pool", count, clips, count))
            units += self._judge(name, text, alike, own_pairs=True)
        for name, cause in CAUSES.items():
            if cause.own_pairs:
                rendered = self.size.rated // 2 * cause.rendered
                units.append(self._rating(name, cause.text, "samples/rated", self.size.rated, cause.clips, rendered))
            if cause.own_backbone:
                units += self._taught(name, cause)
            units += self._judge(name, cause.text, cause.settings, cause.own_pairs, cause.own_backbone)
        return units

    def _taught(self, name: str, cause: Cause) -> list[Unit]:
        """A backbone of its own, and a reward model of rendered pairs that starts from it."""
        place, random = f"judges/{name}-backbone", f"judges/{name}-random"
        captions, pairs = {**cause.captions}, {"trainer.val_check_interval": self.size.reward}
        if cause.patch is None:
            made = []
        else:  # frames that were decoded once are in multiples of the loop's own patches
            captions |= {
                "model.init_args.backbone": self.folder / random,
                "data.init_args.data": self.folder / "world/captions",
            }
            pairs["data.init_args.train"] = self.folder / "world/train"
            text = f"making a miniature Qwen2-VL with random weights: {cause.text}"
            made = [self.unit(random, text, 1, (), self.random_qwen, random, cause.patch)]
        taught = self.captioned(place, f"caption pre-training: {cause.text}", captions)
        return [
            *made,
            replace(taught, needs=(*taught.needs, *(unit.name for unit in made))),
            self.reward_model(f"judges/{name}-rendered", f"training on rendered pairs: {cause.text}", pairs, place),
        ]

    def _rating(self, name: str, text: str, samples: str, *args: int | None) -> Unit:
        needs, result = (samples, "oracle.json", "world"), f"judges/pairs/{name}"
        return self.unit(result, f"annotators rate pairs: {text}", 6, needs, self._rate_pool, result, samples, *args)

    def _rate_pool(self, result: str, samples: str, count: int, clips: int | None, rendered: int) -> None:
        """Rate pairs of some clips of each prompt, but for the prompts that the loop holds out too."""
        more, oracle = ShardSet(self.folder / "world/train"), Oracle.load(self.folder / "oracle.json")
        with new_folder(self.folder / result) as out:
            pool = ShardSet(self.folder / samples)
            rate_pairs(pool, oracle, out, count, HELD_OUT, more, rendered, self.seed, clips)

    def _judge(self, name: str, text: str, settings: Settings, own_pairs: bool, taught: bool = False) -> list[Unit]:
        """A judge like the loop's own, validated on the same pairs, and its accuracy."""
        own = next(unit for unit in self._rating_units() if unit.name == f"{self.place}reward")
        _, experiments, kept, _ = own.run.args
        kept = {key: value for key, value in kept.items() if key not in self.settings("", {})}
        needs = [need.removeprefix(self.place) for need in own.needs]
        if own_pairs:
            kept["data.init_args.train"] = self.folder / f"judges/pairs/{name}/train"
            needs.append(f"judges/pairs/{name}")
        if taught:
            kept["model.init_args.network.init_args.folder"] = self.folder / f"judges/{name}-rendered"
            needs = [f"judges/{name}-rendered" if need == "reward_rendered" else need for need in needs]
        settings = {**kept, **settings}
        cost = own.cost * settings["trainer.max_steps"] / kept["trainer.max_steps"]
        model = f"judges/{name}"
        return [
            self.training(model, f"training a judge: {text}", cost, needs, experiments, settings),
            self.benchmarking(f"bench/judge-{name}", model, ("generated",), f"benchmarking {model}", 3, ("generated",)),
        ]

    # --- how well it judges what it was used for --------------------------------------------------------------------

    def output_cell(self) -> list[Unit]:
        """Cell (m)."""
        needs = ("cells/aligned/comparison.json", "cells/nrg/comparison.json", "reward", "oracle.json")
        unit = self.unit("cells/outputs.json", "how well the judge orders aligned clips", 20, needs, self._outputs)
        return [replace(unit, needs=(*unit.needs, TUNED))]

    def _outputs(self) -> None:
        """Accuracy of the judge on the clips of each arm, for which annotators rate pairs at the same prompt."""
        cells = self.folder / "cells"
        names = read_json(cells / "aligned/comparison.json", "a comparison")["arms"]
        videos = {name: cells / "aligned/videos" / name for name in names}
        strength = read_json(self.out / TUNED, "settings")["nrg"]["strength"]
        videos["nrg"] = cells / "nrg/videos" / f"{GUIDED}@{strength:g}"
        reward = RewardJudge(model=str(self.folder / "reward"), batch_size=32, device="cpu")
        judges = {"rewards": reward, "oracle": OracleJudge(str(self.folder / "oracle.json"))}
        found = {}
        for name, folder in videos.items():
            shards = ShardSet(folder)
            prompt_of = {content.key: content.record["prompt"] for content in shards.contents()}
            keys = sorted(prompt_of)
            kept = folder.with_name(f"{folder.name}.rewards")  # where the comparison left the rewards
            rewards, quality = (ratings_of(judge, shards, keys, kept, which) for which, judge in judges.items())
            found[name] = output_accuracy(quality, rewards, [prompt_of[key] for key in keys], seed=self.seed)
        write_json(cells / "outputs.json", found)


def causes_done(out: Path, cells: Iterable[Unit]) -> Unit:
    """The unit that ends cell (k).

    Args:
        out: Folder of all results.
        cells: Units of :meth:`JudgeCells.cause_cells` on all tuning seeds.
    """
    measured = tuple(unit.name for unit in cells if "/bench" in unit.name)
    return Unit(STUDIED, "collecting what keeps the judge from seeing motion", partial(_collect, out), measured, 1)


def _collect(out: Path) -> None:
    write_json(out / STUDIED, {seed: findings(out, seed) for seed in TUNING_SEEDS})
