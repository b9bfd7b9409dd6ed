"""What a label is worth, measured in the miniature world.

Reward models are trained on few labels. Which pairs are labelled is decided at random, by the uncertainty of the last
model, or by the disagreement of the last two (:mod:`.select`).
"""

import os
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from ..callbacks.plots import curve, panels, save_png, text_table
from ..commands.reward_judge import RewardJudge
from ..datamodules.shards import ShardSet
from ..miniature.study.loop_size import LoopSize, begin
from ..miniature.study.pipeline import Loop
from ..miniature.study.units import Unit, leading_to
from ..miniature.study.workers import work
from ..models.dimensions import DIMENSIONS
from ..models.files import read_json, write_json, write_text
from ..models.flow import draw_seed
from ..models.intervals import Interval
from .select import uncertainty

LABELS = (150, 300, 600, 1200)
"""Number of rated pairs after each round."""
ORDERS = {"random": 0, "uncertain": 1, "disagreement": 2}
"""Orders in which pairs are rated, and how many reward models each of them asks."""
POOL = 2400
"""Number of pairs that could be rated."""


class Simulation(Loop):
    """The units of work of one seed.

    Args:
        args: Arguments of :class:`~videoalign.miniature.study.pipeline.Loop`.
        labels: Number of rated pairs after each round.
        pool: Number of pairs that could be rated.
        kwargs: Arguments of the same class by name.
    """

    def __init__(self, *args: Any, labels: Iterable[int] = LABELS, pool: int = POOL, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.labels, self.pool = tuple(labels), pool

    def units(self) -> list[Unit]:
        """The units that choose pairs, train and benchmark, for all orders."""
        made, ends = self.base(whole=False), []
        for order, asked in ORDERS.items():
            for round_, count in enumerate(self.labels):
                # the first round has no model to ask: all orders begin alike
                name, before = self._name(order, round_), []
                if f"{self.place}{name}" in {unit.name for unit in made}:
                    continue
                if round_:
                    before = [f"{self._name(order, round_ - 1)}{which}" for which in ("", "-second")[:asked]]
                needs, cost = ("world", *before), 1 + 24 * len(before)
                text, choice = f"choosing {count} pairs: {order}", (name, count, before)
                made.append(self.unit(f"{name}.txt", text, cost, needs, self._choose, *choice))
                made += [self._trained(name, order, count, which) for which in ("", "-second")]
                text, bench = f"benchmarking {name}", (f"{name}.bench", name, ("world/recent",))
                made.append(self.unit(f"{name}.bench", text, 6, (name, "world"), self.bench, *bench))
                ends.append(f"{self.place}{name}.bench")
        return leading_to(made, ends)

    def _name(self, order: str, round_: int) -> str:
        """Name of the reward model of a round; the first round is the same in all orders."""
        return f"active/{order if round_ else 'start'}-{self.labels[round_]}"

    def _trained(self, name: str, order: str, count: int, which: str) -> Unit:
        """A reward model on the pairs of a round; the second one differs from the first in its seed."""
        steps = max(1, round(self.size.reward * (count / self.size.world.train) ** 0.3))
        seed = self.seed + 1000 * bool(which)
        trained = self.reward_model(
            f"{name}{which}",
            f"training a{which.replace('-', ' ')} reward model on {count} pairs: {order}",
            {
                "trainer.max_steps": steps,
                "trainer.val_check_interval": steps,
                "seed_everything": seed,
                "data.init_args.seed": seed,
                "data.init_args.benchmarks": {},
                "data.init_args.train_keys": self.folder / f"{name}.txt",
                "data.init_args.batch_size": max(1, min(24, count)),
            },
        )
        return replace(trained, needs=(*trained.needs, f"{self.place}{name}.txt"))

    def _choose(self, name: str, count: int, models: list[str]) -> None:
        """Write the keys of the pairs that are rated after a round, among them all of the round before."""
        keys = [content.key for content in ShardSet(self.folder / "world/train").contents()]
        drawn = sorted(keys, key=lambda key: draw_seed(self.seed, "pool", key))[: self.pool]
        chosen = drawn[:count]
        if models:
            chosen = (self.folder / f"{models[0]}.txt").read_text().split()
            rest = [key for key in drawn if key not in set(chosen)]
            margins, scales = zip(*(self._margins(model, rest) for model in models))
            unsure = uncertainty(margins, scales)
            chosen += [rest[i] for i in unsure.argsort(descending=True)[: count - len(chosen)].tolist()]
        write_text(self.folder / f"{name}.txt", "\n".join(chosen))

    def _margins(self, model: str, keys: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, D) raw rewards of A minus those of B, and (D,) standard deviations of the model's rewards."""
        judge = RewardJudge(model=str(self.folder / model), batch_size=48, device="cpu")
        sides = [f"{key}.{side}" for key in keys for side in "ab"]
        shards = ShardSet(self.folder / "world/train")
        raw = judge.score_set(shards, sides, self.folder / f"{model}.pool")
        return -raw.unflatten(0, (-1, 2)).diff(dim=1).squeeze(1), torch.tensor(judge.network.statistics.std)

    def found(self) -> dict[str, dict[int, float]]:
        """Mean accuracy without ties over VQ, MQ and TA, by order and number of rated pairs."""
        result: dict[str, dict[int, float]] = {}
        for order in ORDERS:
            for round_, count in enumerate(self.labels):
                place = self.folder / f"{self._name(order, round_)}.bench"
                rows = read_json(place / "accuracies.json", "a finished simulation")["recent"]
                result.setdefault(order, {})[count] = sum(rows[d]["without_ties"] for d in DIMENSIONS) / len(DIMENSIONS)
        return result


def units(out: Path, size: LoopSize, seeds: int, labels: tuple[int, ...], pool: int) -> list[Unit]:
    """The units of work of all seeds."""
    simulations = (Simulation(out, size, seed, f"seed{seed}", labels=labels, pool=pool) for seed in range(seeds))
    return [unit for simulation in simulations for unit in simulation.units()]


def simulate(
    out: str, seeds: int = 3, size: LoopSize | None = None, labels: tuple[int, ...] = LABELS, pool: int = POOL
) -> dict[str, Any]:
    """Train reward models in all orders; print a table, and save it with a chart.

    Args:
        out: Folder of results, at last ``simulation.json`` and ``simulation.png``; finished stages are not repeated.
        seeds: Number of seeds.
        size: Size of the world and length of the trainings; None stands for the defaults.
        labels: Number of rated pairs after each round.
        pool: Number of pairs that could be rated.

    Returns:
        ``accuracy``: accuracies by order and number of rated pairs, one for each seed. ``seeds``: number of seeds.
    """
    folder, size = Path(out).resolve(), size or LoopSize()
    begin(folder, asdict(size))
    cores = os.cpu_count() or 1
    work(folder, units(folder, size, seeds, labels, pool), cores)
    of_seed = [Simulation(folder, size, seed, f"seed{seed}", labels=labels, pool=pool).found() for seed in range(seeds)]
    curves = {
        order: {count: Interval.over([one[order][count] for one in of_seed]) for count in labels} for order in ORDERS
    }
    print(_table(curves, of_seed))
    result = {
        "accuracy": {order: {count: list(i.runs) for count, i in curve.items()} for order, curve in curves.items()},
        "seeds": seeds,
    }
    write_json(folder / "simulation.json", result)
    save_png(chart(curves, seeds), folder / "simulation.png")
    print(f"saved in {folder}: simulation.json and .png")
    return result


def _table(curves: dict[str, dict[int, Interval]], of_seed: list[dict[str, dict[int, float]]]) -> str:
    """Accuracies by number of labels, and how much better other orders are than a random one on the same seeds."""
    others = [order for order in ORDERS if order != "random"]
    labels, rows = list(curves["random"]), []
    for count in labels:
        gains = [Interval.over([one[order][count] - one["random"][count] for one in of_seed]) for order in others]
        shown = [*(curves[order][count] for order in ORDERS), *(gains if count > labels[0] else ())]
        rows.append([str(count), *map(str, shown), *[""] * (len(ORDERS) + len(others) - len(shown))])
    return text_table(["labels", *ORDERS, *(f"{order} gain" for order in others)], rows)


def chart(curves: dict[str, dict[int, Interval]], seeds: int) -> Figure:
    """Accuracy over the number of rated pairs, a line per order.

    Args:
        curves: Mean accuracies over seeds, by order and number of rated pairs.
        seeds: Number of seeds.
    """
    figure, (axis,) = panels()
    labels = list(next(iter(curves.values())))
    for order, row in curves.items():
        curve(axis, list(row), list(row.values()), order)
    axis.set_xscale("log")
    axis.set_xticks(labels, [str(count) for count in labels])
    axis.minorticks_off()
    axis.set(title=f"Which pair next? ({seeds} seeds, 95 % intervals)")
    axis.set(xlabel="rated pairs", ylabel="mean accuracy without ties")
    axis.legend()
    return figure
