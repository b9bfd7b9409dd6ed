"""The order in which samples of a set are read: fixed by seed and step, whatever the number of ranks and workers.

An epoch is one order of all samples. A *global batch* is the next ``world x batch`` of them, of which each rank takes
its part: with the product of ranks, batch size and accumulated batches unchanged, every optimizer step sees the same
samples on any number of ranks; where batches of similar length are formed, with the accumulated batches and the product
of the other two unchanged. Training leaves out the samples that do not fill a whole step, other ones in each epoch.
Evaluation fills ranks up with samples that are marked as padding, so that every sample counts exactly once.
"""

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch.utils.data import DataLoader, DistributedSampler

from .. import VideoAlignError
from .contents import Contents, RawSample
from .data_ranks import data_ranks
from .epoch_order import alike, epoch_order
from .fitted_schedule import fit_schedule
from .stores import threads


class Dropped(NamedTuple):  # not a frozen dataclass: Lightning cannot move one to a device
    """A sample that could not be used.

    Attributes:
        key: Key of the sample.
        reason: Why it could not be used, in words.
        padding: Whether it only filled up a rank; then it does not count, because another rank counts it.
    """

    key: str
    reason: str
    padding: bool = False


@dataclass(frozen=True)
class Item:
    """One sample as a worker hands it to the collate function.

    Attributes:
        value: The result of ``decode``, or :class:`Dropped`.
        valid: False for padding and for dropped samples.
    """

    value: Any
    valid: bool


def separated(items: Sequence[Item]) -> tuple[list[Any], list[Dropped]]:
    """The decoded samples of a batch, padding included, and the dropped ones."""
    decoded = [item.value for item in items if not isinstance(item.value, Dropped)]
    return decoded, [item.value for item in items if isinstance(item.value, Dropped)]


class FilledCollate:
    """Collates items so that every batch keeps its size: a decoded sample takes the place of each dropped one.

    Batches hold the reasons under ``dropped`` and a mask under ``valid``; subclasses add the rest in :meth:`tensors`.

    Args:
        spare: Decoded sample that takes the places of dropped ones until the worker has decoded another.
    """

    def __init__(self, spare: Any = None) -> None:
        self.spare = spare

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        decoded, dropped = separated(items)
        batch = {"dropped": dropped, "valid": torch.tensor([item.valid for item in items])}
        self.spare = decoded[0] if decoded else self.spare
        if self.spare is None:  # the very first batch of a worker is unusable
            return batch
        return batch | self.tensors([self.spare if isinstance(i.value, Dropped) else i.value for i in items])

    def tensors(self, samples: list[Any]) -> dict[str, Any]:
        """The entries of a batch that are computed from its decoded samples."""
        raise NotImplementedError


@dataclass(frozen=True)
class Share:
    """How one epoch is dealt out to ranks.

    Args:
        samples: Number of samples in the set.
        batch: Samples per rank and micro-batch.
        world: Number of ranks.
        training: Leave out samples that do not fill a step (True), or fill up with padding (False).
        accumulate: Micro-batches per optimizer step.
    """

    samples: int
    batch: int
    world: int
    training: bool
    accumulate: int = 1

    @property
    def batches(self) -> int:
        """Micro-batches per rank."""
        if self.training:
            return self.samples // (self.world * self.batch * self.accumulate) * self.accumulate
        return -(-self.samples // (self.world * self.batch))

    def places(self, rank: int, number: int) -> range:
        """Places in the epoch's order of a rank's micro-batch; those from ``samples`` on are padding."""
        first = (number * self.world + rank) * self.batch
        return range(first, first + self.batch)


def training_share(trainer: Any, samples: int, batch: int) -> Share:
    """How a training run deals out ``samples``, ``batch`` of them per rank and micro-batch; fits its schedule first."""
    fit_schedule(trainer, samples, batch)
    return Share(samples, batch, data_ranks(trainer)[1], True, trainer.accumulate_grad_batches)


def in_turn(count: int, size: int) -> list[list[int]]:
    """Batches of ``size`` numbers below ``count``, in order."""
    return [list(range(first, min(first + size, count))) for first in range(0, count, size)]


def own_share(batches: Sequence[list[int]], trainer: Any, done: Container[int] = ()) -> list[list[int]]:
    """This rank's batches of a predict run, without the samples that are done already.

    Batches are dealt out before finished samples leave them, so that no rank depends on the progress of another one.
    A rank without work gets one empty batch, because Lightning skips a run without batches, and its callbacks with it.

    Args:
        batches: Sample numbers of all batches of the run.
        trainer: The Trainer, which knows rank and world size.
        done: Numbers of samples that are done.
    """
    rank, world = data_ranks(trainer)
    share = batches[rank::world]
    return [left for batch in share if (left := [number for number in batch if number not in done])] or [[]]


def dealt(data: Any, workers: int, **options: Any) -> DataLoader:
    """A loader over whole batches that were dealt out to this rank before.

    Args:
        data: Map-style dataset whose items are batches.
        workers: Number of processes; fewer start where there are few batches.
        **options: Further options of torch's DataLoader.
    """
    # Lightning would deal them out once more; it leaves a loader alone that has such a sampler
    sampler = DistributedSampler(data, num_replicas=1, rank=0, shuffle=False)
    return DataLoader(
        data, batch_size=None, sampler=sampler, num_workers=min(workers, max(0, len(data) - 1)), **options
    )


class Slot(NamedTuple):
    """One place of a batch.

    Attributes:
        number: Number of the sample in the set.
        epoch: Epoch that it is decoded for.
        valid: False for padding.
    """

    number: int
    epoch: int
    valid: bool


@dataclass
class ShardStream:
    """Samples of a set for one rank, map-style: ``stream[slot]`` reads and decodes one; workers call it.

    Args:
        contents: Samples of the set, or some of them.
        decode: Turns a raw sample and the epoch into what ``collate`` takes; a
            :class:`~videoalign.VideoAlignError` that it raises drops the sample.
        share: How an epoch is dealt out.
        rank: Rank of this process.
        seed: Seed of the order.
        shuffle_buffer: Number of samples among which the next one is drawn in training; 0 keeps the order on disk.
        name: What to call the set in messages.
        group: Batches of all ranks among whose samples training forms batches of similar length; 0 forms none.
        lengths: Length of each sample in any unit, where there are groups.
    """

    contents: Contents
    decode: Callable[[RawSample, int], Any]
    share: Share
    rank: int = 0
    seed: int = 0
    shuffle_buffer: int = 0
    name: str = "the set"
    group: int = 0
    lengths: Sequence[float] = ()

    def __len__(self) -> int:
        return self.share.batches * self.share.batch

    def __getitem__(self, slot: Slot) -> Item:
        content = self.contents[slot.number]
        return self._item(slot, content.key, content.raw)

    def __getitems__(self, slots: list[Slot]) -> list[Item]:
        """The samples of a batch; those in a store are fetched while earlier ones are decoded."""
        if not self.contents.remote:
            return [self[slot] for slot in slots]
        contents = [self.contents[slot.number] for slot in slots]
        waiting = [threads().submit(content.raw) for content in contents]
        try:
            return [self._item(s, c.key, future.result) for s, c, future in zip(slots, contents, waiting)]
        finally:
            for future in waiting:
                future.cancel()

    def _item(self, slot: Slot, key: str, read: Callable[[], RawSample]) -> Item:
        try:
            return Item(self.decode(read(), slot.epoch), slot.valid)
        except VideoAlignError as error:  # no StoreError: a store's trouble does not make a sample unusable
            return Item(Dropped(key, str(error), padding=not slot.valid), False)

    def slots(self, epoch: int, skip: int = 0) -> Iterator[list[Slot]]:
        """This rank's batches of an epoch, from number ``skip`` on."""
        share = self.share
        order = epoch_order(self.contents, self.seed, epoch, self.shuffle_buffer if share.training else 0)
        if share.training and self.group:
            order = alike(order, self.lengths, share.batch * share.world, self.group, f"{self.seed} {epoch}")
        for number in range(skip, share.batches):
            places = share.places(self.rank, number)
            yield [Slot(order[place % share.samples], epoch, place < share.samples) for place in places]


@dataclass
class _Plan:
    """The next batches of a loader: torch's batch sampler.

    Attributes:
        stream: Samples that the batches are of.
        epoch: Number of the epoch.
        skip: Number of the first batch, within the epoch.
    """

    stream: ShardStream
    epoch: int = 0
    skip: int = 0

    def __len__(self) -> int:
        return self.stream.share.batches

    def __iter__(self) -> Iterator[list[Slot]]:
        return self.stream.slots(self.epoch, self.skip)


@dataclass
class ShardLoader:
    """Batches of a :class:`ShardStream`: knows its length, its epoch and its place, and counts dropped samples.

    Its state is the same on every rank, because every rank takes the same number of batches; so one rank's
    checkpoint resumes all of them, at the exact sample. It *has* a DataLoader and is none, because Lightning would deal
    out the batches of one among the ranks once more.

    Args:
        stream: Samples to load.
        collate: Turns a sequence of :class:`Item` into a batch.
        workers: Number of processes that decode; 0 decodes in this one.
        max_dropped: Largest share of an epoch's samples that may be dropped before loading stops with an error.
        options: Further options of torch's DataLoader.
        benchmark: Name of the benchmark whose videos these are; None for pairs.
    """

    stream: ShardStream
    collate: Callable
    workers: int = 0
    max_dropped: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    benchmark: str | None = None

    def __post_init__(self) -> None:
        share = self.stream.share
        if share.training and not share.batches:
            ranks = f" on each of {share.world} ranks" if share.world > 1 else ""
            times = f", {share.accumulate} times (trainer.accumulate_grad_batches)" if share.accumulate > 1 else ""
            raise VideoAlignError(
                f"{self.stream.name} has {share.samples} samples, fewer than one step takes: "
                f"data.batch_size {share.batch}{ranks}{times}; make it smaller"
            )
        self.epoch = self.batches = self.dropped = 0
        self._resumed = False
        self._plan = _Plan(self.stream)
        self._loader = DataLoader(
            self.stream, batch_sampler=self._plan, collate_fn=self.collate, num_workers=self.workers, **self.options
        )

    def __len__(self) -> int:
        return self.stream.share.batches

    def __iter__(self) -> Iterator[dict]:
        if not self._resumed and self.batches:  # the last epoch was left early; this is the next one
            self.epoch, self.batches = self.epoch + 1, 0
        self._resumed = False
        if self.batches == 0:
            self.dropped = 0
        self._plan.epoch, self._plan.skip = self.epoch, self.batches
        for batch in self._loader:
            self.batches += 1
            if self.batches == len(self):  # the next state is the next epoch's beginning
                self.epoch, self.batches = self.epoch + 1, 0
            self._count(batch["dropped"])
            yield batch

    def _count(self, dropped: list[Dropped]) -> None:
        dropped = [one for one in dropped if not one.padding]
        self.dropped += len(dropped)
        samples = len(self.stream)
        if dropped and self.dropped > self.max_dropped * samples:
            raise VideoAlignError(
                f"{self.stream.name}: {self.dropped} of {samples} samples could not be used, more than max_dropped: "
                f"{self.max_dropped} allows. The last one: {dropped[-1].reason}"
            )

    def _geometry(self) -> list[int]:
        share = self.stream.share
        return [
            share.samples,
            share.batch * share.world,
            share.accumulate,
            self.stream.seed,
            self.stream.shuffle_buffer,
            self.stream.group,
            crc32(repr(list(self.stream.lengths)).encode()) if self.stream.group else 0,
        ]

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream, as plain values."""
        return {"epoch": self.epoch, "batches": self.batches, "dropped": self.dropped, "geometry": self._geometry()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved place.

        Raises:
            VideoAlignError: If the place lies within an epoch, and the data, the samples of a step or the seed have
                changed.
        """
        now = self._geometry()
        before = [*state["geometry"], *[0] * (len(now) - 1 - len(state["geometry"]))]  # earlier releases had no groups
        before += now[len(before) :]  # and later ones did not say of which lengths
        if state["batches"] and before != now:
            names = (
                "samples",
                "batch size x ranks",
                "accumulated batches",
                "seed",
                "shuffle buffer",
                "group_by_length",
                "lengths of the samples",
            )
            changed = [f"{n} {a} -> {b}" for n, a, b in zip(names, before, now) if a != b]
            if before[-1] != now[-1]:  # a digest, which says nothing to people
                changed[-1] = f"{names[-1]}, by the data, the sampling of frames or their size"
            why = ", ".join(changed) or "it is of another release"
            raise VideoAlignError(
                f"this checkpoint stands in the middle of an epoch, which can be continued only as it began ({why}). "
                "Resume with the earlier values, or from a checkpoint at the end of an epoch."
            )
        self.epoch, self.batches, self.dropped = state["epoch"], state["batches"], state["dropped"]
        self._resumed = True
