"""Online Flow-DPO: the best sample of each group against its worst."""

from typing import Any

import torch
from torch import Tensor

from .. import VideoAlignError
from ..datamodules.data_ranks import data_ranks
from ..datamodules.prompt_groups import Drawn, Places
from ..models.flow_losses import BetaSchedule, ConstantBeta, dpo_losses, implicit_rewards
from .on_policy import OnPolicy
from .rollout import Rollout, exchanged


class OnlineDPO(OnPolicy):
    r"""Flow-DPO on pairs of the policy's own samples: of each group, the best against the worst by their advantage.

    The loss is :class:`.FlowDPO`'s (VideoAlign, Eq. 8), with pairs that are drawn anew in each iteration (Guo et al.,
    2024, for language models). A group whose samples are all equally good is no pair, and adds nothing.

    Further metrics: those of :class:`.FlowDPO`, over the groups that are pairs.

    Args:
        beta: Schedule of beta over time; if not given, a constant 100.
        refresh: Number of iterations after which the loss's reference becomes the policy as it then is; never if not
            given. Callbacks compare with the policy that training started from.
        **kwargs: Arguments of :class:`.OnPolicy`.
    """

    needs_reference = True
    trains_on = "groups"

    def __init__(self, beta: BetaSchedule | None = None, refresh: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if refresh is not None and refresh < 1:
            raise VideoAlignError(f"model.refresh is a number of iterations, at least 1, or null, got {refresh}")
        self.beta, self.refresh = beta or ConstantBeta(100.0), refresh
        self._refreshed: dict[str, Tensor] = {}
        """Tensors of a reference that was refreshed."""
        self._pairs: list[tuple[Drawn, Tensor, bool]] = []
        """For each group of this rank its best sample, latents (2, C, F, H, W) of both ends, and if they differ."""

    def as_refreshed(self) -> Any:
        """The loss's reference for a ``with`` block, without gradients; callbacks go on to measure against the base."""
        return self.as_tensors(self._refreshed) if self._refreshed else self.as_reference()

    def roll_out(self, iteration: int) -> Rollout:
        """Sample, score, and bring the best and the worst of each group together. Collective."""
        rollout = super().roll_out(iteration)
        every = self.trainer.datamodule.drawn(iteration)
        rank, ranks = data_ranks(self.trainer)
        size = len(every) // (every[-1].group + 1)
        of_group = rollout.order.view(-1, size)  # (G, K)
        firsts = torch.arange(len(of_group)) * size
        ends = torch.stack([firsts + of_group.argmax(1), firsts + of_group.argmin(1)], 1)  # (G, 2)
        latents = exchanged(rollout, ends.flatten().tolist())
        self._pairs, own = [], len(of_group) // ranks
        for group in range(rank * own, (rank + 1) * own):
            best, worst = ends[group].tolist()
            differ = bool(rollout.order[best] > rollout.order[worst])
            self._pairs.append((every[best], torch.stack([latents[best], latents[worst]]), differ))
        return rollout

    def objective(self, rollout: Rollout, places: Places) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses (B,) of pairs, and values (2, B) or (B,) to log; arguments as in :meth:`.OnPolicy.objective`."""
        pairs = [self._pairs[row] for row in places.rows]
        best = [one for one, _, _ in pairs]
        latents = torch.stack([both for _, both, _ in pairs], 1).to(self.device)  # (2, B, C, F, H, W)
        seeds, conditions = self.draws(best, places), self.conditions(best)
        with self.as_refreshed() as net:
            reference = self.errors(latents, seeds, conditions, net)[0]
        errors, t = self.errors(latents, seeds, conditions)
        rewards = implicit_rewards(errors, reference, self.beta(t))
        margins = rewards[0] - rewards[1]
        return dpo_losses(rewards), {
            "rewards/chosen": rewards[0],
            "rewards/rejected": rewards[1],
            "rewards/margins": margins,
            "rewards/accuracies": (margins > 0).float() + 0.5 * (margins == 0),
        }

    def unlike(self, rollout: Rollout, places: Places) -> Tensor:
        """Whether best and worst differ, (B,); arguments as in :meth:`.OnPolicy.unlike`."""
        return torch.tensor([self._pairs[row][2] for row in places.rows], device=self.device)

    def follow(self, iteration: int) -> None:
        """Begin an iteration, with the policy as the reference where it is time to; see :meth:`.OnPolicy.follow`."""
        super().follow(iteration)
        if self.refresh and iteration and iteration % self.refresh == 0:
            self._refreshed = self.kept()

    def further_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Tensors by name that checkpoints keep besides those that train."""
        return {**super().further_tensors(), "reference": self._refreshed}

    def take_further(self, found: dict[str, dict[str, Tensor]]) -> None:
        """Take tensors of a checkpoint back."""
        super().take_further(found)
        self._refreshed = found["reference"]
