"""Benchmarks of a reward model at validation time: VideoGen-RewardBench's and GenAI-Bench's protocol."""

from pathlib import Path
from typing import Any

import lightning as L
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from lightning.pytorch.utilities import rank_zero_warn
from matplotlib.figure import Figure
from torch import Tensor

from ..datamodules.benchmark import Benchmark
from ..datamodules.contracts import HasBenchmarks, MeasuresStatistics, require
from ..models.files import write_json
from ..models.intervals import LEAST_PROMPTS, interval_text, prompt_number
from ..models.metrics import PreferenceAccuracy
from .tensorboard import folder_of, writer_of


class RewardBench(L.Callback):
    """Scores each video of each benchmark once, joins the rated pairs on both videos, and reports accuracies.

    Needs a DataModule with benchmarks (:class:`~videoalign.datamodules.contracts.HasBenchmarks`), and a module whose
    validation step returns ``rewards`` (:class:`~videoalign.datamodules.contracts.MeasuresStatistics`). Logs ``bench/NAME/accuracy/*``, ``bench/NAME/accuracy_with_ties/*`` and ``bench/NAME/tie_floor/*``, a
    table and a bar chart in TensorBoard, and ``reward_bench/NAME.json`` in the run's folder.

    Args:
        out: Folder for the JSON files, if not the run's.
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
        """Forget the last round."""
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
        """Keep the rewards of a benchmark's videos."""
        if "benchmark" in batch and outputs:
            numbers = torch.where(batch["valid"], batch["numbers"], -1)  # -1: padding
            self._seen.setdefault(batch["benchmark"], []).append((numbers, outputs["rewards"].detach()))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Join, measure and report."""
        if trainer.sanity_checking:
            return
        module = require(pl_module, MeasuresStatistics, "callbacks.RewardBench")
        for name, benchmark in require(trainer.datamodule, HasBenchmarks, "callbacks.RewardBench").benchmarks.items():
            rewards = self._gather(name, len(benchmark.keys), pl_module)
            std = torch.tensor(module.measured_statistics().std)
            self.results[name] = result = self._measure(name, benchmark, rewards, std)
            for column, row in result.items():
                pl_module.log_dict(
                    {
                        f"bench/{name}/accuracy/{column}": row["without_ties"],
                        f"bench/{name}/accuracy_with_ties/{column}": row["with_ties"],
                        f"bench/{name}/tie_floor/{column}": row["floor"],
                    }
                )
            self._report(trainer, name, result)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def _gather(self, name: str, videos: int, module: L.LightningModule) -> Tensor:
        """(videos, 3) rewards from all ranks, NaN where a video was not scored. Collective."""
        seen = self._seen.get(name, [])
        numbers = torch.cat([n for n, _ in seen]) if seen else torch.empty(0, dtype=torch.long, device=module.device)
        rewards = torch.cat([r for _, r in seen]) if seen else torch.empty(0, 3, device=module.device)
        table = torch.full((videos + 1, 3), torch.nan)  # the last row takes the padding
        rewards = rewards.nan_to_num(nan=torch.inf)  # NaN is for what was not scored
        # every rank has the same number of places, so the gathered tensors are as long everywhere
        table[module.all_gather(numbers).flatten().cpu()] = module.all_gather(rewards.float()).flatten(0, -2).cpu()
        return table[:videos]

    def _measure(self, name: str, benchmark: Benchmark, rewards: Tensor, std: Tensor) -> dict[str, dict]:
        margins, whole = benchmark.margins(rewards, name)
        if not whole.all():
            rank_zero_warn(
                f"{name}: {int((~whole).sum())} of {len(whole)} pairs name a video that was not scored, and are left out"
            )
        metric = PreferenceAccuracy(std, self.resamples, sync_on_compute=False)
        metric.update(margins, benchmark.labels, whole, torch.tensor([prompt_number(p) for p in benchmark.prompts]))
        return metric.compute()

    def _report(self, trainer: L.Trainer, name: str, result: dict[str, dict]) -> None:
        run = folder_of(trainer)  # collective
        if not trainer.is_global_zero:
            return
        if folder := Path(self.out) if self.out else run and run / "reward_bench":
            write_json(folder / f"{name}.json", {"benchmark": name, "step": trainer.global_step, "accuracies": result})
        if (writer := writer_of(trainer)) and result:
            writer.add_text(f"bench/{name}", table(result, markdown=True), trainer.global_step)
            writer.add_figure(f"bench/{name}", bar_chart(name, result), trainer.global_step)


def table(result: dict[str, dict], ceiling: dict[str, dict] | None = None, markdown: bool = False) -> str:
    """Accuracies as text, a line per dimension.

    Args:
        result: Accuracies of one benchmark.
        ceiling: The same of a perfect judge, where it is known.
        markdown: Whether bars stand between the cells.
    """
    head = [
        "",
        "without ties",
        "95 % interval",
        "chance",
        "with ties",
        "95 % interval",
        "held-out",
        "tie floor",
        "chance",
        "pairs",
    ]
    head += ["ceiling without", "ceiling with"] if ceiling else []
    rows = []
    for column, row in result.items():
        floor = row["floor"]
        spans = [interval_text(row[k]) if k in row else "" for k in ("interval", "interval_with_ties")]
        cells = [
            column,
            f"{row['without_ties']:.3f}",
            spans[0],
            "0.500",
            f"{row['with_ties']:.3f}",
            spans[1],
            f"{row['held_out']:.3f}",
            f"{floor:.3f}",
            f"{max(floor, (1 - floor) / 2):.3f}",
            str(row["pairs"]),
        ]
        if ceiling:
            cells += [f"{ceiling[column]['without_ties']:.3f}", f"{ceiling[column]['with_ties']:.3f}"]
        rows.append(cells)
    if markdown:
        lines = [head, ["---"] * len(head), *rows]
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    else:
        widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
        text = "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in [head, *rows])
    few = too_few_prompts(result)
    return f"{text}\n{'' if not markdown else chr(10)}{few}" if few else text


def too_few_prompts(result: dict[str, dict]) -> str:
    """A sentence where a benchmark has too few prompts for intervals; empty where it has enough.

    Args:
        result: Accuracies of one benchmark.
    """
    counts = {
        (c, what): row[k]
        for c, row in result.items()
        for k, what in (("decided_prompts", "without ties"), ("prompts", "with ties"))
        if row.get(k, LEAST_PROMPTS) < LEAST_PROMPTS
    }
    if not counts:
        return ""
    each = ", ".join(f"{column} {what} of {count}" for (column, what), count in counts.items())
    return (
        f"No 95 % interval where there are fewer than {LEAST_PROMPTS} prompts ({each}): a prompt's pairs are not independent, so that many "
        "pairs of few prompts tell little."
    )


def bar_chart(name: str, result: dict[str, dict], ceiling: dict[str, dict] | None = None) -> Figure:
    """Accuracies with intervals, and what chance and always calling a tie would give."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    titles = {"without_ties": "without ties", "with_ties": "with ties"}
    for axis, (kind, interval) in zip(axes, (("without_ties", "interval"), ("with_ties", "interval_with_ties"))):
        for x, row in enumerate(result.values()):
            low, high = row.get(interval, (row[kind], row[kind]))
            axis.bar(x, row[kind], 0.6, color="#4878a8", yerr=[[row[kind] - low], [high - row[kind]]], capsize=3)
            floor = 0.5 if kind == "without_ties" else max(row["floor"], (1 - row["floor"]) / 2)
            axis.hlines(
                floor, x - 0.4, x + 0.4, colors="#b03030", linestyles="dashed", label="chance" if x == 0 else None
            )
            if ceiling:
                axis.hlines(
                    ceiling[list(result)[x]][kind],
                    x - 0.4,
                    x + 0.4,
                    colors="#308030",
                    label="annotators' ceiling" if x == 0 else None,
                )
            axis.text(x, 0.03, f"{row[kind]:.2f}", ha="center", color="white")
        axis.set_xticks(range(len(result)), list(result))
        axis.set(title=f"{name}, {titles[kind]}", ylim=(0, 1))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("accuracy")
    axes[1].legend(loc="upper right", fontsize=8)
    return figure
