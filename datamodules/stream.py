"""The order in which samples of a set are read: deterministic, exact, and resumable in the middle of an epoch.

An epoch's order is that of its shards (shuffled for training), one behind the other. It is cut into one contiguous
range per rank, and each of these into one per worker, by sample number rather than by shard: any number of ranks and
workers gets every sample. Every rank gets the same number of batches. For training the remainder that does not fill
a batch on every rank is left out, another one in each epoch where the order is shuffled; for evaluation ranks are filled up with samples marked
as padding, so that every sample counts exactly once.
"""

import random
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, get_worker_info

from .. import VideoAlignError
from .shards import RawSample, Shard, ShardError, ShardSet


class Dropped(NamedTuple):  # not a frozen dataclass: Lightning cannot move one to a device
    """A sample that could not be used, and why. Padding does not count: it is another place's sample."""

    key: str
    reason: str
    padding: bool = False


@dataclass(frozen=True)
class Item:
    """What a worker hands to the collate function: a decoded sample or a dropped one.

    Attributes:
        value: what ``decode`` returned, or :class:`Dropped`. valid: False for padding and for dropped samples.
    """

    value: Any
    valid: bool


@dataclass(frozen=True)
class Share:
    """How one epoch of ``samples`` is cut: ``world`` ranks, batches of ``batch`` samples.

    Args:
        training: leave out the remainder (True) or fill up with padding (False).
    """

    samples: int
    batch: int
    world: int
    training: bool

    @property
    def batches(self) -> int:
        """Batches per rank."""
        if self.training:
            return self.samples // (self.world * self.batch)
        return -(-self.samples // self.world // self.batch) if self.samples else 0

    def slots(self, rank: int, worker: int, workers: int) -> tuple[int, int, int]:
        """Sample numbers [first, last) of one worker, and how many of them come before padding begins.

        Batches are dealt to workers in turn, so the first workers have one more where they do not divide evenly.
        """
        each, more = divmod(self.batches, workers)
        start = (worker * each + min(worker, more)) * self.batch
        stop = start + (each + (worker < more)) * self.batch
        if self.training:
            first = rank * self.batches * self.batch
            return first + start, first + stop, stop - start
        per_rank = -(-self.samples // self.world)
        first, end = rank * per_rank, min((rank + 1) * per_rank, self.samples)
        return first + start, first + stop, max(0, min(stop, end - first) - start)


def at_least(least: int, **options: int | None) -> None:
    """Refuse options of a DataModule that are too small; None is a default to come."""
    for name, value in options.items():
        if value is not None and value < least:
            raise VideoAlignError(f"data.{name} must be at least {least}, got {value}")


def in_turn(count: int, size: int) -> list[list[int]]:
    """Batches of ``size`` numbers below ``count``, in order."""
    return [list(range(first, min(first + size, count))) for first in range(0, count, size)]


def own_share(batches: Sequence[list[int]], trainer: Any, done: Container[int] = ()) -> list[list[int]]:
    """This rank's of the batches of a predict run, without what is done already.

    Dealt out first and thinned out then, so that no rank depends on what another one knows to be done. One empty batch
    rather than none: Lightning leaves a run without batches out, and its callbacks with it.
    """
    share = batches[trainer.global_rank :: trainer.world_size]
    return [left for batch in share if (left := [number for number in batch if number not in done])] or [[]]


def dealt(data: Any, workers: int, **options: Any) -> DataLoader:
    """A loader over whole batches that are this rank's alone already.

    Args:
        data: map-style; its items are batches. workers: processes, fewer where there is little to do.
    """
    # Lightning would deal them out once more; it leaves a loader alone that has such a sampler
    sampler = DistributedSampler(data, num_replicas=1, rank=0, shuffle=False)
    return DataLoader(
        data, batch_size=None, sampler=sampler, num_workers=min(workers, max(0, len(data) - 1)), **options
    )


class ShardStream(IterableDataset):
    """Samples of a set for one rank.

    Args:
        shards: the set. decode: turns a raw sample into what ``collate`` takes; runs in the worker; may raise
            :class:`~videoalign.VideoAlignError`, which drops the sample.
        share: how the epoch is cut. rank: of this process. seed: of the order.
        shuffle_buffer: undecoded samples among which the next one is drawn; 0 keeps the order of the shards.
    """

    def __init__(
        self, shards: ShardSet, decode: Callable[[RawSample, int], Any], share: Share, rank: int, seed: int = 0,
        shuffle_buffer: int = 0,
    ) -> None:  # fmt: skip
        self.shards, self.decode, self.share, self.rank, self.seed = shards, decode, share, rank, seed
        self.shuffle_buffer = shuffle_buffer
        # In shared memory, because persistent workers keep their copy of this object for ever.
        self.position = torch.zeros(2, dtype=torch.long).share_memory_()  # epoch, batches to skip

    def __iter__(self) -> Iterator[Item]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        epoch, skip = self.position.tolist()
        # The loader asks its workers in turn from number 0; after a resumption the turn is another worker's.
        worker = (worker + skip) % workers
        done = (skip // workers + (worker < skip % workers)) * self.share.batch
        for number, (raw, valid) in enumerate(self._raw(epoch, worker, workers)):
            if number >= done:  # skipped samples are read, but not decoded
                yield self._decoded(raw, valid, epoch)

    def _decoded(self, raw: RawSample | ShardError, valid: bool, epoch: int) -> Item:
        try:
            if isinstance(raw, ShardError):
                raise raw
            return Item(self.decode(raw, epoch), valid)
        except VideoAlignError as error:
            return Item(Dropped(getattr(raw, "key", "?"), str(error), padding=not valid), False)

    def _raw(self, epoch: int, worker: int, workers: int) -> Iterator[tuple[RawSample | ShardError, bool]]:
        first, last, real = self.share.slots(self.rank, worker, workers)
        samples = self._range(first, first + real, epoch)
        if self.share.training and self.shuffle_buffer:
            rng = random.Random(f"{self.seed} {epoch} {self.rank} {worker}")
            samples = shuffled(samples, self.shuffle_buffer, rng)
        raw = None
        for raw in samples:
            yield raw, True
        if last - first > real:
            if raw is None:  # a worker with padding only still needs something to pad with
                raw = next(self._range(0, 1, epoch))
            yield from [(raw, False)] * (last - first - real)

    def _range(self, first: int, last: int, epoch: int) -> Iterator[RawSample | ShardError]:
        """Raw samples number ``first`` to before ``last`` of the epoch's order. Damage is passed on, one error a sample."""
        order = list(self.shards.index.shards)
        if self.share.training and self.shuffle_buffer:
            rng = random.Random(f"{self.seed} {epoch}")
            rng.shuffle(order)
            # The epoch starts anywhere in that order and goes around, so that the remainder is another one each time.
            total = self.share.samples
            turn = rng.randrange(total)
            first, last = first + turn, last + turn
            if first >= total:
                first, last = first - total, last - total
            elif last > total:
                yield from self._in_order(order, first, total)
                first, last = 0, last - total
        yield from self._in_order(order, first, last)

    def _in_order(self, order: list[Shard], first: int, last: int) -> Iterator[RawSample | ShardError]:
        """Raw samples number ``first`` to before ``last`` of the shards one behind the other."""
        offset = 0
        for shard in order:
            start, stop = max(first - offset, 0), min(last - offset, shard.samples)
            offset += shard.samples
            if start < stop:
                count = start
                try:
                    for sample in self.shards.read(shard, start, stop):
                        yield sample
                        count += 1
                except ShardError as error:
                    yield from [error] * (stop - count)


def shuffled(samples: Iterator, size: int, rng: random.Random) -> Iterator:
    """Draw at random among the next ``size`` samples; every sample comes out once."""
    buffer = []
    for sample in samples:
        if len(buffer) < size:
            buffer.append(sample)
            continue
        i = rng.randrange(size)
        buffer[i], sample = sample, buffer[i]
        yield sample
    rng.shuffle(buffer)
    yield from buffer


class ShardLoader(DataLoader):
    """A loader over a :class:`ShardStream`: knows its length, its epoch and its place, and counts what was dropped.

    Its state is the same on every rank, because every rank takes the same number of batches; so one rank's
    checkpoint resumes all of them, at the exact sample.

    Args:
        stream: what to load. collate: makes a batch of items. workers: processes that decode; 0 decodes in this one.
        max_dropped: largest share of an epoch's samples that may be dropped before loading stops with an error.
    """

    def __init__(
        self, stream: ShardStream, collate: Callable, workers: int, max_dropped: float = 0.0, **options: Any
    ) -> None:
        share = stream.share
        if share.training and not share.batches:
            raise VideoAlignError(
                f"{stream.shards.path} has {share.samples} {stream.shards.index.kind}, fewer than one batch of "
                f"data.batch_size {share.batch} on each of {share.world} ranks; make the batches smaller"
            )
        super().__init__(stream, batch_size=share.batch, collate_fn=collate, num_workers=workers, **options)
        self.stream, self.max_dropped = stream, max_dropped
        self.epoch = self.batches = self.dropped = 0
        self._resumed = False

    def __len__(self) -> int:
        return self.stream.share.batches

    def __iter__(self) -> Iterator[dict]:
        if not self._resumed and self.batches:  # the last epoch was left early; this is the next one
            self.epoch, self.batches = self.epoch + 1, 0
        self._resumed = False
        if self.batches == 0:
            self.dropped = 0
        self.stream.position.copy_(torch.tensor([self.epoch, self.batches]))
        for batch in super().__iter__():
            self.batches += 1
            if self.batches == len(self):  # the next state is the next epoch's beginning
                self.epoch, self.batches = self.epoch + 1, 0
            self._count(batch["dropped"])
            yield batch

    def _count(self, dropped: list[Dropped]) -> None:
        dropped = [one for one in dropped if not one.padding]
        self.dropped += len(dropped)
        samples = len(self) * self.stream.share.batch
        if dropped and self.dropped > self.max_dropped * samples:
            raise VideoAlignError(
                f"{self.stream.shards.path}: {self.dropped} of {samples} samples could not be used, more than max_dropped: "
                f"{self.max_dropped} allows. The last one: {dropped[-1].reason}"
            )

    def _geometry(self) -> list[int]:
        share = self.stream.share
        return [share.samples, share.batch, share.world, self.num_workers, self.stream.seed, self.stream.shuffle_buffer]

    def state_dict(self) -> dict[str, Any]:
        """Place in the stream."""
        return {"epoch": self.epoch, "batches": self.batches, "dropped": self.dropped, "geometry": self._geometry()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved place.

        Raises:
            VideoAlignError: in the middle of an epoch, where data, batch size, ranks, workers or seed have changed.
        """
        if state["batches"] and state["geometry"] != self._geometry():
            names = ("samples", "batch size", "ranks", "workers", "seed", "shuffle buffer")
            changed = [f"{n} {a} -> {b}" for n, a, b in zip(names, state["geometry"], self._geometry()) if a != b]
            raise VideoAlignError(
                f"this checkpoint stands in the middle of an epoch, which can be continued only as it began ({', '.join(changed) or 'it is of another release'}). "
                "Resume with the earlier values, or from a checkpoint at the end of an epoch."
            )
        self.epoch, self.batches, self.dropped = state["epoch"], state["batches"], state["dropped"]
        self._resumed = True
