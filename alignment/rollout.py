"""The samples of an iteration of on-policy training, and what is said of them.

Legend: N samples of an iteration in G groups; n of them on this rank; B of a batch; C, F, H, W of latents.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..datamodules.data_ranks import merged
from ..datamodules.prompt_groups import Drawn
from ..models.family import Condition


@dataclass
class Rollout:
    """The samples of an iteration that this rank has.

    Attributes:
        iteration: Number of the iteration.
        drawn: What each of the n samples is.
        latents: Normalised latents (n, C, F, H, W), in main memory.
        advantages: Advantages (N,) of all samples, in the order of :meth:`.PromptGroups.drawn`.
        order: Advantages (N,) before they are clipped, which tell the best and the worst of a group apart.
        places: Places (n,) of this rank's samples among all.
        scores: Scores (N,) of all samples, by name.
        more: Further tensors (n, ...) of an algorithm, in main memory.
    """

    iteration: int
    drawn: list[Drawn]
    latents: Tensor
    advantages: Tensor
    order: Tensor
    places: list[int]
    scores: dict[str, Tensor]
    more: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Noised:
    """Samples at the times that a loss compares velocities at.

    Attributes:
        data: Samples (B, C, F, H, W).
        x: Samples with noise, (B, C, F, H, W).
        t: Times (B,).
        target: Velocities (B, C, F, H, W) from the samples to their noise.
        condition: What they are conditioned on.
        clean: Number of first frames that are an image's; no loss counts them.
    """

    data: Tensor
    x: Tensor
    t: Tensor
    target: Tensor
    condition: Condition
    clean: int

    def counted(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Values (B, C, F, H, W) without the frames that are an image's."""
        return tuple(value[:, :, self.clean :] for value in values)


def exchanged(rollout: Rollout, chosen: Iterable[int]) -> dict[int, Tensor]:
    """Latents (C, F, H, W) of chosen samples, from whichever rank has them. Collective.

    Args:
        rollout: The samples of this rank.
        chosen: Places of the chosen ones among all samples, the same on every rank.

    Returns:
        Latents in main memory, by place.
    """
    wanted = {*chosen}
    # copies: a view would be sent with all samples of its rank behind it
    return merged({place: one.clone() for place, one in zip(rollout.places, rollout.latents) if place in wanted})


def summary(
    scores: Mapping[str, Tensor],
    shares: Mapping[str, Tensor],
    advantages: Tensor,
    groups: Tensor,
    apart: Mapping[str, float],
) -> dict[str, float]:
    """What an iteration's samples are worth, by the names of :class:`.OnPolicy`'s metrics.

    Args:
        scores: Scores (N,) by name.
        shares: Share (N,) of each score in the advantages.
        advantages: Advantages (N,).
        groups: Group (N,) of each sample.
        apart: Diversity of the groups, by the name of its metric.
    """
    found = {name: torch.tensor(value) for name, value in apart.items()}
    by_group = [groups == group for group in groups.unique()]
    for name, value in scores.items():
        found[f"reward/{name}/mean"] = value.mean()
        found[f"reward/{name}/std"] = value.std(correction=0)
        found[f"reward/{name}/group_std"] = torch.stack([value[one].std(correction=0) for one in by_group]).mean()
    for name, value in shares.items():
        found[f"advantage/{name}"] = value.abs().mean()
    found["groups/equal"] = torch.tensor([float(not advantages[one].any()) for one in by_group]).mean()
    return {name: float(value) for name, value in found.items()}


def diversity(features: Mapping[str, Tensor], groups: Sequence[int]) -> dict[str, float]:
    """Mean distance of two samples of a group, per element: of latents about the root of 2 for noise, 0 for copies.

    Collective. Of a group that lies on several ranks, the samples of one rank count.

    Args:
        features: Features (n, ...) of this rank's samples by name, such as their latents.
        groups: Group of each.

    Returns:
        By name the mean over the groups that have two samples or more; without those where there is none.
    """
    of = torch.tensor(groups)
    own = {}
    for name, values in features.items():
        for group in of.unique().tolist():
            together = values[of == group].float().flatten(1)
            if len(together) > 1:
                own[name, group] = float(torch.pdist(together).mean() / together.shape[1] ** 0.5)
    means: dict[str, list[float]] = {}
    for (name, _), mean in merged(own).items():
        means.setdefault(name, []).append(mean)
    return {name: sum(every) / len(every) for name, every in means.items()}
