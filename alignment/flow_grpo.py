"""Flow-GRPO and its relatives: policy gradients on the stochastic steps of sampling."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import VideoAlignError
from ..datamodules.prompt_groups import Drawn, Places
from ..models.backprop import chain_times
from ..models.family import Condition, Step
from ..models.flow import TimeLaw, draw_seed, expand, normal
from ..models.policy_losses import clipped_losses, guarded_ratios
from ..models.scoring import failing_as
from ..models.sde import SDE, AllSteps, Diffusion, FlowSDE, Window
from ..models.shifted_schedule import shifted
from .on_policy import OnPolicy
from .rollout import Rollout


class FlowGRPO(OnPolicy):
    r"""Flow-GRPO: sampling with noise in some of its steps, and the policy gradient of these steps (Liu et al., 2025).

    .. math:: \rho = \frac{\pi_\theta(x_{t'}|x_t)}{\pi_\text{old}(x_{t'}|x_t)}, \qquad
        L = \max(-A\rho, -A\,\mathrm{clip}(\rho, 1\pm\epsilon)) + \lambda\,\mathrm{KL}

    with log-probabilities that are means over elements. The steps between are Euler's, whatever the pipeline's own
    scheduler is; its schedule of times is kept. A step's mean and log-probability are computed in fp32, for policy and
    behaviour policy on the same batch: at the first update of an iteration every ratio is exactly 1, in any precision.

    A pass over the samples trains one of the window's steps, so that :attr:`passes` is their number. Further metrics:
    ``ratio``, ``clipped`` (share of the ratios beyond the clip), ``log_ratio/max``, and ``kl`` where it counts.

    Args:
        sde: Which noise a stochastic step has; Flow-GRPO's, if not given.
        window: Which steps are stochastic, and train; all but the last, if not given.
        clip: Largest distance of a ratio from 1 that is still learnt from, in (0, 1).
        guard: Whether ratios are those of GRPO-Guard, whose losses are weighted by one over the step's length.
        kl: Weight of the divergence from the reference, not negative; its size depends on ``kl_unit``.
        kl_unit: What the squared difference of the means is divided by: ``variance``, twice the step's (flow_grpo's
            Wan); ``level``, twice the squared noise level, without the step's length (flow_grpo's SD3); or ``none``.
        halves: Whether only the best and the worst quarter of each group train.
        **kwargs: Arguments of :class:`.OnPolicy`, but for ``passes``.
    """

    needs_reference = True
    trains_guided = noisy_steps = True

    def __init__(
        self,
        sde: SDE | None = None,
        window: Window | None = None,
        clip: float = 1e-3,
        guard: bool = False,
        kl: float = 0.0,
        kl_unit: Literal["variance", "level", "none"] = "variance",
        halves: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 < clip < 1:
            raise VideoAlignError(f"model.clip must lie in (0, 1), got {clip}")
        if not (math.isfinite(kl) and kl >= 0):
            raise VideoAlignError(f"model.kl must not be negative, got {kl}")
        self.sde, self.window = sde or FlowSDE(), window or AllSteps()
        self.clip, self.guard, self.kl, self.kl_unit, self.halves = clip, guard, kl, kl_unit, halves
        if kwargs.get("passes", 1) != 1:
            raise VideoAlignError("model.passes is the number of the window's steps; leave it out")
        if self.times != TimeLaw():
            raise VideoAlignError(
                f"model.times is not read: {type(self).__name__} trains the times of the sampler's steps, and "
                "model.window says which; leave model.times out"
            )
        self.passes = len(self._steps(0, 0))
        if guard and not isinstance(self.sde, Diffusion):
            raise VideoAlignError(
                f"model.guard takes the bias out of ratios of normal densities, and those of {type(self.sde).__name__} "
                "are not normalised: choose another model.sde, or leave guard out"
            )

    def stochastic(self, iteration: int) -> list[int]:
        """Numbers of the steps that are stochastic in an iteration, ascending; always equally many.

        Args:
            iteration: Number of the iteration.

        Raises:
            VideoAlignError: If the window does not lie within the steps.
        """
        found = self._steps(iteration, draw_seed("window", self.trainer.datamodule.seed, iteration))
        if len(found) != self.passes:
            raise VideoAlignError(
                f"model.window ({type(self.window).__name__}) gave {len(found)} steps in iteration {iteration} and "
                f"{self.passes} before; it must always give as many"
            )
        return found

    def _steps(self, iteration: int, seed: int) -> list[int]:
        steps, who = self.sampling.steps, f"model.window ({type(self.window).__name__})"
        with failing_as(f"{who} failed"):
            found = list(self.window.steps(steps, iteration, seed))
        ascending = all(type(n) is int for n in found) and found == sorted({*found})
        if not found or not ascending or not 0 <= found[0] <= found[-1] < steps:
            raise VideoAlignError(f"{who} gave {found}; it gives numbers of steps from 0 to {steps - 1}, ascending")
        return found

    # --- sampling with noise ----------------------------------------------------------------------------------------

    def sample(self, drawn: Sequence[Drawn]) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents (B, C, F, H, W), and latents ``before`` and ``after`` the stochastic steps, (B, passes, C, F, H, W).

        Args:
            drawn: What is sampled.
        """
        generator = self.generator
        condition, noise, null = self.start(drawn)
        x, times = generator.with_image(noise.float(), condition), self.schedule(noise)
        before, after = [], []
        stochastic = {*self.stochastic(self._iteration)}
        for number, (t, following) in enumerate(zip(times[:-1].tolist(), times[1:].tolist())):
            velocity = self._velocity(x, t, condition, null)
            if number not in stochastic:
                x = generator.with_image(x + (following - t) * velocity, condition)
                continue
            mean, std = self._moments(x, velocity, number, times)
            before.append(x)
            seeds = [draw_seed("step", one.seed, number) for one in drawn]
            fresh = torch.stack([normal(x.shape[1:], torch.Generator(x.device).manual_seed(seed)) for seed in seeds])
            x = generator.with_image(mean + expand(std, mean) * fresh, condition)
            after.append(x)
        return x, {"before": torch.stack(before, 1), "after": torch.stack(after, 1)}

    def schedule(self, noise: Tensor) -> Tensor:
        """Times (steps + 1,) of sampling, from 1 to 0, in float64, of :func:`.chain_times`: no step is a remainder.

        Args:
            noise: Latents (B, C, F, H, W), on which the times of some families depend.
        """
        scheduler, shift = self.generator.pipeline.scheduler, self.sampling.shift
        scheduler = scheduler if shift is None else shifted(scheduler, shift)
        times = chain_times(self.generator, scheduler, self.sampling.steps, noise).double().cpu()
        times[0], times[-1] = 1.0, 0.0  # samples begin as pure noise; some schedulers begin and end a little inside
        return times

    def _velocity(
        self, x: Tensor, t: float, condition: Condition, null: Condition | None, net: nn.Module | None = None
    ) -> Tensor:
        """Velocity (B, C, F, H, W) with the guidance that samples are drawn with."""
        if null is not None:
            null = condition | {name: part.expand(len(x), *part.shape[1:]) for name, part in null.items()}
        time = torch.full((len(x),), t, dtype=torch.float64, device=x.device)
        step = Step(x, time, torch.tensor(t), condition, null, self.sampling.cfg_scale, net or self.policy)
        return self.generator._step_velocity(step)

    def _moments(self, x: Tensor, velocity: Tensor, number: int, times: Tensor) -> tuple[Tensor, Tensor]:
        t, following = (times[i].to(x.device).expand(len(x)) for i in (number, number + 1))
        return self.sde.moments(x, velocity, t, following, float(times[1]))

    # --- training on the noisy steps --------------------------------------------------------------------------------

    def roll_out(self, iteration: int) -> Rollout:
        """Sample and score; the window's place belongs to the iteration. Collective."""
        self._iteration = iteration
        rollout = super().roll_out(iteration)
        if self.halves:
            rollout.more["chosen"] = self._ends(rollout)
        return rollout

    def _ends(self, rollout: Rollout) -> Tensor:
        """Whether each of this rank's samples is among the best or worst quarter of its group, (n,)."""
        order = rollout.order.view(self.trainer.datamodule.groups, -1).argsort(1).argsort(1)  # (G, K)
        size = order.shape[1]
        quarter = max(1, size // 4)
        return ((order < quarter) | (order >= size - quarter)).flatten()[rollout.places]

    def objective(self, rollout: Rollout, places: Places) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses (B,) of samples at one of the window's steps, and values (B,) to log."""
        rows, number = places.rows, self.stochastic(rollout.iteration)[places.passed]
        drawn = [rollout.drawn[row] for row in rows]
        advantages = rollout.advantages[[rollout.places[row] for row in rows]].to(self.device).float()
        x, after = (rollout.more[name][rows, places.passed].to(self.device) for name in ("before", "after"))
        condition, noise, null = self.start(drawn)
        times, clean = self.schedule(noise), self.generator.clean_frames(condition)
        t = float(times[number])

        def moments(net: nn.Module | None = None) -> tuple[Tensor, Tensor]:
            mean, std = self._moments(x, self._velocity(x, t, condition, null, net), number, times)
            return mean[:, :, clean:], std

        with self.as_old() as net:
            old, std = moments(net)
        reference = None
        if self.kl:
            with self.as_reference() as net:
                reference = moments(net)[0]
        mean, _ = moments()
        sample = after[:, :, clean:]
        change = self.sde.log_prob(sample, mean, std) - self.sde.log_prob(sample, old, std)
        ratios = guarded_ratios(change, mean, old, std) if self.guard else torch.exp(change)
        losses = clipped_losses(ratios, advantages, self.clip)
        length = t - float(times[number + 1])
        if self.guard:
            losses = losses / length
        values = {
            "ratio": ratios,
            "clipped": ((ratios - 1).abs() > self.clip).float(),
            "log_ratio/max": change.abs(),
        }
        if reference is not None:
            per = {"variance": 2 * std.square(), "level": 2 * std.square() / length, "none": torch.ones_like(std)}
            values["kl"] = (mean - reference).square().flatten(1).mean(1) / per[self.kl_unit]
            losses = losses + self.kl * values["kl"]
        return losses, values

    def unlike(self, rollout: Rollout, places: Places) -> Tensor:
        """Rows (B,) that train; arguments as in :meth:`.OnPolicy.unlike`."""
        unlike = super().unlike(rollout, places)
        return unlike & rollout.more["chosen"][places.rows].to(self.device) if self.halves else unlike
