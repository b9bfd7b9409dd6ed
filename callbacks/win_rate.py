"""Win rates of a tuned generator's videos over the reference's, by a reward model."""

import math
from pathlib import Path

import lightning as L
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from .. import EverywhereError, VideoAlignError
from ..datamodules.contracts import AlignsGenerator, require
from ..datamodules.data_ranks import merged
from ..datamodules.frames import load_image
from ..datamodules.prompts import read_items
from ..datamodules.ratings import COLUMNS
from ..datamodules.video import resample
from ..models.files import write_json
from ..models.intervals import Interval, interval_text
from ..models.official import load_reward
from ..models.template import Template
from ..models.win_rates import win_rates
from .plots import BLUE, ORANGE, bars, legend_below, markdown_table, panels, reference_line
from .prompt_sampler import PromptSampler, SamplesPrompts, Sampling
from .run_folder import folder_of
from .run_media import Media, media_of
from .side_clips import Clip, frames_of


class WinRate(SamplesPrompts):
    """Compares policy and reference under `videoalign test`: both sample the same prompts from the same noise.

    It logs ``test/win_rate/*``, ``test/superiority/*`` (different noise, see :mod:`~videoalign.models.win_rates`),
    ``test/reward/{policy,reference}/*`` and ``test/drift``, the mean squared difference of the two velocities: a win
    rate that comes with much drift is suspect. It shows a table, a chart and the first prompts' videos, and writes
    ``win_rate.json``.

    Args:
        reward_model: Folder or hub id of the reward model that compares, in this package's format or an official one's.
        prompts: CSV file with a column ``prompt`` (and ``image`` for image-to-video), or text file with one prompt a
            line.
        sampling: Size and sampler of the videos.
        samples: Number of noises per prompt; with one there is no superiority.
        out: Folder for ``win_rate.json``; the run's folder if not given.
        backbone: Folder or hub id of the reward model's backbone; where it was in training if not given.
        template: Template file of an official reward model.
        clips: Number of prompts whose first videos are shown, the policy's beside the reference's.
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
        clips: int = 4,
    ) -> None:
        if samples < 1:
            raise VideoAlignError(f"WinRate.samples must be at least 1, got {samples}")
        if clips < 0:
            raise VideoAlignError(f"WinRate.clips must be at least 0, got {clips}")
        self.clips = clips
        self.reward_model, self.backbone = reward_model, backbone
        self.template = Template.load(template) if template else None
        super().__init__(read_items(prompts), sampling)
        self.samples, self.out = samples, out
        self.results: dict[str, dict] = {}
        self._films: dict[tuple[int, str], np.ndarray] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a module that aligns no generator, or a size that it cannot sample, before the test begins."""
        if stage == "test":
            self.check_size(pl_module)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sample, score and compare. Collective: every rank must call it."""
        sampler = PromptSampler(pl_module, self.sampling, self.items)
        judge = load_reward(self.reward_model, self.backbone, self.template).to(pl_module.device)
        judge.need_statistics(self.reward_model)
        if judge.processor.template.image and not self.items[0].image:
            raise EverywhereError(f"{self.reward_model} is shown images, and WinRate.prompts names none")
        found: dict[tuple[int, int], list] = {}
        self._films = {}
        for batch, policy, reference in sampler.dealt("WinRate", self.samples):
            drift = sampler.drift(reference, batch)
            rewards = [
                self._rewards(judge, pl_module, latents, batch, side)
                for side, latents in (("policy", policy), ("reference", reference))
            ]
            for item, *row in zip(batch, *(r.tolist() for r in rewards), drift.tolist()):
                found[item] = row
        self._films = merged(self._films)
        self._report(trainer, pl_module, merged(found))

    def _rewards(
        self, judge, module: L.LightningModule, latents: Tensor, batch: list[tuple[int, int]], side: str
    ) -> Tensor:
        """(N, 4): normalised rewards of decoded videos, and their sum."""
        names = [f"{side}, prompt {self.prompts[p][:60]}, noise {n}" for p, n in batch]
        generator = require(module, AlignsGenerator, "callbacks.WinRate").generator
        processor, videos = judge.processor, generator.decode(latents, names).cpu()
        self._films |= {(p, side): frames_of(v) for (p, n), v in zip(batch, videos) if n == 0 and p < self.clips}
        frames = [resample(video, self.sampling.fps, processor.sampling, processor.factor) for video in videos]
        inputs = processor(frames, [self.prompts[p] for p, _ in batch], self._images(judge, batch))
        inputs = {name: tensor.to(module.device) for name, tensor in inputs.items()}
        with torch.no_grad():
            rewards = judge.normalise(judge(**inputs)).cpu()
        return torch.cat([rewards, rewards.sum(1, keepdim=True)], 1)

    def _images(self, judge, batch: list[tuple[int, int]]) -> list[Tensor]:
        """The images that videos begin with, as the judge is shown them; none where it is not."""
        processor, files = judge.processor, [self.items[p].image for p, _ in batch]
        if not processor.template.image:
            return []
        return [load_image(file.read_bytes(), processor.sampling, processor.factor, str(file)) for file in files]

    def _report(self, trainer: L.Trainer, module: L.LightningModule, found: dict) -> None:
        shape = len(self.prompts), self.samples
        rows = [found[p, n] for p in range(shape[0]) for n in range(shape[1])]
        policy, reference = (torch.tensor([row[i] for row in rows]).unflatten(0, shape) for i in (0, 1))  # (P, N, 4)
        drift = sum(row[2] for row in rows) / len(rows)
        self._check(policy, reference, drift)
        self.results = win_rates(policy, reference)
        for column, row in self.results.items():
            module.log(f"test/win_rate/{column}", row["win_rate"])
            module.log(f"test/superiority/{column}", row["superiority"])
            module.log(f"test/reward/policy/{column}", row["policy"])
            module.log(f"test/reward/reference/{column}", row["reference"])
        module.log("test/drift", drift)
        run = folder_of(trainer)  # collective
        if trainer.is_global_zero:
            self._save(Path(self.out) if self.out else run, drift)
            if media := media_of(trainer):
                media.text("test/win_rate", table(self.results, drift))
                media.figure("test/win_rate", chart(self.results))
                self._show(media, found)

    def _show(self, media: Media, found: dict) -> None:
        """Show the first videos of a few prompts, with their normalised rewards."""
        for number, prompt in enumerate(self.prompts[: self.clips]):
            sides = {side: self._films[number, side] for side in ("policy", "reference")}
            rows = [[side, *(f"{r:+.2f}" for r in row)] for side, row in zip(sides, found[number, 0])]
            media.clip(f"test/samples/{number}", Clip(sides, self.sampling.fps, prompt, [["", *COLUMNS], *rows], 128))

    def _check(self, policy: Tensor, reference: Tensor, drift: float) -> None:
        if not (policy.isfinite().all() and reference.isfinite().all()):
            raise EverywhereError(
                f"{self.reward_model}: the rewards of sampled videos are not finite; model or generator is broken"
            )
        if not math.isfinite(drift):
            raise EverywhereError(
                "the drift of the policy from the reference is not finite; policy or reference is broken"
            )

    def _save(self, folder: Path | None, drift: float) -> None:
        """Print the table; write the JSON file, if there is a folder for it."""
        saved = ""
        if folder:
            own = {"samples": self.samples, "reward_model": self.reward_model, "prompts": self.prompts}
            write_json(folder / "win_rate.json", {"columns": self.results, "drift": drift, **own})
            saved = f"\nsaved in {folder / 'win_rate.json'}"
        print(f"\n{table(self.results, drift)}{saved}", flush=True)


def table(results: dict[str, dict], drift: float) -> str:
    """Win rates as a Markdown table.

    Args:
        results: What :func:`~videoalign.models.win_rates.win_rates` returns.
        drift: Mean squared difference of the velocities of policy and reference.
    """
    head = ["", "win rate, same noise", "95 %", "superiority, other noise", "95 %", "policy", "reference"]
    rows = []
    for column, row in results.items():
        wins, other = (interval_text(row[f"{kind}_interval"], 2) for kind in ("win_rate", "superiority"))
        shares = [f"{row['win_rate']:.3f}", wins, f"{row['superiority']:.3f}", other]
        rows.append([column, *shares, f"{row['policy']:+.3f}", f"{row['reference']:+.3f}"])
    note = f"drift from the reference (mean squared velocity difference): {drift:.4g}"
    return f"{markdown_table(head, rows)}\n\n{note}"


def chart(results: dict[str, dict]) -> Figure:
    """Win rate and superiority per column, with intervals.

    Args:
        results: What :func:`~videoalign.models.win_rates.win_rates` returns.
    """
    figure, (axis,) = panels(size=(6, 3.4))
    kinds = {"same noise": "win_rate", "other noise": "superiority"}
    series = {
        label: [Interval(row[kind], *row[f"{kind}_interval"]) for row in results.values()]
        for label, kind in kinds.items()
    }
    bars(axis, list(results), series, [BLUE, ORANGE])
    reference_line(axis, 0.5, "no difference")
    axis.set(ylim=(0, 1), ylabel="policy wins")
    legend_below(figure)
    return figure
