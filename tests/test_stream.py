"""The order of samples: every one exactly once, on any number of ranks and workers, and resumable at any batch."""

import io
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch

from videoalign import VideoAlignError
from videoalign.datamodules.contents import RawSample
from videoalign.datamodules.epoch_order import alike, epoch_order, shuffled
from videoalign.datamodules.shards import ShardSet, ShardWriter
from videoalign.datamodules.stream import Dropped, Item, ShardLoader, ShardStream, Share, Slot

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

SIZES, BATCHES, WORLDS, WORKERS = (1, 5, 7, 23), (1, 2, 3), (1, 2, 3), (0, 1, 2, 3)


def keys_of(samples: int) -> list[str]:
    return [f"{i:04d}" for i in range(samples)]


def decode(raw: RawSample, epoch: int) -> tuple[str, int]:
    return raw.key, epoch


def contents(samples: int, per_shard: int = 4) -> "Table":
    """A table of contents without files: only the part that the order depends on."""
    return Table(np.arange(samples) // per_shard)


class Table:
    def __init__(self, shard: np.ndarray) -> None:
        self.shard = shard

    def __len__(self) -> int:
        return len(self.shard)


def streams(share: Share, buffer: int = 0, seed: int = 0, per_shard: int = 4) -> list[ShardStream]:
    """A stream for each rank."""
    table = contents(share.samples, per_shard)
    return [ShardStream(table, decode, share, rank, seed, buffer) for rank in range(share.world)]


def numbers(batches: Iterable[list[Slot]], valid_only: bool = False) -> list[int]:
    return [slot.number for batch in batches for slot in batch if slot.valid or not valid_only]


# --- the plan, on a grid --------------------------------------------------------------------------


@pytest.mark.parametrize("samples", SIZES)
def test_evaluation_covers_every_sample_once(samples: int) -> None:
    for batch, world in itertools.product(BATCHES, WORLDS):
        share = Share(samples, batch, world, training=False)
        ranks = [list(stream.slots(0)) for stream in streams(share)]
        plan = f"batch {batch}, world {world}"
        assert {len(batches) for batches in ranks} == {share.batches}, plan
        assert {len(b) for batches in ranks for b in batches} == {batch}, plan
        assert share.batches * batch * world < samples + batch * world, f"{plan}: more padding than needed"
        assert sorted(n for batches in ranks for n in numbers(batches, valid_only=True)) == list(range(samples)), plan


@pytest.mark.parametrize("samples", SIZES)
def test_evaluation_order_does_not_depend_on_the_epoch(samples: int) -> None:
    (stream,) = streams(Share(samples, 2, 1, training=False), buffer=4)
    assert numbers(stream.slots(0)) == numbers(stream.slots(5))


@pytest.mark.parametrize("samples", SIZES)
@pytest.mark.parametrize("buffer", [0, 4, 100])
def test_training_samples_are_disjoint(samples: int, buffer: int) -> None:
    for batch, world, accumulate, epoch in itertools.product(BATCHES, WORLDS, (1, 2), (0, 3)):
        share = Share(samples, batch, world, training=True, accumulate=accumulate)
        assert share.batches == samples // (batch * world * accumulate) * accumulate
        ranks = [list(stream.slots(epoch)) for stream in streams(share, buffer)]
        plan = f"batch {batch}, world {world}, accumulate {accumulate}"
        assert [len(batches) for batches in ranks] == [share.batches] * world, plan
        slots = [slot for batches in ranks for b in batches for slot in b]
        assert all(slot.valid and slot.epoch == epoch for slot in slots), plan
        assert len({slot.number for slot in slots}) == len(slots) == share.batches * batch * world, plan


def test_a_step_sees_the_same_samples_on_any_number_of_ranks() -> None:
    """Ranks x batch size x accumulated batches is 12, and every optimizer step has the same 12 samples."""

    def steps(world: int, batch: int, accumulate: int) -> list[set[int]]:
        share = Share(61, batch, world, training=True, accumulate=accumulate)
        ranks = [[{slot.number for slot in b} for b in stream.slots(3)] for stream in streams(share, 16, seed=7)]
        micro = [set.union(*(rank[i] for rank in ranks)) for i in range(share.batches)]
        return [set.union(*micro[i : i + accumulate]) for i in range(0, len(micro), accumulate)]

    want = steps(1, 12, 1)
    assert len(want) == 5
    assert {len(step) for step in want} == {12}
    for plan in ((12, 1, 1), (1, 1, 12), (2, 3, 2), (3, 2, 2), (4, 3, 1), (2, 1, 6), (1, 4, 3)):
        assert steps(*plan) == want, plan


@pytest.mark.parametrize("world", WORLDS)
def test_training_order(world: int) -> None:
    """The order differs between epochs and seeds, and is the same for the same epoch and seed."""
    share = Share(23, 2, world, training=True)

    def order(seed: int, epoch: int) -> list[int]:
        return [number for stream in streams(share, 4, seed) for number in numbers(stream.slots(epoch))]

    orders = {(seed, epoch): order(seed, epoch) for seed in (0, 1) for epoch in range(3)}
    assert len({tuple(o) for o in orders.values()}) == 6
    assert all(order(*place) == o for place, o in orders.items())
    assert all(o != sorted(o) for o in orders.values())


def test_no_buffer_keeps_the_order_on_disk() -> None:
    (stream,) = streams(Share(23, 2, 1, training=True))
    for epoch in (0, 1):
        assert numbers(stream.slots(epoch)) == list(range(22))


def test_the_buffer_bounds_how_far_samples_move() -> None:
    near, far = (epoch_order(contents(1000, per_shard=1000), 0, 0, buffer) for buffer in (10, 1000))
    assert sorted(near) == sorted(far) == list(range(1000))
    assert np.median(np.abs(np.diff(near))) < 20 < 200 < np.median(np.abs(np.diff(far)))


@pytest.mark.parametrize("group", [1, 3, 100])
def test_batches_of_similar_length_are_cut_from_groups(group: int) -> None:
    """Each group of batches holds the samples that it held before; within it, batches do not overlap in length."""
    order, lengths = random.Random(0).sample(range(50), 50), random.Random(1).sample(range(1000), 50)
    found = alike(order, lengths, 4, group, "seed")
    assert found[48:] == order[48:]  # they fill no batch
    for first in range(0, 48, 4 * group):
        window = found[first : min(first + 4 * group, 48)]
        assert sorted(window) == sorted(order[first : first + len(window)])
        spans = sorted(sorted(lengths[n] for n in window[i : i + 4]) for i in range(0, len(window), 4))
        assert all(before[-1] < after[0] for before, after in itertools.pairwise(spans))
    assert found == alike(order, lengths, 4, group, "seed")
    if group > 1:  # short batches do not come first
        assert found != alike(order, lengths, 4, group, "other seed")
        assert any(lengths[found[i]] > lengths[found[i + 4]] for i in range(0, 4 * (min(group, 12) - 1), 4))


def test_ranks_share_batches_of_similar_length() -> None:
    """Whatever the number of ranks, steps see the same samples; every sample still comes once an epoch."""
    lengths = random.Random(1).sample(range(1000), 24)
    steps = []
    for world in (1, 2, 4):
        ranks = [
            ShardStream(contents(24), decode, Share(24, 4 // world, world, True), rank, 0, 100, "x", 3, lengths)
            for rank in range(world)
        ]
        plans = [[[slot.number for slot in batch] for batch in rank.slots(1)] for rank in ranks]
        assert [list(rank.slots(1, skip=4)) for rank in ranks] == [list(rank.slots(1))[4:] for rank in ranks]
        steps.append([sorted(itertools.chain(*parts)) for parts in zip(*plans)])
    assert steps[0] == steps[1] == steps[2] and sorted(itertools.chain(*steps[0])) == list(range(24))
    plain = next(iter(streams(Share(24, 4, 1, True), buffer=100))).slots(1)
    spread = [max(of) - min(of) for of in ([lengths[n] for n in step] for step in steps[0])]
    before = [max(of) - min(of) for of in ([lengths[slot.number] for slot in batch] for batch in plain)]
    assert sum(spread) < 0.5 * sum(before)


def test_evaluation_keeps_its_order_whatever_the_lengths() -> None:
    share = Share(23, 4, 1, training=False)
    stream = ShardStream(contents(23), decode, share, lengths=[-n for n in range(23)], group=3)
    assert numbers(stream.slots(0))[:23] == list(range(23))


@pytest.mark.parametrize("per_shard", [4, 100], ids=["many shards", "one shard"])
def test_every_sample_trains_in_the_long_run(per_shard: int) -> None:
    """Samples that do not fill a batch are left out, but they are other ones in each epoch."""
    (stream,) = streams(Share(23, 5, 1, training=True), buffer=4, per_shard=per_shard)
    seen = Counter(number for epoch in range(40) for number in numbers(stream.slots(epoch)))
    assert sorted(seen) == list(range(23))


@pytest.mark.parametrize("training", [False, True])
def test_resuming_at_any_batch(training: bool) -> None:
    for samples, batch, world in itertools.product(SIZES, BATCHES, WORLDS):
        stream = streams(Share(samples, batch, world, training), buffer=4)[-1]
        whole = list(stream.slots(2))
        for done in range(len(whole) + 1):
            assert list(stream.slots(2, skip=done)) == whole[done:], (samples, batch, world, done)


def test_shuffle_buffer_gives_every_sample_once() -> None:
    for size, count in itertools.product((1, 3, 50), (0, 1, 10)):
        assert sorted(shuffled(iter(range(count)), size, random.Random(0))) == list(range(count))
    first = list(shuffled(iter(range(100)), 10, random.Random(0)))
    assert first == list(shuffled(iter(range(100)), 10, random.Random(0)))
    assert max(place - value for place, value in enumerate(first)) > 5
    assert max(value - place for place, value in enumerate(first)) <= 10  # nothing from further ahead than the buffer


def test_share_of_nothing() -> None:
    for training in (False, True):
        assert Share(0, 4, 2, training).batches == 0
    assert Share(3, 4, 1, True).batches == 0
    assert Share(3, 4, 2, False).batches == 1


# --- loaders with processes -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """A set of 23 samples whose videos are a few bytes."""
    out = tmp_path_factory.mktemp("stream") / "set"
    with ShardWriter(out, "videos", per_shard=4) as writer:
        for key in keys_of(23):
            writer.write(key, {"": key.encode()}, {"prompt": key})
    return ShardSet(out)


def collate(items: list[Item]) -> dict:
    dropped = [item.value for item in items if isinstance(item.value, Dropped)]
    values = [None if isinstance(item.value, Dropped) else item.value for item in items]
    return {"values": values, "valid": [item.valid for item in items], "dropped": dropped}


def loader(
    shards: ShardSet,
    workers: int,
    batch: int = 2,
    world: int = 2,
    rank: int = 1,
    training: bool = True,
    seed: int = 3,
    buffer: int = 4,
    samples: int | None = None,
    decode: Callable = decode,
    max_dropped: float = 0.0,
    group: int = 0,
    **options: object,
) -> ShardLoader:
    table = shards.contents()
    table = table.take(range(samples)) if samples else table
    share = Share(len(table), batch, world, training)
    stream = ShardStream(table, decode, share, rank, seed, buffer, "the set", group, range(len(table)))
    return ShardLoader(stream, collate, workers, max_dropped, options)


def values(batches: list[dict]) -> list[list]:
    return [batch["values"] for batch in batches]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("workers", WORKERS)
def test_loader_follows_the_plan(shards: ShardSet, workers: int, training: bool) -> None:
    load = loader(shards, workers, training=training)
    got, keys = [list(load) for _ in range(2)], shards.contents().keys()
    assert len(load) == len(got[0]) == len(got[1])
    for epoch in range(2):
        plan = list(load.stream.slots(epoch))
        assert values(got[epoch]) == [[(keys[slot.number], epoch) for slot in batch] for batch in plan]
        assert [batch["valid"] for batch in got[epoch]] == [[slot.valid for slot in batch] for batch in plan]


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_together_see_every_sample(shards: ShardSet, workers: int) -> None:
    seen, lengths = [], set()
    for rank in range(3):
        batches = list(loader(shards, workers, world=3, rank=rank, training=False))
        lengths.add(len(batches))
        seen += [v[0] for b in batches for v, valid in zip(b["values"], b["valid"]) if valid]
    assert sorted(seen) == keys_of(23)
    assert len(lengths) == 1


@pytest.mark.parametrize("workers", WORKERS)
def test_resuming_continues_the_run(shards: ShardSet, workers: int) -> None:
    """A run is resumed after k batches and goes through the end of that epoch and the next; an epoch has 5 batches."""
    uninterrupted = loader(shards, workers)
    assert len(uninterrupted) == 5
    whole = [batch for _ in range(3) for batch in values(list(uninterrupted))]
    for done in (0, 1, 3, 4, 5, 7):
        first = loader(shards, workers)
        taken = []
        while len(taken) < done:
            for batch in first:
                taken.append(batch["values"])
                if len(taken) == done:
                    state = first.state_dict()  # as a checkpoint after this batch sees it
                    break
        if not done:
            state = first.state_dict()
        assert taken == whole[:done]
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        second = loader(shards, workers)
        second.load_state_dict(torch.load(buffer, weights_only=True))
        assert second.state_dict() == state
        rest = []
        while len(rest) < 15 - done:
            rest += values(list(second))
        assert rest == whole[done:]


def test_resuming_twice_in_an_epoch(shards: ShardSet) -> None:
    whole = values(list(loader(shards, 2)))
    got, state = [], None
    for _ in range(5):
        load = loader(shards, 2)
        if state:
            load.load_state_dict(state)
        got.append(next(iter(load))["values"])
        state = load.state_dict()
    assert got == whole
    assert (state["epoch"], state["batches"]) == (1, 0)


CHANGES = {
    "samples": {"samples": 22},
    "batch size": {"batch": 3},
    "ranks": {"world": 3},
    "seed": {"seed": 4},
    "shuffle": {"buffer": 5},
    "group_by_length": {"group": 2},
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_geometry_is_refused_in_an_epoch(shards: ShardSet, name: str) -> None:
    """Within an epoch the geometry must stay; at the end of an epoch it may change."""
    load = loader(shards, 0)
    batches = iter(load)
    next(batches)
    changed = loader(shards, **{"workers": 0, **CHANGES[name]})
    with pytest.raises(VideoAlignError, match=f"middle of an epoch.*{name}"):
        changed.load_state_dict(load.state_dict())
    list(batches)
    assert load.state_dict()["batches"] == 0
    changed.load_state_dict(load.state_dict())
    assert {value[1] for batch in changed for value in batch["values"]} == {1}


def test_a_checkpoint_of_before_there_were_groups_goes_on(shards: ShardSet) -> None:
    load = loader(shards, 0)
    next(iter(load))
    state = load.state_dict()
    state["geometry"] = state["geometry"][:5]
    (same := loader(shards, 0)).load_state_dict(state)
    assert values(list(same)) == values(list(loader(shards, 0)))[1:]
    with pytest.raises(VideoAlignError, match="group_by_length 0 -> 2"):
        loader(shards, 0, group=2).load_state_dict(state)


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_resuming_on_other_ranks_and_workers(shards: ShardSet, world: int, workers: int) -> None:
    """With the same global batch of 4 an epoch goes on where it was, however many processes take part in it."""
    first = loader(shards, 0, batch=4, world=1, rank=0)
    batches = iter(first)
    next(batches), next(batches)
    state, whole = first.state_dict(), [sorted(batch) for batch in values(list(batches))]
    ranks = [loader(shards, workers, 4 // world, world, rank) for rank in range(world)]
    for load in ranks:
        load.load_state_dict(state)
    rest = [sorted(itertools.chain(*parts)) for parts in zip(*(values(list(load)) for load in ranks))]
    assert rest == whole
    assert len(rest) == 3


def test_the_same_geometry_on_another_rank(shards: ShardSet) -> None:
    """One rank's checkpoint resumes every rank."""
    first = loader(shards, 0, rank=0)
    next(iter(first))
    second = loader(shards, 0, rank=1)
    second.load_state_dict(first.state_dict())
    assert values(list(second)) == values(list(loader(shards, 0, rank=1)))[1:]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_aborted_epoch_is_followed_by_the_next(shards: ShardSet, workers: int) -> None:
    uninterrupted = loader(shards, workers)
    epochs = [values(list(uninterrupted)) for _ in range(3)]
    load = loader(shards, workers)
    assert values(list(itertools.islice(load, 2))) == epochs[0][:2]
    assert values(list(load)) == epochs[1]
    assert values(list(load)) == epochs[2]
    assert load.epoch == 3


@pytest.mark.parametrize("workers", [1, 2])
def test_persistent_workers_get_the_new_epoch(shards: ShardSet, workers: int) -> None:
    ordinary = loader(shards, workers)
    epochs = [values(list(ordinary)) for _ in range(5)]
    load = loader(shards, workers, persistent_workers=True)
    assert values(list(load)) == epochs[0]
    assert values(list(load)) == epochs[1]
    assert values(list(itertools.islice(load, 3))) == epochs[2][:3]
    state = load.state_dict()
    assert values(list(load)) == epochs[3]
    load.load_state_dict(state)  # back into the middle, with the same processes
    assert values(list(load)) == epochs[2][3:]
    assert values(list(load)) == epochs[3]


# --- dropped samples ------------------------------------------------------------------------------


def unless(*bad: str) -> Callable:
    def decode(raw: RawSample, epoch: int) -> tuple[str, int]:
        if raw.key in bad:
            raise VideoAlignError(f"{raw.name}: cannot be used")
        return raw.key, epoch

    return decode


@pytest.mark.parametrize("workers", [0, 2])
def test_dropped_samples_are_counted_and_masked(shards: ShardSet, workers: int) -> None:
    load = loader(
        shards, workers, batch=4, world=1, rank=0, training=False, decode=unless("0003", "0010"), max_dropped=0.1
    )
    for _ in range(2):  # the budget is an epoch's
        batches = list(load)
        assert load.dropped == 2
        dropped = [drop for batch in batches for drop in batch["dropped"]]
        assert sorted(drop.key for drop in dropped) == ["0003", "0010"]
        assert all("cannot be used" in drop.reason and drop.key in drop.reason for drop in dropped)
        assert [len(batch["values"]) for batch in batches] == [4] * 6
        valid = [v[0] for batch in batches for v, ok in zip(batch["values"], batch["valid"]) if ok]
        assert sorted(valid) == [key for key in keys_of(23) if key not in ("0003", "0010")]
        assert all(ok == (value is not None) for b in batches[:5] for value, ok in zip(b["values"], b["valid"]))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("samples", "bad"), [(23, "0000"), (23, "0022"), (1, "0000")])
def test_padding_is_not_counted_as_dropped(shards: ShardSet, workers: int, samples: int, bad: str) -> None:
    """Three ranks have batches of 5; a sample that fills up a rank is counted on the rank that it belongs to."""
    loads = [
        loader(shards, workers, 5, 3, rank, training=False, samples=samples, decode=unless(bad), max_dropped=0.99)
        for rank in range(3)
    ]
    for load in loads:
        assert len(list(load)) == len(load) > 0
    assert sum(load.dropped for load in loads) == 1


def test_too_many_dropped_stop_the_run(shards: ShardSet) -> None:
    options = {"batch": 2, "world": 1, "rank": 0, "training": False, "decode": unless("0001", "0002", "0003")}
    load = loader(shards, 0, max_dropped=3 / 24, **options)
    assert len(list(load)) == 12 and load.dropped == 3  # exactly the budget
    load = loader(shards, 0, max_dropped=2.9 / 24, **options)
    batches = iter(load)
    assert next(batches)["dropped"][0].key == "0001"
    with pytest.raises(VideoAlignError, match=r"3 of 24 samples.*max_dropped.*000000\.tar, key '0003': cannot be used"):
        next(batches)
    with pytest.raises(VideoAlignError, match="1 of 24"):
        list(loader(shards, 2, max_dropped=0.0, **options))


def test_dropped_samples_are_remembered_by_the_state(shards: ShardSet) -> None:
    options = {
        "batch": 2,
        "world": 1,
        "rank": 0,
        "training": False,
        "decode": unless("0001", "0009"),
        "max_dropped": 0.05,
    }
    load = loader(shards, 0, **options)
    next(iter(load))
    assert load.state_dict()["dropped"] == 1
    again = loader(shards, 0, **options)
    again.load_state_dict(load.state_dict())
    with pytest.raises(VideoAlignError, match="2 of 24"):
        list(again)


def test_resuming_over_dropped_samples(shards: ShardSet) -> None:
    """A dropped sample keeps its place, so that the batches after it are the same."""
    options = {"decode": unless("0003", "0010", "0015"), "max_dropped": 0.9, "world": 1, "rank": 0}
    whole = values(list(loader(shards, 2, **options)))
    assert sum(value is None for batch in whole for value in batch) == 3
    load = loader(shards, 2, **options)
    got = values(list(itertools.islice(load, 6)))
    again = loader(shards, 2, **options)
    again.load_state_dict(load.state_dict())
    assert got + values(list(again)) == whole


def test_other_errors_are_not_swallowed(shards: ShardSet) -> None:
    def broken(raw: RawSample, epoch: int) -> None:
        raise ZeroDivisionError("a mistake of ours")

    with pytest.raises(ZeroDivisionError):
        list(loader(shards, 0, decode=broken, max_dropped=0.9))
