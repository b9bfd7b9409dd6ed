"""Training of a generator on its own samples: sample groups, score them, train on them, again; base of the algorithms.

An *iteration* samples K videos of each of G prompts from the behaviour policy, scores them by one reward or several,
turns scores into advantages within each group, and takes :attr:`OnPolicy.updates` optimizer steps on them. It is an
epoch of :class:`~videoalign.datamodules.prompt_groups.PromptGroups`, so that Lightning counts, saves and resumes
iterations.

The behaviour policy is kept as the tensors that train (the adapters), never as a copy of the generator. All draws
belong to (seed, iteration, prompt, number): a run that was stopped anywhere samples the same videos again, and any
number of ranks samples those of one.

Legend: N = G K samples of an iteration; n of them on this rank; S sides of a pair; C, F, H, W of latents.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from .. import VideoAlignError
from ..bars import Bar
from ..callbacks.prompt_sampler import PromptSampler, Sampling
from ..datamodules.contracts import DrawsGroups, require
from ..datamodules.data_ranks import data_ranks, merged
from ..datamodules.prompt_groups import Drawn, Places
from ..models.advantages import Advantages
from ..models.family import Condition, Encoded
from ..models.flow import draw, draw_seed, interpolate
from ..models.rows_on_disk import Rows
from ..models.scoring import Rated, ScoresVideos, check_rewards, placed, rated_latents
from ..models.whole import refuse_plan
from .behaviour import KeepsPolicies
from .rollout import Noised, Rollout, diversity, exchanged, summary

LATENTS = "latents"
"""Name of the samples' latents among what is kept of them."""


class OnPolicy(KeepsPolicies):
    """Samples groups of videos, scores them, and trains on them; an algorithm defines :meth:`objective`.

    Metrics of an iteration: ``reward/NAME/mean`` and ``/std`` of all samples, ``reward/NAME/group_std`` (mean over the
    groups), ``advantage/NAME`` (mean absolute share of each reward in the advantages), ``groups/equal`` (share of the
    groups whose samples are all equally good; they change nothing), ``groups/diversity`` (:func:`.diversity` of
    latents; where it falls, the policy collapses) and ``groups/diversity/REWARD`` (of a reward model's features). Of
    each step: ``train/loss`` and those of the algorithm.

    Args:
        rewards: What scores the samples, by name.
        advantages: How scores become advantages; by default all rewards count alike.
        sampling: Size of the videos, and how they are sampled; ``batch_size`` of them at once. Its seed is not used.
        updates: Optimizer steps of an iteration, each on all of its samples.
        passes: Passes over the samples within a step, each at other times and noise.
        release: Whether rewards leave the device while the generator works.
        disk_above: Size in GiB above which a rank's latents of an iteration are kept in a file under the Trainer's
            ``default_root_dir``, not in memory; never if not given. FlowGRPO's latents before and after its stochastic
            steps count by themselves.
        **kwargs: Arguments of :class:`.KeepsPolicies`.
    """

    trains_on: Literal["samples", "groups"] = "samples"
    """What a row of a batch is."""

    trains_guided = False
    """Whether the objective compares guided velocities where samples are guided."""

    noisy_steps = False
    """Whether sampling draws noise in its steps."""

    def __init__(
        self,
        rewards: dict[str, ScoresVideos],
        sampling: Sampling,
        advantages: Advantages | None = None,
        updates: int = 1,
        passes: int = 1,
        release: bool = False,
        disk_above: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        refuse_plan(type(self).__name__)
        for name, value in (("updates", updates), ("passes", passes)):
            if value < 1:
                raise VideoAlignError(f"model.{name} must be at least 1, got {value}")
        if self.generator.boundary is not None:
            raise VideoAlignError(
                f"{type(self).__name__} samples from the transformer that trains, and this generator has two experts; "
                "train it on latents of its samples (FlowDPO, FlowRWR), or another generator"
            )
        if not rewards:
            raise VideoAlignError("model.rewards is empty: name what scores the samples")
        self.scorers, self.sampling = dict(rewards), sampling.complete()
        self.advantages = advantages
        weighted = advantages.weights if advantages else {}
        if lacking := [name for name in weighted if "/" not in name or name.split("/")[0] not in rewards]:
            raise VideoAlignError(
                f"model.advantages.weights names {', '.join(lacking)}, but the rewards under model.rewards are "
                f"{', '.join(rewards)}; a weight's name is REWARD/NAME, such as {next(iter(rewards))}/VQ"
            )
        if disk_above is not None and not disk_above >= 0:
            raise VideoAlignError(f"model.disk_above is a size in GiB, or null; got {disk_above}")
        self.updates, self.passes, self.release, self.disk_above = updates, passes, release, disk_above
        self.rollout: Rollout | None = None
        self._sampler: PromptSampler | None = None

    # --- set up -----------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse what cannot work together."""
        super().setup(stage)
        if stage in ("validate", "test"):
            raise VideoAlignError(
                f"{type(self).__name__} has nothing to be validated or tested on: HeldOutPrompts measures it while it "
                "trains, and `videoalign compare` what it has exported"
            )
        trainer = self.trainer
        groups = require(trainer.datamodule, DrawsGroups, type(self).__name__)
        if trainer.accumulate_grad_batches != 1:
            raise VideoAlignError(
                f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}, but an iteration's samples "
                "make model.updates optimizer steps, whatever their number; leave it at 1"
            )
        # 1 is one batch, 1.0 all of them; overfit_batches sets the same limit
        if isinstance(limit := trainer.limit_train_batches, int) or limit != 1.0 or trainer.fast_dev_run:
            raise VideoAlignError(
                "trainer.limit_train_batches, overfit_batches and fast_dev_run end an iteration within its optimizer "
                "step; make it smaller (data.groups, data.samples), or end after trainer.max_epochs iterations"
            )
        if trainer.reload_dataloaders_every_n_epochs:
            raise VideoAlignError(
                "trainer.reload_dataloaders_every_n_epochs would begin with iteration 0 again and again; leave it out"
            )
        if any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):
            raise VideoAlignError(
                "trainer.callbacks has a GradientAccumulationScheduler, but an iteration's samples make model.updates "
                "optimizer steps; leave it out"
            )
        trainer.accumulate_grad_batches = groups.rounds().accumulated
        if self.lora is not None and self.lora.dropout:
            raise VideoAlignError(
                f"model.lora.dropout is {self.lora.dropout}: policies are compared on the same samples, and dropout "
                "would make them differ by chance; set it to 0"
            )
        if getattr(groups, "shared_noise", False) and not self.noisy_steps:
            raise VideoAlignError(
                f"data.shared_noise would make all samples of a group alike: {type(self).__name__} samples without "
                "noise in its steps; leave it out"
            )
        generator, s = self.generator, self.sampling
        generator.latent_shape(s.num_frames, s.height, s.width)
        generator.require("vae")
        s.check_scales(generator)
        s.check_fps(generator)
        if max(s.cfg_scale, s.cfg_scale_2 or 1) > 1 and not self.trains_guided:
            rank_zero_warn(
                f"model.sampling.cfg_scale is {s.cfg_scale:g}, but {type(self).__name__} trains the velocity without "
                "guidance: it learns from its samples what guidance does, whatever the rewards say; win rates without "
                "guidance rise by that alone"
            )
        check_rewards(self.scorers, groups.all_prompts(), s.fps, "model.sampling.fps")

    def on_fit_start(self) -> None:
        """Encode the prompts: before the first samples, and in the precision that they are encoded in elsewhere."""
        super().on_fit_start()
        self.sampler  # noqa: B018  made when it is first asked for

    @property
    def sampler(self) -> PromptSampler:
        """Prompts as the generator takes them, and their noise."""
        if self._sampler is None:
            self._sampler = PromptSampler(self, self.sampling, self.trainer.datamodule.items)
        return self._sampler

    # --- samples ----------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Places, batch_idx: int) -> None:
        """Sample and score at the beginning of an iteration, or where a resumed run stands in the middle of one."""
        super().on_train_batch_start(batch, batch_idx)
        if batch.first:
            self.follow(batch.iteration)
        if self.rollout is None or self.rollout.iteration != batch.iteration:
            self.rollout = self.roll_out(batch.iteration)

    @torch.no_grad()
    def roll_out(self, iteration: int) -> Rollout:
        """Sample this rank's share of an iteration and score it. Collective: advantages compare whole groups.

        Args:
            iteration: Number of the iteration.
        """
        every = self.trainer.datamodule.drawn(iteration)
        rank, ranks = data_ranks(self.trainer)
        own = len(every) // ranks
        places = list(range(rank * own, (rank + 1) * own))  # in a row, so that most groups lie on one rank
        drawn, size = [every[place] for place in places], self.sampling.batch_size
        chunks = [drawn[i : i + size] for i in range(0, len(drawn), size)]
        bar = Bar(f"iteration {iteration}: samples", len(drawn)) if self.trainer.is_global_zero else None
        rows = Rows(len(drawn), self.disk_above, self.trainer.default_root_dir)
        with self.as_old(), self.trainer.precision_plugin.forward_context():
            for chunk in chunks:
                found, further = self.sample(chunk)
                for name, value in {LATENTS: found, **further}.items():
                    rows.add(name, value)
                if bar:
                    bar.update(len(chunk))
        if bar:
            bar.close()
        more = rows.tensors
        joined = more.pop(LATENTS)  # (n, C, F, H, W)
        rated = self.score(drawn, joined)
        whole = {name: self.gathered(value, places, len(every)) for name, value in rated.scores.items()}
        groups = torch.tensor([one.group for one in every])
        if self.advantages is None:
            self.advantages = Advantages(weights=dict.fromkeys(whole, 1.0))
        advantages, shares = self.advantages(whole, groups)
        order = self.advantages.unclipped(whole, groups)[0]
        features = {f"groups/diversity/{key}": values for key, values in rated.features.items()}
        apart = diversity({"groups/diversity": joined, **features}, [one.group for one in drawn])
        for name, value in summary(whole, shares, advantages, groups, apart).items():
            self.log(name, value, on_step=True, on_epoch=False, batch_size=1)
        return Rollout(iteration, drawn, joined, advantages, order, places, whole, more)

    def sample(self, drawn: Sequence[Drawn]) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents (B, C, F, H, W) of the behaviour policy, and further tensors (B, ...) that the objective needs.

        Args:
            drawn: What is sampled.
        """
        generator, s = self.generator, self.sampling
        condition, noise, null = self.start(drawn)
        options = {name: getattr(s, name) for name in ("steps", "cfg_scale", "cfg_scale_2", "shift")}
        return generator.sample(condition, noise, null=null, **options), {}

    def start(self, drawn: Sequence[Drawn]) -> tuple[Condition, Tensor, Condition | None]:
        """Condition, noise (B, C, F, H, W), and the negative prompt's condition where guidance needs one.

        Args:
            drawn: What is sampled.
        """
        sampler, s = self.sampler, self.sampling
        condition = self.generator.condition(self.conditions(drawn), self.device)
        noise = draw(torch.tensor([one.noise for one in drawn]), sampler.shape, self.device)[1]
        guided = max(s.cfg_scale, s.cfg_scale_2 or 1) > 1
        return condition, noise, self.generator.null_condition(sampler.encoded[-1], self.device) if guided else None

    def conditions(self, drawn: Sequence[Drawn]) -> list[Encoded]:
        """What samples are conditioned on, encoded.

        Args:
            drawn: The samples.
        """
        return [self.sampler.encoded[one.item] for one in drawn]

    def score(self, drawn: Sequence[Drawn], latents: Tensor) -> Rated:
        """Scores (n,) and features (n, F) of samples.

        Args:
            drawn: The samples.
            latents: Their latents (n, C, F, H, W).
        """
        items = self.trainer.datamodule.items
        prompts = [items[one.item].prompt for one in drawn]
        names = [f"{prompt[:60]!r}, sample {one.number}" for prompt, one in zip(prompts, drawn)]
        with placed(self.scorers, self.device, self.release):
            size = self.sampling.batch_size
            return rated_latents(self.scorers, self.generator.decode, latents, prompts, names, size, self.device)

    def latents_at(self, places: Sequence[int]) -> dict[int, Tensor]:
        """Latents of samples by their place, as :func:`.exchanged` gives them. Collective.

        Args:
            places: Places of the samples among all.
        """
        return exchanged(self.rollout, places)

    def gathered(self, values: Tensor, places: Sequence[int], count: int) -> Tensor:
        """Values (count,) of all ranks in the order of their places. Collective.

        Args:
            values: This rank's values (n,).
            places: Their places.
            count: Number of values of all ranks.
        """
        found = merged(dict(zip(places, values.tolist())))
        return torch.tensor([found[place] for place in range(count)], dtype=values.dtype)

    # --- training ---------------------------------------------------------------------------------------------------

    def noised(self, latents: Tensor, drawn: Sequence[Drawn], places: Places) -> Noised:
        """Samples at a time and with noise of their own.

        Args:
            latents: Latents (B, C, F, H, W).
            drawn: What they are.
            places: The batch, whose update and pass the draws belong to.
        """
        uniform, noise = draw(self.draws(drawn, places), latents.shape[1:], latents.device)
        t = self.times(uniform)
        condition = self.generator.condition(self.conditions(drawn), latents.device)
        x = self.generator.with_image(interpolate(latents, noise, t), condition)
        return Noised(latents, x, t, noise - latents, condition, self.generator.clean_frames(condition))

    def batch(self, rollout: Rollout, places: Places) -> tuple[Noised, Tensor]:
        """Samples of a batch with noise, and their advantages (B,).

        Args:
            rollout: The samples of this rank.
            places: The rows of the batch among them, and its update and pass.
        """
        drawn = [rollout.drawn[row] for row in places.rows]
        advantages = rollout.advantages[[rollout.places[row] for row in places.rows]]
        return self.noised(rollout.latents[places.rows].to(self.device), drawn, places), advantages.to(self.device)

    def unlike(self, rollout: Rollout, places: Places) -> Tensor:
        """Whether the groups of a batch's rows have samples that are not equally good, (B,); others teach nothing.

        Args:
            rollout: The samples of this rank.
            places: The batch.
        """
        groups = self.trainer.datamodule.groups
        decided = rollout.advantages.view(groups, -1).any(1)  # (G,)
        rows = [rollout.drawn[row].group for row in places.rows]
        return decided[rows].to(self.device)

    def draws(self, drawn: Sequence[Drawn], places: Places) -> Tensor:
        """Seeds (B,) of times and noise that belong to samples, update and pass.

        Args:
            drawn: The samples.
            places: The batch.
        """
        return torch.tensor([draw_seed("time", one.seed, places.update, places.passed) for one in drawn])

    def velocity(self, at: Noised, net: nn.Module | None = None) -> Tensor:
        """Velocities (B, C, F, H, W) of the policy, or of another transformer.

        Args:
            at: Samples with noise.
            net: Transformer in place of the policy.
        """
        return self.generator.velocity(at.x, at.t, at.condition, net)

    def objective(self, rollout: Rollout, places: Places) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses (B,) of a batch, and values (B,) to log.

        Args:
            rollout: The samples of this rank.
            places: The rows of the batch among them, and its update and pass.
        """
        raise NotImplementedError

    def training_step(self, batch: Places, batch_idx: int) -> Tensor:
        """Loss of a batch, such that an optimizer step takes the mean over all rows and passes."""
        losses, values = self.objective(self.rollout, batch)
        unlike = self.unlike(self.rollout, batch)
        losses = torch.where(unlike, losses, 0.0)
        for name, value in {"loss": losses, **values}.items():
            self.step_means.add(name, value, None if name == "loss" else unlike)
        rounds = self.trainer.datamodule.rounds()
        # Lightning divides by the number of batches; the last one may have fewer rows
        loss = losses.sum() * (rounds.accumulated / rounds.passes) / rounds.rows
        return self.finite(loss, [f"iteration {batch.iteration}, rows {batch.rows}"])
