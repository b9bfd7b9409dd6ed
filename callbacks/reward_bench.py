"""Benchmarks of a reward model at validation time, and accuracies as a table and as a chart."""

import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ..datamodules.benchmark import Benchmark
from ..datamodules.contracts import HasBenchmarks, MeasuresStatistics, require
from ..models.files import write_json
from ..models.intervals import LEAST_PROMPTS, Interval, interval_text, prompt_number
from ..models.metrics import PreferenceAccuracy
from .plots import BLUE, GREEN, RED, bars, legend_below, markdown_table, panels, text_table
from .run_folder import folder_of
from .run_media import media_of


class RewardBench(L.Callback):
    """Scores each video of each benchmark once, joins the rated pairs on both videos, and reports accuracies.

    Needs a DataModule with benchmarks (:class:`~videoalign.datamodules.contracts.HasBenchmarks`), and a module whose
    validation step returns ``rewards`` (:class:`~videoalign.datamodules.contracts.MeasuresStatistics`). It logs
    ``val/bench/NAME/accuracy/*``, ``val/bench/NAME/accuracy_with_ties/*`` and ``val/bench/NAME/tie_floor/*``
    (``test/...`` under ``videoalign test``), shows a table and a bar chart, and writes ``reward_bench/NAME.json`` in
    the run's folder.

    Args:
        out: Folder for the JSON files; ``reward_bench`` in the run's folder if not given.
        resamples: Number of bootstrap samples of the confidence intervals, which resample prompts; 0 leaves them out.
    """

    def __init__(self, out: str | None = None, resamples: int = 1000) -> None:
        self.out, self.resamples = out, resamples
        self.results: dict[str, dict[str, dict]] = {}
        self._seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a module that measures no statistics, and a DataModule without benchmarks."""
        if stage != "predict":
            require(pl_module, MeasuresStatistics, "callbacks.RewardBench")
            require(trainer.datamodule, HasBenchmarks, "callbacks.RewardBench")

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the rewards of the last validation."""
        self._seen = {}

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: dict,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the rewards of a batch of a benchmark's videos."""
        if "benchmark" in batch and outputs:
            numbers = torch.where(batch["valid"], batch["numbers"], -1)  # -1: padding
            self._seen.setdefault(batch["benchmark"], []).append((numbers, outputs["rewards"].detach()))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure and report every benchmark. Collective: every rank must call it."""
        if trainer.sanity_checking:
            return
        module, stage = require(pl_module, MeasuresStatistics, "callbacks.RewardBench"), stage_of(trainer)
        for name, benchmark in require(trainer.datamodule, HasBenchmarks, "callbacks.RewardBench").benchmarks.items():
            rewards = self._gather(name, len(benchmark.keys), pl_module)
            std = torch.tensor(module.measured_statistics().std)
            self.results[name] = result = self._measure(name, benchmark, rewards, std)
            for column, row in result.items():
                pl_module.log(f"{stage}/bench/{name}/accuracy/{column}", row["without_ties"])
                pl_module.log(f"{stage}/bench/{name}/accuracy_with_ties/{column}", row["with_ties"])
                pl_module.log(f"{stage}/bench/{name}/tie_floor/{column}", row["floor"])
            self._report(trainer, name, result)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def _gather(self, name: str, videos: int, module: L.LightningModule) -> Tensor:
        """(videos, 3) rewards from all ranks, NaN where a video was not scored. Collective."""
        seen = self._seen.get(name, [])
        numbers = torch.cat([n for n, _ in seen]) if seen else torch.empty(0, dtype=torch.long, device=module.device)
        rewards = torch.cat([r for _, r in seen]) if seen else torch.empty(0, 3, device=module.device)
        every = torch.full((videos + 1, 3), torch.nan)  # the last row takes the padding
        rewards = rewards.masked_fill(rewards.isnan(), torch.inf)  # NaN marks videos that were not scored
        # every rank has the same number of places, so the gathered tensors are as long everywhere
        every[module.all_gather(numbers).flatten().cpu()] = module.all_gather(rewards.float()).flatten(0, -2).cpu()
        return every[:videos]

    def _measure(self, name: str, benchmark: Benchmark, rewards: Tensor, std: Tensor) -> dict[str, dict]:
        margins, whole = benchmark.margins(rewards, name)
        if not whole.all():
            missing = f"{int((~whole).sum())} of {len(whole)} pairs"
            rank_zero_warn(f"{name}: {missing} name a video that was not scored, and are left out")
        metric = PreferenceAccuracy(std, self.resamples, sync_on_compute=False)
        metric.update(margins, benchmark.labels, whole, torch.tensor([prompt_number(p) for p in benchmark.prompts]))
        return metric.compute()

    def _report(self, trainer: L.Trainer, name: str, result: dict[str, dict]) -> None:
        run = folder_of(trainer)  # collective
        if not trainer.is_global_zero:
            return
        if folder := Path(self.out) if self.out else run and run / "reward_bench":
            write_json(folder / f"{name}.json", {"benchmark": name, "step": trainer.global_step, "accuracies": result})
        if (media := media_of(trainer)) and result:
            media.text(f"{stage_of(trainer)}/bench/{name}", table(result, markdown=True))
            media.figure(f"{stage_of(trainer)}/bench/{name}", bar_chart(name, result))


def stage_of(trainer: L.Trainer) -> str:
    """First part of the names of what is measured: ``test`` under ``videoalign test``, else ``val``."""
    return "test" if trainer.testing else "val"


KINDS = {"without_ties": ("without ties", "interval"), "with_ties": ("with ties", "interval_with_ties")}
"""The two accuracies of a column: their titles, and the names of their intervals."""
HEAD = (
    "", "without ties", "95 % interval", "chance",
    "with ties", "95 % interval", "held-out", "tie floor", "chance", "pairs",
)  # fmt: skip
"""Heads of the columns of a table of accuracies."""


def table(result: dict[str, dict], ceiling: dict[str, dict] | None = None, markdown: bool = False) -> str:
    """Accuracies as text, a line per column.

    Args:
        result: Accuracies of one benchmark, by column.
        ceiling: Accuracies of a perfect judge, by column, where they are known.
        markdown: Whether the table is in Markdown; otherwise it is for terminals.
    """
    head = [*HEAD, *(["ceiling without", "ceiling with"] if ceiling else [])]
    rows = [[column, *_cells(row), *_ceiling(ceiling, column)] for column, row in result.items()]
    text = (markdown_table if markdown else text_table)(head, rows)
    gap = "\n\n" if markdown else "\n"
    return gap.join(filter(None, [text, too_few_prompts(result)]))


def _cells(row: dict[str, float]) -> list[str]:
    without, with_ties = (interval_text(row[key]) if key in row else "" for _, key in KINDS.values())
    accuracies = {key: f"{row[key]:.3f}" for key in ("without_ties", "with_ties", "held_out", "floor")}
    return [
        accuracies["without_ties"], without, f"{_chance(row, 'without_ties'):.3f}",
        accuracies["with_ties"], with_ties, accuracies["held_out"], accuracies["floor"],
        f"{_chance(row, 'with_ties'):.3f}", str(row["pairs"]),
    ]  # fmt: skip


def _ceiling(ceiling: dict[str, dict] | None, column: str) -> list[str]:
    return [f"{ceiling[column][kind]:.3f}" for kind in KINDS] if ceiling else []


def _chance(row: dict[str, float], kind: str) -> float:
    """Accuracy of guessing; with ties the better one of always calling a tie and of never calling one."""
    return 0.5 if kind == "without_ties" else max(row["floor"], (1 - row["floor"]) / 2)


def too_few_prompts(result: dict[str, dict]) -> str:
    """A sentence where a benchmark has too few prompts for intervals; empty where it has enough.

    Args:
        result: Accuracies of one benchmark, by column.
    """
    counts = {
        (column, what): row[key]
        for column, row in result.items()
        for key, what in (("decided_prompts", "without ties"), ("prompts", "with ties"))
        if row.get(key, LEAST_PROMPTS) < LEAST_PROMPTS
    }
    if not counts:
        return ""
    each = ", ".join(f"{column} {what} of {count}" for (column, what), count in counts.items())
    return (
        f"No 95 % interval where there are fewer than {LEAST_PROMPTS} prompts ({each}): a prompt's pairs are not "
        "independent, so that many pairs of few prompts tell little."
    )


def bar_chart(name: str, result: dict[str, dict], ceiling: dict[str, dict] | None = None) -> Figure:
    """Accuracies with intervals, and beside them chance and what a perfect judge would reach.

    Args:
        name: Name of the benchmark.
        result: Its accuracies, by column.
        ceiling: Accuracies of a perfect judge, by column, where they are known.
    """
    figure, axes = panels(2, (9, 3.4))
    for axis, (kind, (title, interval)) in zip(axes, KINDS.items()):
        rows = [Interval(row[kind], *row.get(interval, (math.nan, math.nan))) for row in result.values()]
        bars(axis, list(result), {"": rows}, [BLUE])
        _marks(axis, [_chance(row, kind) for row in result.values()], "chance", color=RED, linestyles="dashed")
        if ceiling:
            _marks(axis, [ceiling[column][kind] for column in result], "annotators' ceiling", color=GREEN)
        for x, row in enumerate(rows):
            if not math.isnan(row.mean):
                axis.text(x, 0.03, f"{row.mean:.2f}", ha="center", color="white")
        axis.set(title=f"{name}, {title}", ylim=(0, 1))
    axes[0].set_ylabel("accuracy")
    legend_below(figure)
    return figure


def _marks(axis: Axes, values: list[float], label: str, **style: Any) -> None:
    """A short line across each bar."""
    for x, value in enumerate(values):
        axis.hlines(value, x - 0.4, x + 0.4, label=label if x == 0 else None, **style)
