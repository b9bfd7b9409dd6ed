"""The order of samples: every one exactly once, on any number of ranks and workers, and resumable at any batch."""

import io
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from videoalign import VideoAlignError
from videoalign.datamodules import stream as module
from videoalign.datamodules.shards import RawSample, Shard, ShardSet, ShardWriter
from videoalign.datamodules.stream import Dropped, Item, ShardLoader, ShardStream, Share, shuffled

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

SIZES, BATCHES, WORLDS, WORKERS = (1, 5, 7, 23), (1, 2, 3), (1, 2, 3), (0, 1, 2, 3)
PLANS = list(itertools.product(SIZES, BATCHES, WORLDS, WORKERS))


def keys_of(samples: int) -> list[str]:
    return [f"{i:04d}" for i in range(samples)]


class Memory:
    """A set without files: the part of ShardSet that a stream uses."""

    def __init__(self, samples: int, per_shard: int = 4) -> None:
        keys = keys_of(samples)
        self.content = {
            f"{i:06d}.tar": keys[first : first + per_shard] for i, first in enumerate(range(0, samples, per_shard))
        }
        self.index = SimpleNamespace(
            shards=[Shard(name, len(keys), 0, "") for name, keys in self.content.items()], samples=samples
        )
        self.path = Path("memory")

    def read(self, shard: Shard, start: int = 0, stop: int | None = None) -> Iterator[RawSample]:
        for key in self.content[shard.name][start:stop]:
            yield RawSample(key, shard.name, {})


def decode(raw: RawSample, epoch: int) -> tuple[str, int]:
    return raw.key, epoch


def epoch_of(
    monkeypatch: pytest.MonkeyPatch, stream: ShardStream, workers: int, epoch: int = 0, skip: int = 0
) -> list[list[Item]]:
    """The batches of a DataLoader, which asks its workers in turn and passes over those that are done."""
    stream.position.copy_(torch.tensor([epoch, skip]))
    size, queues = stream.share.batch, []
    for worker in range(max(workers, 1)):
        info = SimpleNamespace(id=worker, num_workers=workers) if workers else None
        monkeypatch.setattr(module, "get_worker_info", lambda info=info: info)
        items = list(stream)
        queues.append([items[i : i + size] for i in range(0, len(items), size)])
    batches = []
    while any(queues):
        batches += [queue.pop(0) for queue in queues if queue]
    return batches


def streams(share: Share, buffer: int = 0, seed: int = 0, per_shard: int = 4) -> list[ShardStream]:
    """One for each rank."""
    shards = Memory(share.samples, per_shard)
    return [ShardStream(shards, decode, share, rank, seed, buffer) for rank in range(share.world)]


def keys(batches: list[list[Item]]) -> list[str]:
    return [item.value[0] for batch in batches for item in batch]


# --- the plan, on a grid ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", SIZES)
def test_evaluation_covers_every_sample_once(monkeypatch: pytest.MonkeyPatch, samples: int) -> None:
    for batch, world, workers in itertools.product(BATCHES, WORLDS, WORKERS):
        share = Share(samples, batch, world, training=False)
        ranks = [epoch_of(monkeypatch, stream, workers) for stream in streams(share)]
        plan = f"batch {batch}, world {world}, workers {workers}"
        assert {len(batches) for batches in ranks} == {share.batches}, plan
        assert {len(b) for batches in ranks for b in batches} == {batch}, plan
        assert share.batches * batch * world < samples + batch * world + world, f"{plan}: more padding than needed"
        items = [item for batches in ranks for b in batches for item in b]
        assert sorted(item.value[0] for item in items if item.valid) == keys_of(samples), plan
        if workers < 2:  # in the order of the set
            for batches in ranks:
                valid = [item.value[0] for b in batches for item in b if item.valid]
                assert valid == sorted(valid)


@pytest.mark.parametrize("samples", SIZES)
def test_evaluation_order_does_not_depend_on_the_epoch(monkeypatch: pytest.MonkeyPatch, samples: int) -> None:
    (stream,) = streams(Share(samples, 2, 1, training=False))
    assert keys(epoch_of(monkeypatch, stream, 2, epoch=0)) == keys(epoch_of(monkeypatch, stream, 2, epoch=5))


@pytest.mark.parametrize("samples", SIZES)
@pytest.mark.parametrize("buffer", [0, 4])
def test_training_samples_are_disjoint(monkeypatch: pytest.MonkeyPatch, samples: int, buffer: int) -> None:
    for (batch, world, workers), epoch in itertools.product(itertools.product(BATCHES, WORLDS, WORKERS), (0, 3)):
        share = Share(samples, batch, world, training=True)
        assert share.batches == samples // (batch * world)
        ranks = [epoch_of(monkeypatch, stream, workers, epoch) for stream in streams(share, buffer)]
        plan = f"batch {batch}, world {world}, workers {workers}"
        assert [len(batches) for batches in ranks] == [share.batches] * world, plan
        items = [item for batches in ranks for b in batches for item in b]
        assert all(item.valid for item in items), plan
        seen = [item.value[0] for item in items]
        assert len(seen) == len(set(seen)) == share.batches * batch * world, plan
        assert {item.value[1] for item in items} <= {epoch}, plan


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("world", WORLDS)
def test_training_order(monkeypatch: pytest.MonkeyPatch, workers: int, world: int) -> None:
    """Another one in each epoch and for each seed, the same one for the same."""
    share = Share(23, 2, world, training=True)

    def order(seed: int, epoch: int) -> list[str]:
        return [k for s in streams(share, 4, seed) for k in keys(epoch_of(monkeypatch, s, workers, epoch))]

    orders = {(seed, epoch): order(seed, epoch) for seed in (0, 1) for epoch in range(3)}
    assert len({tuple(o) for o in orders.values()}) == 6
    assert all(order(*place) == o for place, o in orders.items())
    assert all(o != sorted(o) for o in orders.values())


def test_no_buffer_keeps_the_order_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    (stream,) = streams(Share(23, 2, 1, training=True))
    for epoch in (0, 1):
        assert keys(epoch_of(monkeypatch, stream, 0, epoch)) == keys_of(22)


@pytest.mark.parametrize("per_shard", [4, 100], ids=["many shards", "one shard"])
def test_every_sample_trains_in_the_long_run(monkeypatch: pytest.MonkeyPatch, per_shard: int) -> None:
    """What does not fill a batch is left out, but other samples in each epoch."""
    (stream,) = streams(Share(23, 5, 1, training=True), buffer=4, per_shard=per_shard)
    seen = Counter(key for epoch in range(40) for key in keys(epoch_of(monkeypatch, stream, 2, epoch)))
    assert sorted(seen) == keys_of(23)


@pytest.mark.parametrize("training", [False, True])
def test_resuming_at_any_batch(monkeypatch: pytest.MonkeyPatch, training: bool) -> None:
    for samples, batch, world, workers in PLANS:
        share = Share(samples, batch, world, training)
        stream = streams(share, buffer=4)[-1]
        whole = epoch_of(monkeypatch, stream, workers, epoch=2)
        for done in range(len(whole) + 1):
            rest = epoch_of(monkeypatch, stream, workers, epoch=2, skip=done)
            assert rest == whole[done:], (samples, batch, world, workers, done)


def test_skipped_samples_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    stream = ShardStream(
        Memory(23), lambda raw, epoch: decoded.append(raw.key) or (raw.key, 0), Share(23, 2, 1, True), 0
    )
    epoch_of(monkeypatch, stream, 2, skip=9)
    assert len(decoded) == 4


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


# --- loaders with processes ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """23 samples on disk whose videos are a few bytes."""
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
    shards: ShardSet, workers: int, batch: int = 2, world: int = 2, rank: int = 1, training: bool = True, seed: int = 3,
    buffer: int = 4, samples: int | None = None, decode: Callable = decode, max_dropped: float = 0.0, **options: object,
) -> ShardLoader:  # fmt: skip
    share = Share(samples or shards.index.samples, batch, world, training)
    stream = ShardStream(shards, decode, share, rank, seed, buffer if training else 0)
    return ShardLoader(stream, collate, workers, max_dropped, **options)


def values(batches: list[dict]) -> list[list]:
    return [batch["values"] for batch in batches]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("workers", WORKERS)
def test_loader_follows_the_plan(
    shards: ShardSet, monkeypatch: pytest.MonkeyPatch, workers: int, training: bool
) -> None:
    load = loader(shards, workers, training=training)
    got = [list(load) for _ in range(2)]
    assert len(load) == len(got[0]) == len(got[1])
    stream = loader(shards, 0, training=training).stream
    for epoch in range(2):
        plan = epoch_of(monkeypatch, stream, workers, epoch)
        assert values(got[epoch]) == [[item.value for item in batch] for batch in plan]
        assert [batch["valid"] for batch in got[epoch]] == [[item.valid for item in batch] for batch in plan]


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_together_see_every_sample(shards: ShardSet, workers: int) -> None:
    seen, lengths = [], set()
    for rank in range(3):
        batches = list(loader(shards, workers, world=3, rank=rank, training=False))
        lengths.add(len(batches))
        seen += [v[0] for b in batches for v, valid in zip(b["values"], b["valid"]) if valid]
    assert sorted(seen) == keys_of(23) and len(lengths) == 1


@pytest.mark.parametrize("workers", WORKERS)
def test_resuming_continues_the_run(shards: ShardSet, workers: int) -> None:
    """After k batches, through the end of that epoch and the next; 5 batches an epoch."""
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
    "samples": {"samples": 22}, "batch size": {"batch": 3}, "ranks": {"world": 3}, "workers": {"workers": 1},
    "seed": {"seed": 4}, "shuffle": {"buffer": 5},
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_changed_geometry_is_refused_in_an_epoch(shards: ShardSet, name: str) -> None:
    """Only what began can be continued; at the end of an epoch nothing hinders a change."""
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


# --- dropped samples -------------------------------------------------------------------------------------------------


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
    """Batches of 5 on 3 ranks; the samples that ranks are filled up with were counted where they count."""
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
