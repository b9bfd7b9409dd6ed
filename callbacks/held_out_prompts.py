"""Rewards of prompts that are not trained on, also by judges that nothing is trained against: they show hacking."""

from collections.abc import Mapping

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from .. import VideoAlignError
from ..datamodules.contracts import AlignsGenerator, DrawsGroups, HasRewards, offers, require
from ..datamodules.data_ranks import merged
from ..datamodules.prompts import read_items
from ..datamodules.ratings import prompt_key
from ..models.intervals import interval_text, mean_interval
from ..models.number_checks import at_least
from ..models.scoring import ScoresVideos, check_rewards, placed, rated_latents
from .prompt_sampler import PromptSampler, Sampling
from .run_media import media_of
from .watches_policy import WatchesPolicy


class HeldOutPrompts(WatchesPolicy):
    """Samples held-out prompts by policy and reference, from the same noise, and scores both by every reward.

    It logs, under ``held_out/``, ``win_rate/NAME`` (share of the videos that are better than the reference's; equal
    ones count half), ``reward/policy/NAME``, ``reward/reference/NAME`` and ``drift``, the mean squared difference of
    the two velocities; and shows a table with intervals over prompts. Where the rewards that are trained against rise
    here and others fall, they are hacked. It looks at validations or after iterations on own samples
    (:class:`.WatchesPolicy`).

    Args:
        prompts: CSV file with a column ``prompt`` (and ``image`` for image-to-video), or text file with one prompt a
            line.
        sampling: Size of the videos, and how they are sampled.
        rewards: Judges by name, beside the rewards that the module trains against, if it does. They are on the device
            only while they score.
        samples: Number of noises per prompt.
        every: Number of validations (or iterations) from one sampling to the next.
    """

    def __init__(
        self,
        prompts: str,
        sampling: Sampling,
        rewards: dict[str, ScoresVideos] | None = None,
        samples: int = 1,
        every: int = 10,
    ) -> None:
        at_least(1, "HeldOutPrompts.", samples=samples)
        super().__init__(read_items(prompts), sampling, every)
        self.rewards, self.samples = dict(rewards or {}), samples
        self.sampler: PromptSampler | None = None
        self._reference: dict[tuple[int, int], Mapping[str, float]] = {}
        """Rewards of the reference's videos, where it never changes."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse rewards and prompts that do not fit each other or the generator, before training begins."""
        super().setup(trainer, pl_module, stage)
        if stage not in ("fit", "validate"):
            return
        own = self._trained(pl_module)
        if twice := [name for name in self.rewards if name in own]:
            raise VideoAlignError(
                f"HeldOutPrompts.rewards names {', '.join(twice)}, as model.rewards does: give it another name, or "
                "leave it out, because the rewards that are trained against score held-out prompts anyway"
            )
        if not own and not self.rewards:
            raise VideoAlignError("HeldOutPrompts.rewards is empty: name what scores the videos")
        known = trainer.datamodule.all_prompts() if offers(trainer.datamodule, DrawsGroups) else ()
        if shared := {*map(prompt_key, self.prompts)} & {*map(prompt_key, known)}:
            rank_zero_warn(
                f"HeldOutPrompts: {len(shared)} of its prompts are trained on too (such as {min(shared)[:60]!r}), and "
                "tell nothing of others"
            )
        rate = self.sampling.fps, "HeldOutPrompts.sampling.fps"
        check_rewards(own | self.rewards, list(dict.fromkeys(self.prompts)), *rate)

    @staticmethod
    def _trained(module: L.LightningModule) -> dict[str, ScoresVideos]:
        """The rewards that a module trains against."""
        return dict(module.scorers) if offers(module, HasRewards) else {}

    def look(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sample, score and compare. Collective: every rank must call it."""
        if self.sampler is None:
            self.sampler = PromptSampler(pl_module, self.sampling, self.items, again=True)
        sampler, trained = self.sampler, self._trained(pl_module)
        sampled = [  # all of them first, because rewards may not fit beside what sampling needs
            (batch, policy.cpu(), reference.cpu(), sampler.drift(reference, batch).tolist())
            for batch, policy, reference in sampler.dealt(type(self).__name__, self.samples)
        ]
        fixed, release = (getattr(pl_module, name, False) for name in ("reference_is_fixed", "release"))
        found: dict[tuple[int, int], tuple[Mapping[str, float], Mapping[str, float], float]] = {}
        with placed(trained, pl_module.device, release), placed(self.rewards, pl_module.device, release=True):
            for batch, policy, reference, drift in sampled:
                theirs = [self._reference.get(item) for item in batch]
                if None in theirs:
                    theirs = self._scored(pl_module, trained, reference, batch, "reference")
                    self._reference |= dict(zip(batch, theirs)) if fixed else {}
                ours = self._scored(pl_module, trained, policy, batch, "policy")
                found |= dict(zip(batch, zip(ours, theirs, drift)))
        self._report(trainer, pl_module, merged(found))

    def _scored(
        self,
        module: L.LightningModule,
        trained: Mapping[str, ScoresVideos],
        latents: Tensor,
        batch: list[tuple[int, int]],
        side: str,
    ) -> list[dict[str, float]]:
        """Rewards of each of N latents (N, C, F, H, W), by name."""
        prompts = [self.prompts[p] for p, _ in batch]
        names = [f"{side}, prompt {self.prompts[p][:60]!r}, noise {n}" for p, n in batch]
        generator = require(module, AlignsGenerator, f"callbacks.{type(self).__name__}").generator
        every = {**trained, **self.rewards}
        rated = rated_latents(every, generator.decode, latents, prompts, names, len(batch), module.device)
        return [dict(zip(rated.scores, row)) for row in torch.stack([*rated.scores.values()], 1).tolist()]

    def _report(self, trainer: L.Trainer, module: L.LightningModule, found: dict) -> None:
        rows = [found[p, n] for p in range(len(self.prompts)) for n in range(self.samples)]
        if len(names := {frozenset(side) for row in rows for side in row[:2]}) > 1:
            given = " and ".join(sorted(", ".join(sorted(some)) for some in names)[:2])
            raise VideoAlignError(
                f"HeldOutPrompts: rewards have other names for other samples ({given}); a reward gives the same every "
                "time"
            )
        table = []
        for name in rows[0][0]:
            ours, theirs = (torch.tensor([row[side][name] for row in rows], dtype=torch.double) for side in (0, 1))
            wins = (ours > theirs).double() + (ours == theirs).double() / 2
            mean = {"win_rate": wins.mean(), "reward/policy": ours.mean(), "reward/reference": theirs.mean()}
            for kind, value in mean.items():
                module.log(f"held_out/{kind}/{name}", value, on_epoch=True, batch_size=1)
            ends = mean_interval(wins.view(len(self.prompts), -1).mean(1))
            numbers = [f"{float(value):.3f}" for value in mean.values()]
            table.append([name, numbers[0], interval_text(ends), *numbers[1:]])
        drift = sum(row[2] for row in rows) / len(rows)
        module.log("held_out/drift", drift, on_epoch=True, batch_size=1)
        if media := media_of(trainer):
            head = ["reward", "win rate", "95 % over prompts", "mean of the policy", "mean of the reference"]
            media.table("held_out/rewards", head, table)
