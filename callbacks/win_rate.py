"""Evaluation of a tuned generator: win rates of its videos over the reference's, by a reward model."""

import math
from pathlib import Path

import lightning as L
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from .. import EverywhereError, VideoAlignError
from ..datamodules.contracts import AlignsGenerator, require
from ..datamodules.prompts import read_prompts
from ..datamodules.video import resample
from ..models.files import write_json
from ..models.intervals import interval_text
from ..models.official import load_reward
from ..models.template import Template
from ..models.win_rates import win_rates
from .prompt_sampler import PromptSampler, Sampling
from .tensorboard import folder_of, writer_of


class WinRate(L.Callback):
    """Under `videoalign test`: policy and reference sample the same prompts from the same noise, a reward model compares.

    Logs ``test/win_rate/*``, ``test/superiority/*`` (different noise, see :mod:`~videoalign.models.win_rates`),
    ``test/reward/{policy,reference}/*`` and ``test/drift``, the mean squared difference of the two velocities: a win rate
    that is bought with much drift asks to be looked at. A table and a chart in TensorBoard, ``win_rate.json`` in the folder.

    Args:
        reward_model: Folder of a reward model, of this package or an official one.
        prompts: CSV with a column ``prompt``, or text file with one prompt a line.
        sampling: How videos are sampled.
        samples: Noises per prompt; with one there is no superiority.
        out: Folder for the JSON file, if not the run's.
        backbone: Where the reward model's backbone is, if not where it was.
        template: Template of an official reward model.
    """

    def __init__(
        self,
        reward_model: str,
        prompts: str,
        sampling: Sampling,
        samples: int = 2,
        out: str | None = None,
        backbone: str | None = None,
        template: str | None = None,
    ) -> None:
        if samples < 1:
            raise VideoAlignError(f"WinRate.samples must be at least 1, got {samples}")
        self.reward_model, self.backbone = reward_model, backbone
        self.template = Template.load(template) if template else None
        self.prompts, self.sampling, self.samples, self.out = read_prompts(prompts), sampling, samples, out
        self.results: dict[str, dict] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a module that aligns no generator before the test begins."""
        if stage == "test":
            require(pl_module, AlignsGenerator, "callbacks.WinRate")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sample, score, compare. Collective."""
        sampler = PromptSampler(pl_module, self.sampling, self.prompts)
        judge = load_reward(self.reward_model, self.backbone, self.template).to(pl_module.device)
        judge.need_statistics(self.reward_model)
        items = [(p, n) for p in range(len(self.prompts)) for n in range(self.samples)]
        batches = [items[i : i + self.sampling.batch_size] for i in range(0, len(items), self.sampling.batch_size)]
        rounds = -(-len(batches) // trainer.world_size)  # every rank samples as often: sharded layers are collective
        found: dict[tuple[int, int], list] = {}
        for number in range(rounds):
            batch = batches[(number * trainer.world_size + trainer.global_rank) % len(batches)]
            policy, reference = sampler.both(batch)
            drift = sampler.drift(reference, batch)
            rewards = [
                self._rewards(judge, pl_module, latents, batch, side)
                for side, latents in (("policy", policy), ("reference", reference))
            ]
            for item, *row in zip(batch, *(r.tolist() for r in rewards), drift.tolist()):
                found[item] = row
        self._report(trainer, pl_module, self._gather(trainer, found))

    def _rewards(
        self, judge, module: L.LightningModule, latents: Tensor, batch: list[tuple[int, int]], side: str
    ) -> Tensor:
        """(N, 4) normalised rewards and their sum."""
        names = [f"{side}, prompt {self.prompts[p][:60]}, noise {n}" for p, n in batch]
        generator = require(module, AlignsGenerator, "callbacks.WinRate").generator
        processor, videos = judge.processor, generator.decode(latents, names).cpu()
        frames = [resample(video, self.sampling.fps, processor.sampling, processor.factor) for video in videos]
        inputs = processor(frames, [self.prompts[p] for p, _ in batch])
        with torch.no_grad():
            rewards = judge.normalise(
                judge(**{name: tensor.to(module.device) for name, tensor in inputs.items()})
            ).cpu()
        return torch.cat([rewards, rewards.sum(1, keepdim=True)], 1)

    @staticmethod
    def _gather(trainer: L.Trainer, found: dict) -> dict:
        if trainer.world_size == 1:
            return found
        every: list = [None] * trainer.world_size
        torch.distributed.all_gather_object(every, found)
        return {item: row for part in every for item, row in part.items()}

    def _report(self, trainer: L.Trainer, module: L.LightningModule, found: dict) -> None:
        shape = len(self.prompts), self.samples
        rows = [found[p, n] for p in range(shape[0]) for n in range(shape[1])]
        policy, reference = (torch.tensor([row[i] for row in rows]).unflatten(0, shape) for i in (0, 1))  # (P, N, 4)
        if not (policy.isfinite().all() and reference.isfinite().all()):
            raise EverywhereError(
                f"{self.reward_model}: the rewards of sampled videos are not finite; model or generator is broken"
            )
        drift = sum(row[2] for row in rows) / len(rows)
        if not math.isfinite(drift):
            raise EverywhereError(
                "the drift of the policy from the reference is not finite; policy or reference is broken"
            )
        self.results = win_rates(policy, reference)
        for column, row in self.results.items():
            module.log_dict(
                {
                    f"test/win_rate/{column}": row["win_rate"],
                    f"test/superiority/{column}": row["superiority"],
                    f"test/reward/policy/{column}": row["policy"],
                    f"test/reward/reference/{column}": row["reference"],
                }
            )
        module.log("test/drift", drift)
        run = folder_of(trainer)  # collective
        if not trainer.is_global_zero:
            return
        if folder := Path(self.out) if self.out else run:
            write_json(
                folder / "win_rate.json",
                {
                    "columns": self.results,
                    "drift": drift,
                    "samples": self.samples,
                    "reward_model": self.reward_model,
                    "prompts": self.prompts,
                },
            )
        print(
            f"\n{table(self.results, drift)}" + (f"\nsaved in {folder / 'win_rate.json'}" if folder else ""), flush=True
        )
        if writer := writer_of(trainer):
            writer.add_text("test/win_rate", table(self.results, drift), trainer.global_step)
            writer.add_figure("test/win_rate", chart(self.results), trainer.global_step)


def table(results: dict[str, dict], drift: float) -> str:
    """Win rates as a Markdown table."""
    lines = [
        "| | win rate, same noise | 95 % | superiority, other noise | 95 % | policy | reference |",
        "|---" * 7 + "|",
    ]
    for column, row in results.items():
        spans = [interval_text(row[f"{kind}_interval"], 2) for kind in ("win_rate", "superiority")]
        lines.append(
            f"| {column} | {row['win_rate']:.3f} | {spans[0]} | {row['superiority']:.3f} | {spans[1]} | {row['policy']:+.3f} | {row['reference']:+.3f} |"
        )
    return "\n".join([*lines, "", f"drift from the reference (mean squared velocity difference): {drift:.4g}"])


def chart(results: dict[str, dict]) -> Figure:
    """Win rate and superiority per column, with intervals."""
    figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for offset, kind, colour, label in (
        (-0.18, "win_rate", "#4878a8", "same noise"),
        (0.18, "superiority", "#c08840", "other noise"),
    ):
        for x, row in enumerate(results.values()):
            low, high = row[f"{kind}_interval"]
            if row[kind] == row[kind]:
                axis.bar(
                    x + offset,
                    row[kind],
                    0.34,
                    color=colour,
                    yerr=[[max(0, row[kind] - low)], [max(0, high - row[kind])]],
                    capsize=3,
                    label=label if x == 0 else None,
                )
    axis.axhline(0.5, color="#b03030", linestyle="dashed", label="no difference")
    axis.set_xticks(range(len(results)), list(results))
    axis.set(ylim=(0, 1), ylabel="policy wins")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8)
    return figure
