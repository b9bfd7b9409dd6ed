"""Contracts of on-policy training, between module, DataModule of prompts and callbacks; see :mod:`.contracts`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from .fulfilment import offered_by

if TYPE_CHECKING:
    from torch import Tensor

    from ..models.generator import Generator
    from ..models.scoring import ScoresVideos


@offered_by("a module that trains on its own samples (OnPolicy or a subclass)")
class RollsOut(Protocol):
    """A module that samples videos of groups of prompts, and trains on them: OnPolicy and its subclasses.

    PromptGroups asks it, to know how many batches an iteration has.
    """

    @property
    def trains_on(self) -> str:
        """What a row of a batch is: a ``samples`` of a group, or a whole one of the ``groups``."""

    @property
    def updates(self) -> int:
        """Optimizer steps of an iteration."""

    @property
    def passes(self) -> int:
        """Passes over all rows within an optimizer step."""


@offered_by("a module that trains on its own samples (OnPolicy or a subclass)")
class ShowsRollout(RollsOut, Protocol):
    """A module that keeps the samples of its iteration: OnPolicy and its subclasses.

    The callbacks GroupExtremes, SideBySide and HeldOutPrompts ask it.
    """

    @property
    def sampling(self) -> Any:
        """Size of the videos, and how they are sampled."""

    @property
    def generator(self) -> Generator:
        """The pipeline in this package's terms."""

    @property
    def rollout(self) -> Any:
        """The iteration's samples on this rank: what was ``drawn``, ``latents``, ``places``, ``advantages``, ``order``,
        ``scores`` and the number of the ``iteration``."""

    def latents_at(self, places: Sequence[int]) -> Mapping[int, Tensor]:
        """Latents (C, F, H, W) of samples by their place among all, from whichever rank has them. Collective.

        Args:
            places: Places of the samples, the same on every rank.
        """


@offered_by("a module that trains against rewards of its own samples (OnPolicy or a subclass)")
class HasRewards(Protocol):
    """A module that trains against rewards: OnPolicy and its subclasses.

    The callback HeldOutPrompts asks it, to score held-out prompts by them too.
    """

    @property
    def scorers(self) -> Mapping[str, ScoresVideos]:
        """Rewards by name."""


@offered_by("a DataModule of groups of prompts (PromptGroups or a subclass)")
class DrawsGroups(Protocol):
    """A DataModule that says which samples an iteration of on-policy training draws: PromptGroups.

    OnPolicy and the callback GroupExtremes ask it.
    """

    @property
    def items(self) -> Sequence[Any]:
        """Prompts, each with its ``prompt`` and maybe ``image``."""

    @property
    def groups(self) -> int:
        """Groups of an iteration."""

    @property
    def seed(self) -> int:
        """Seed of all that is drawn."""

    def all_prompts(self) -> Sequence[str]:
        """Texts of the prompts."""

    def drawn(self, iteration: int) -> Sequence[Any]:
        """All samples of an iteration, group after group, each with its ``group``, ``item``, ``number`` and two seeds.

        Args:
            iteration: Number of the iteration.
        """

    def rounds(self) -> Any:
        """Size of an iteration's training on a rank: ``rows``, ``passes``, and ``accumulated`` batches of a step."""
