"""Prompts for on-policy training: every iteration samples groups of videos of the same prompt, and then trains on them.

An epoch of the loader is one iteration. Its batches hold no videos, but the places of those that the module has
sampled: which of an iteration's samples, in which order, in which pass over them.

Legend: G groups of K samples in an iteration, N = G K; a rank's share are N / ranks samples in a row.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import lightning as L

from .. import VideoAlignError
from ..models.flow import draw_seed
from ..models.number_checks import at_least
from .contracts import HasGenerator, RollsOut, require
from .data_ranks import data_ranks
from .prompts import check_items, read_items


class Drawn(NamedTuple):
    """A sample that an iteration draws.

    Attributes:
        group: Number of its group in the iteration.
        item: Place of its prompt among :attr:`PromptGroups.items`.
        number: Number of the sample in its group.
        seed: Seed of all that is drawn for it, which belongs to (seed, iteration, prompt, number) alone.
        noise: Seed of the noise that it begins with; the same in a group where noise is shared.
    """

    group: int
    item: int
    number: int
    seed: int
    noise: int


class Places(NamedTuple):
    """A batch: what the module trains on next.

    Attributes:
        iteration: Number of the iteration.
        update: Number of the optimizer step within the iteration.
        passed: Number of the pass over the samples within the step.
        rows: Places of samples (or groups) among this rank's.
        first: Whether it is the first batch of its iteration.
    """

    iteration: int
    update: int
    passed: int
    rows: list[int]
    first: bool = False


@dataclass(frozen=True)
class Rounds:
    """Size of an iteration's training on one rank.

    Attributes:
        rows: Number of samples (or groups) of the rank.
        batch_size: Rows of a micro-batch.
        updates: Optimizer steps of an iteration; each sees all rows.
        passes: Passes over the rows within a step, each at times of its own.
        seed: Seed of the order.
    """

    rows: int
    batch_size: int
    updates: int
    passes: int
    seed: int

    @property
    def accumulated(self) -> int:
        """Micro-batches of an optimizer step."""
        return self.passes * -(-self.rows // self.batch_size)

    def batches(self, iteration: int) -> list[Places]:
        """All batches of an iteration, in order.

        Args:
            iteration: Number of the iteration.
        """
        found = []
        for update in range(self.updates):
            for passed in range(self.passes):
                order = list(range(self.rows))
                random.Random(draw_seed(self.seed, "order", iteration, update, passed)).shuffle(order)
                parts = (order[i : i + self.batch_size] for i in range(0, self.rows, self.batch_size))
                found += [Places(iteration, update, passed, rows) for rows in parts]
        return [found[0]._replace(first=True), *found[1:]]


class IterationLoader:
    """Batches of one iteration after the other; knows its place, so that a resumed run goes on in the middle of one.

    Args:
        rounds: Size of an iteration.
        drawn: What decides which samples there are, by the names of the settings.
    """

    def __init__(self, rounds: Rounds, drawn: Mapping[str, int]) -> None:
        self.rounds, self.drawn, self.iteration, self.done = rounds, dict(drawn), 0, 0

    def __len__(self) -> int:
        return self.rounds.updates * self.rounds.accumulated

    def __iter__(self) -> Iterator[Places]:
        for places in self.rounds.batches(self.iteration)[self.done :]:
            self.done += 1
            if self.done == len(self):  # the next state is the next iteration's beginning
                self.iteration, self.done = self.iteration + 1, 0
            yield places

    def state_dict(self) -> dict[str, Any]:
        """The place to go on from."""
        return {"iteration": self.iteration, "done": self.done, "length": len(self), "drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a place.

        Args:
            state: What :meth:`state_dict` gave.

        Raises:
            VideoAlignError: If it stands in the middle of an iteration of another size.
        """
        if state["done"] and state["length"] != len(self):
            raise VideoAlignError(
                f"the checkpoint stands in the middle of an iteration of {state['length']} batches, but now they are "
                f"{len(self)}: continue with the groups, samples, batch_size, updates, passes and number of ranks that "
                "it was written with"
            )
        if state["done"] and (before := state.get("drawn", self.drawn)) != self.drawn:
            other = ", ".join(f"data.{n} {before[n]}, now {v}" for n, v in self.drawn.items() if before[n] != v)
            raise VideoAlignError(
                f"the checkpoint stands in the middle of an iteration of other samples ({other}): continue with the "
                "settings that it was written with"
            )
        self.iteration, self.done = state["iteration"], state["done"]


class PromptGroups(L.LightningDataModule):
    """Prompts to sample groups of videos from, for modules that train on their own samples.

    Prompts are shuffled anew each time that all of them were used. All draws belong to (seed, iteration, prompt,
    number), so that any number of ranks samples the same videos.

    Args:
        prompts: CSV with a column ``prompt``, and one of ``image`` for image-to-video; or text file with one prompt a
            line.
        groups: Groups of an iteration, each of one prompt, over all ranks.
        samples: Videos of a group, at least 2: an advantage compares them.
        batch_size: Samples (of OnlineDPO: pairs) per rank and micro-batch.
        seed: Seed of the prompts' order, of all noise and of training times.
        shared_noise: Whether the samples of a group begin with the same noise, so that they differ by the noise of
            their steps alone (DanceGRPO, MixGRPO); for FlowGRPO.
    """

    def __init__(
        self,
        prompts: str,
        groups: int = 48,
        samples: int = 16,
        batch_size: int = 1,
        seed: int = 0,
        shared_noise: bool = False,
    ) -> None:
        super().__init__()
        at_least(1, "data.", groups=groups, batch_size=batch_size)
        if type(seed) is not int:
            raise VideoAlignError(f"data.seed must be a whole number, got {seed}")
        if samples < 2:
            raise VideoAlignError(f"data.samples is {samples}, but a group is compared with itself: it needs 2 or more")
        self.items, self.name = read_items(prompts), f"prompts {prompts}"
        self.groups, self.samples, self.batch_size, self.seed = groups, samples, batch_size, seed
        self.shared_noise = shared_noise

    def setup(self, stage: str) -> None:
        """Refuse a module that does not sample, and images that its generator does not take."""
        module, who = self.trainer.lightning_module, type(self).__name__
        check_items(self.items, require(module, HasGenerator, who).generator.image, self.name)
        self.rounds()

    def all_prompts(self) -> list[str]:
        """Texts of the prompts."""
        return [item.prompt for item in self.items]

    def drawn(self, iteration: int) -> list[Drawn]:
        """All N samples of an iteration, group after group.

        Args:
            iteration: Number of the iteration.
        """
        found = []
        for group in range(self.groups):
            turn, place = divmod(iteration * self.groups + group, len(self.items))
            order = list(range(len(self.items)))
            random.Random(draw_seed(self.seed, "prompts", turn)).shuffle(order)
            item = self.items[order[place]]
            # two groups of one prompt in an iteration differ by their turn
            seeds = [draw_seed(self.seed, iteration, turn, item.seed(self.seed, n)) for n in range(self.samples)]
            noises = seeds[:1] * self.samples if self.shared_noise else seeds
            found += [Drawn(group, order[place], n, *both) for n, both in enumerate(zip(seeds, noises))]
        return found

    def rounds(self) -> Rounds:
        """Size of an iteration's training on a rank.

        Raises:
            VideoAlignError: If samples or groups cannot be dealt out evenly among the ranks.
        """
        module = require(self.trainer.lightning_module, RollsOut, type(self).__name__)
        ranks = data_ranks(self.trainer)[1]
        total = self.groups * (self.samples if module.trains_on == "samples" else 1)
        if total % ranks or (self.groups * self.samples) % ranks:
            raise VideoAlignError(
                f"{self.groups} groups (data.groups) of {self.samples} samples (data.samples) cannot be dealt out "
                f"evenly among {ranks} ranks; change one of them"
            )
        return Rounds(total // ranks, self.batch_size, module.updates, module.passes, self.seed)

    def train_dataloader(self) -> IterationLoader:
        """Batches of all iterations; an epoch is one iteration."""
        drawn = {"seed": self.seed, "groups": self.groups, "samples": self.samples}
        return IterationLoader(self.rounds(), drawn)

    def sizes(self) -> dict[str, Any]:
        """Sizes of an iteration, for messages and logs."""
        return {"groups": self.groups, "samples": self.samples, "prompts": len(self.items)}
