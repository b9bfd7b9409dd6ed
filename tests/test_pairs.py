"""Rated pairs as batches: what stands where, what counts, and that cached frames change nothing."""

import random
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from videoalign import VideoAlignError
from videoalign.alignment import RewardModel
from videoalign.datamodules import frames
from videoalign.datamodules.benchmark import PAIRS
from videoalign.datamodules.contents import RawSample, ShardError
from videoalign.datamodules.frames import FrameReader, encode_frames
from videoalign.datamodules.pairs import PairDecoder, Video, VideoCollate, VideoPair, VideoPairs
from videoalign.datamodules.shards import ShardSet, ShardWriter
from videoalign.datamodules.stream import Dropped, Item
from videoalign.datamodules.verify import verify
from videoalign.datamodules.video import decode, encode
from videoalign.models import DIMENSIONS, VideoReward
from videoalign.models.frame_sampling import FrameSampling
from videoalign.models.processor import RewardProcessor
from videoalign.models.template import Template

WORDS = ("A", "B", "same", "invalid")
VALUES = {"A": 1.0, "B": -1.0, "same": 0.0, "invalid": float("nan")}
PAIRS_ON_DISK, VIDEOS_ON_DISK = 12, 5


def clip(number: int) -> bytes:
    """Nine frames of 32 x 32 at 8 frames a second, with a bar whose place and grey tell the number."""
    frames = np.full((9, 32, 32, 3), 30, np.uint8)
    for t in range(9):
        frames[t, :, 3 * t : 3 * t + 4] = 60 + 6 * number
    return encode(frames, 8)


def labels(number: int) -> dict[str, str]:
    return {column: WORDS[(number + i) % 4] for i, column in enumerate(("VQ", "MQ", "TA", "Overall"))}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, and a benchmark of videos."""
    folder = tmp_path_factory.mktemp("data")
    with ShardWriter(folder / "pairs", "pairs", per_shard=5) as writer:
        for i in range(PAIRS_ON_DISK):
            scores = {"A": {"VQ": 1 + i % 4, "MQ": 2, "TA": 3}, "B": {"VQ": 5, "MQ": 1.5}}
            record = {
                "prompt": f"a red circle {i}",
                "labels": labels(i),
                "scores": scores,
                "sources": {"A": f"left-{i}", "B": f"right-{i}"},
            }
            writer.write(f"{i:06d}", {"a": clip(i), "b": clip(i + 12)}, record)
    with ShardWriter(folder / "videos", "videos", per_shard=2) as writer:
        for i in range(VIDEOS_ON_DISK):
            writer.write(f"v{i}", {"": clip(i)}, {"prompt": f"a blue square {i}"})
        pairs = [("v4", "v0"), ("v0", "v1"), ("v2", "v3")]
        writer.write_table(PAIRS, [{"key_A": a, "key_B": b, **labels(i)} for i, (a, b) in enumerate(pairs)])
    return folder


@pytest.fixture(scope="module")
def processor(backbone: Path, sampling: FrameSampling) -> RewardProcessor:
    return RewardProcessor(backbone, Template.load("plain"), sampling)


def trainer(processor: RewardProcessor, world: int = 1, rank: int = 0) -> SimpleNamespace:
    return SimpleNamespace(
        world_size=world,
        accumulate_grad_batches=1,
        val_check_interval=1.0,
        global_rank=rank,
        lightning_module=SimpleNamespace(processor=processor),
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )


def module(
    processor: RewardProcessor, world: int = 1, rank: int = 0, stage: str = "fit", **options: object
) -> VideoPairs:
    pairs = VideoPairs(**{"workers": 0, "batch_size": 2, **options})
    pairs.trainer = trainer(processor, world, rank)
    pairs.setup(stage)
    return pairs


def on_disk(data: Path, processor: RewardProcessor, name: str = "pairs") -> dict[str, VideoPair]:
    """All pairs of the set, with A and B never exchanged."""
    shards = ShardSet(data / name)
    decode = PairDecoder(FrameReader(shards, processor.sampling, processor.factor), None)
    return {raw.key: decode(raw, 0) for raw in shards}


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(9), b.nan_to_num(9))


def same_pair(a: VideoPair, b: VideoPair) -> bool:
    return (
        (a.key, a.prompt, a.sources) == (b.key, b.prompt, b.sources)
        and same(a.labels, b.labels)
        and same(a.scores, b.scores)
        and all(torch.equal(x, y) for x, y in zip(a.videos, b.videos))
    )


def pair(number: int, frames: int = 4) -> VideoPair:
    shade = torch.full((frames, 3, 16, 16), number, dtype=torch.uint8)
    return VideoPair(
        f"k{number}",
        f"prompt {number}",
        (shade, shade + 100),
        torch.tensor([1.0, -1.0, 0.0, torch.nan]),
        torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, torch.nan]]),
        ("x", "y"),
    )


# --- pairs ----------------------------------------------------------------------------------------


def test_swapped() -> None:
    one = pair(3)
    other = one.swapped()
    assert (other.key, other.prompt, other.sources) == ("k3", "prompt 3", ("y", "x"))
    assert same(other.labels, torch.tensor([-1.0, 1.0, 0.0, torch.nan]))
    assert same(other.scores, torch.tensor([[4.0, 5.0, torch.nan], [1.0, 2.0, 3.0]]))
    assert int(other.videos[0][0, 0, 0, 0]) == 103 and int(other.videos[1][0, 0, 0, 0]) == 3
    assert same_pair(other.swapped(), one)
    assert same(one.labels, torch.tensor([1.0, -1.0, 0.0, torch.nan]))  # the first one is as it was


def test_decoded_pair(data: Path, processor: RewardProcessor) -> None:
    found = on_disk(data, processor)
    assert list(found) == [f"{i:06d}" for i in range(PAIRS_ON_DISK)]
    for i, one in enumerate(found.values()):
        assert one.prompt == f"a red circle {i}" and one.sources == (f"left-{i}", f"right-{i}")
        assert same(one.labels, torch.tensor([VALUES[word] for word in labels(i).values()]))
        assert same(one.scores, torch.tensor([[1.0 + i % 4, 2, 3], [5, 1.5, torch.nan]]))
        assert [video.shape for video in one.videos] == [(8, 3, 32, 32)] * 2
        shades = [int(video[0, 0, 16, 1]) for video in one.videos]
        assert shades == pytest.approx([60 + 6 * i, 60 + 6 * (i + 12)], abs=3)


def test_exchange_is_a_coin_of_seed_epoch_and_key(data: Path, processor: RewardProcessor) -> None:
    shards, straight = ShardSet(data / "pairs"), on_disk(data, processor)
    reader = FrameReader(shards, processor.sampling, processor.factor)

    def exchanged(seed: int, epoch: int, samples: list[RawSample]) -> dict[str, bool]:
        found = {}
        for raw in samples:
            one = PairDecoder(reader, seed)(raw, epoch)
            found[raw.key] = not same_pair(one, straight[raw.key])
            assert not found[raw.key] or same_pair(one, straight[raw.key].swapped())
        return found

    samples = list(shards)
    coins = {(seed, epoch): exchanged(seed, epoch, samples) for seed in (0, 1) for epoch in (0, 1, 2)}
    assert exchanged(1, 2, samples[::-1]) == coins[1, 2]  # the order does not matter
    assert len({tuple(coin.values()) for coin in coins.values()}) == 6
    total = sum(sum(coin.values()) for coin in coins.values())
    assert 20 < total < 52  # of 72


# --- augmentation ---------------------------------------------------------------------------------


class Painted:
    """Turns the frames upside down where a coin says so, and says in the prompt what was drawn."""

    def __call__(
        self, videos: tuple[Tensor, Tensor], prompt: str, rng: random.Random
    ) -> tuple[tuple[Tensor, Tensor], str]:
        number = rng.randrange(10**9)
        return tuple(video.flip(2) if number % 2 else video for video in videos), f"{prompt}, {number}"


class Wrong:
    """Gives what no reward model takes."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __call__(self, videos: tuple[Tensor, Tensor], prompt: str, rng: random.Random) -> tuple:
        return {
            "floats": ((videos[0].float(), videos[1].float()), prompt),
            "odd": (tuple(video[:3] for video in videos), prompt),
            "narrow": (tuple(video[..., :20] for video in videos), prompt),
            "single": (videos[:1], prompt),
            "no prompt": (videos, None),
        }[self.how]


def test_an_augmented_pair_is_a_function_of_seed_epoch_and_key(data: Path, processor: RewardProcessor) -> None:
    shards, straight = ShardSet(data / "pairs"), on_disk(data, processor)
    reader = FrameReader(shards, processor.sampling, processor.factor)

    def seen(seed: int, epoch: int, samples: list[RawSample], swap: int | None = None) -> dict[str, VideoPair]:
        return {raw.key: PairDecoder(reader, swap, Painted(), seed)(raw, epoch) for raw in samples}

    samples = list(shards)
    first = seen(1, 2, samples)
    for key, again in seen(1, 2, samples[::-1]).items():  # the order does not matter
        assert same_pair(first[key], again)
    for key, one in first.items():
        whole = straight[key]
        upside = int(one.prompt.rpartition(" ")[2]) % 2
        want = tuple(video.flip(2) if upside else video for video in whole.videos)  # both alike
        assert one.prompt.startswith(f"{whole.prompt}, ")
        assert same_pair(one, VideoPair(key, one.prompt, want, whole.labels, whole.scores, whole.sources))
    drawn = {one.prompt for pairs in (first, seen(1, 3, samples), seen(2, 2, samples)) for one in pairs.values()}
    assert len(drawn) == 3 * PAIRS_ON_DISK
    for key, one in seen(1, 2, samples, swap=5).items():  # the exchange of A and B is what it is without
        plain = PairDecoder(reader, 5)(next(raw for raw in samples if raw.key == key), 2)
        assert same(one.labels, plain.labels) and one.sources == plain.sources and one.prompt == first[key].prompt


@pytest.mark.parametrize("workers", [0, 2])
def test_training_alone_is_augmented(data: Path, processor: RewardProcessor, workers: int) -> None:
    sets = {"train": str(data / "pairs"), "val": str(data / "pairs"), "seed": 3, "swap": False, "workers": workers}
    pairs = module(processor, augment=Painted(), **sets)
    plain = module(processor, **sets)
    augmented, straight = list(pairs.train_dataloader()), list(plain.train_dataloader())
    for one, other in zip(augmented, straight, strict=True):
        assert one["keys"] == other["keys"] and same(one["labels"], other["labels"])
        assert one["inputs"]["input_ids"].shape != other["inputs"]["input_ids"].shape  # the prompt is longer
    for one, other in zip(pairs.val_dataloader()[0], plain.val_dataloader()[0], strict=True):
        assert all(torch.equal(one["inputs"][name], other["inputs"][name]) for name in other["inputs"])
    assert [one.prompt for one in pairs.examples(2)] == [one.prompt for one in plain.examples(2)]


@pytest.mark.parametrize("how", ["floats", "odd", "narrow", "single", "no prompt"])
def test_an_augmentation_that_gives_no_pair_is_refused(how: str, data: Path, processor: RewardProcessor) -> None:
    shards = ShardSet(data / "pairs")
    reader = FrameReader(shards, processor.sampling, processor.factor)
    with pytest.raises(VideoAlignError, match=r"data\.augment \(Wrong\) gave .*it must give two videos, uint8"):
        PairDecoder(reader, None, Wrong(how))(next(iter(shards)), 0)


def test_an_image_beside_the_video_is_not_augmented(data: Path, processor: RewardProcessor) -> None:
    shown = SimpleNamespace(template=SimpleNamespace(image=True, name="with-image"))
    with pytest.raises(VideoAlignError, match=r"data\.augment .*template 'with-image'"):
        module(shown, train=str(data / "pairs"), augment=Painted())
    module(shown, train=str(data / "pairs"))


# --- collate --------------------------------------------------------------------------------------


def test_collate_keeps_places(processor: RewardProcessor) -> None:
    items = [
        Item(Dropped("gone", "why not"), False),
        Item(pair(1), True),
        Item(pair(2), True),
        Item(pair(3), False),
        Item(Dropped("too", "because"), False),
    ]
    batch = VideoCollate(processor)(items)
    assert batch["valid"].tolist() == [False, True, True, False, False]
    assert [drop.key for drop in batch["dropped"]] == ["gone", "too"]
    assert batch["keys"] == ["k1", "k1", "k2", "k3", "k1"]
    assert batch["labels"].shape == (5, 4) and batch["scores"].shape == (2, 5, 3)
    assert batch["labels"][:, 3].isnan().all()
    assert not batch["labels"][:, :3].isnan().any()
    assert same(batch["scores"][:, 2], pair(2).scores)
    # The A sides of all pairs come first, then the B sides.
    order = [1, 1, 2, 3, 1]
    want = processor(
        [pair(n).videos[0] for n in order] + [pair(n).videos[1] for n in order], [f"prompt {n}" for n in order] * 2
    )
    assert batch["inputs"].keys() == want.keys()
    assert all(torch.equal(batch["inputs"][name], want[name]) for name in want)
    assert len(batch["inputs"]["input_ids"]) == 10


def test_collate_of_unequal_sizes(processor: RewardProcessor) -> None:
    small, large = pair(1), pair(2, frames=8)
    batch = VideoCollate(processor)([Item(small, True), Item(large, True)])
    assert batch["inputs"]["video_grid_thw"].tolist() == [[2, 2, 2], [4, 2, 2]] * 2
    tokens = batch["inputs"]["attention_mask"].sum(1).tolist()
    assert tokens == tokens[:2] * 2


def test_collate_with_nothing_sound(processor: RewardProcessor) -> None:
    batch = VideoCollate(processor)([Item(Dropped("gone", "why not"), False)] * 2)
    assert batch["valid"].tolist() == [False, False]
    assert len(batch["dropped"]) == 2
    assert "inputs" not in batch


def test_collate_of_a_benchmark(processor: RewardProcessor) -> None:
    videos = [Video(f"v{n}", n, f"prompt {n}", pair(n).videos[0]) for n in (4, 2)]
    batch = VideoCollate(processor, "recent")(
        [Item(videos[0], True), Item(videos[1], False), Item(Dropped("x", "y"), False)]
    )
    assert batch["benchmark"] == "recent" and batch["numbers"].tolist() == [4, 2, 4]
    assert batch["valid"].tolist() == [True, False, False] and batch["keys"] == ["v4", "v2", "v4"]
    want = processor([videos[i].frames for i in (0, 1, 0)], ["prompt 4", "prompt 2", "prompt 4"])
    assert all(torch.equal(batch["inputs"][name], want[name]) for name in want)
    assert "labels" not in batch


# --- the DataModule -------------------------------------------------------------------------------


def check(batch: dict, straight: dict[str, VideoPair], exchanged: dict[str, bool], processor: RewardProcessor) -> None:
    """Assert that a batch holds the pairs that its keys name."""
    pairs = [straight[key].swapped() if exchanged[key] else straight[key] for key in batch["keys"]]
    assert same(batch["labels"], torch.stack([one.labels for one in pairs]))
    assert same(batch["scores"], torch.stack([one.scores for one in pairs], 1))
    want = processor(
        [one.videos[0] for one in pairs] + [one.videos[1] for one in pairs], [one.prompt for one in pairs] * 2
    )
    assert all(torch.equal(batch["inputs"][name], want[name]) for name in want)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches(data: Path, processor: RewardProcessor, workers: int) -> None:
    straight, epochs = on_disk(data, processor), []
    shards = ShardSet(data / "pairs")
    decode = PairDecoder(FrameReader(shards, processor.sampling, processor.factor), 7)
    loaders = [
        module(
            processor, 2, rank, train=str(data / "pairs"), seed=7, shuffle_buffer=3, workers=workers
        ).train_dataloader()
        for rank in range(2)
    ]
    assert [len(load) for load in loaders] == [3, 3]
    for epoch in range(2):
        exchanged = {raw.key: not same_pair(decode(raw, epoch), straight[raw.key]) for raw in shards}
        seen = []
        for load in loaders:
            for batch in load:
                check(batch, straight, exchanged, processor)
                assert batch["valid"].all()
                assert not batch["dropped"]
                seen += batch["keys"]
        assert sorted(seen) == sorted(straight)
        epochs.append(seen)
    assert epochs[0] != epochs[1]


def test_without_exchange(data: Path, processor: RewardProcessor) -> None:
    straight = on_disk(data, processor)
    load = module(processor, train=str(data / "pairs"), swap=False, shuffle_buffer=0, batch_size=5).train_dataloader()
    for _ in range(2):
        batches = list(load)
        assert [key for batch in batches for key in batch["keys"]] == list(straight)[:10]
        for batch in batches:
            check(batch, straight, dict.fromkeys(straight, False), processor)


def trained_on(load: object) -> list[str]:
    """The keys that one epoch trains on."""
    return [key for batch in load for key in batch["keys"]]


def test_a_share_of_the_training_pairs(data: Path, processor: RewardProcessor) -> None:
    """A share has exactly so many pairs, whole and undamaged, and smaller shares are parts of larger ones.

    This holds for every seed, and the held-out pairs are all there.
    """
    straight, seen = on_disk(data, processor), {}
    for share in (0.25, 0.5, 1.0):
        for seed in (0, 1):
            options = {
                "train": str(data / "pairs"),
                "val": str(data / "pairs"),
                "train_share": share,
                "batch_size": 3,
                "seed": seed,
            }
            pairs = module(processor, swap=False, **options)
            loads = [pairs.train_dataloader() for _ in range(2)]
            keys = {*trained_on(loads[0])}
            assert len(keys) == 12 * share
            assert {*trained_on(loads[0])} == keys
            for batch in loads[1]:
                check(batch, straight, dict.fromkeys(straight, False), processor)
            seen[share, seed] = keys
            assert len(trained_on(pairs.val_dataloader()[0])) == 12
    assert seen[0.25, 0] < seen[0.5, 0] < seen[1.0, 0]
    assert all(seen[s, 0] == seen[s, 1] for s in (0.25, 0.5, 1.0))


def test_listed_training_pairs(tmp_path: Path, data: Path, processor: RewardProcessor) -> None:
    keys = sorted(on_disk(data, processor))[3:9]
    (tmp_path / "keys.txt").write_text("\n".join(keys) + "\n\n")
    options = {"train": str(data / "pairs"), "train_keys": str(tmp_path / "keys.txt")}
    assert sorted(trained_on(module(processor, **options).train_dataloader())) == keys
    (tmp_path / "keys.txt").write_text("nowhere\n")
    with pytest.raises(VideoAlignError, match="has no pair 'nowhere'"):
        module(processor, **options).train_dataloader()
    for wrong in ("", None):
        if wrong is None:
            (tmp_path / "keys.txt").unlink()
        else:
            (tmp_path / "keys.txt").write_text(wrong)
        with pytest.raises(VideoAlignError, match=r"data\.train_keys"):
            module(processor, **options).train_dataloader()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_batches(data: Path, processor: RewardProcessor, world: int) -> None:
    straight, seen, numbers = on_disk(data, processor), [], []
    for rank in range(world):
        options = {"val": str(data / "pairs"), "benchmarks": {"mine": str(data / "videos")}, "val_batch_size": 5}
        one = module(processor, world, rank, "validate", **options)
        pairs, videos = one.val_dataloader()
        benchmark = one.benchmarks["mine"]
        for batch in pairs:
            check(batch, straight, dict.fromkeys(straight, False), processor)
            seen += [key for key, valid in zip(batch["keys"], batch["valid"]) if valid]
        for batch in videos:
            assert batch["benchmark"] == "mine"
            assert [benchmark.keys[number] for number in batch["numbers"]] == batch["keys"]
            numbers += batch["numbers"][batch["valid"]].tolist()
    assert sorted(seen) == sorted(straight)
    assert sorted(numbers) == list(range(VIDEOS_ON_DISK))
    assert benchmark.keys == ["v4", "v0", "v1", "v2", "v3"]
    assert len(one.test_dataloader()) == 2


def test_benchmark_videos_are_those_of_their_key(data: Path, processor: RewardProcessor) -> None:
    (videos,) = module(processor, stage="validate", benchmarks={"mine": str(data / "videos")}).val_dataloader()
    shards = ShardSet(data / "videos")
    reader = FrameReader(shards, processor.sampling, processor.factor)
    frames = {raw.key: (reader(raw)[0], raw.record()["prompt"]) for raw in shards}
    for batch in videos:
        want = processor(*zip(*(frames[key] for key in batch["keys"])))
        assert all(torch.equal(batch["inputs"][name], want[name]) for name in want)


def test_examples_are_the_first_ones_as_they_are(data: Path, processor: RewardProcessor) -> None:
    one = module(processor, val=str(data / "pairs"))
    straight = list(on_disk(data, processor).values())
    found = one.examples(3)
    assert len(found) == 3
    assert all(same_pair(a, b) for a, b in zip(found, straight))
    assert len(one.examples(100)) == PAIRS_ON_DISK


def test_a_damaged_sample_is_dropped(tmp_path: Path, data: Path, processor: RewardProcessor) -> None:
    with ShardWriter(tmp_path / "set", "pairs") as writer:
        for raw in ShardSet(data / "pairs"):
            bad = raw.key == "000004"
            writer.write(raw.key, {"a": b"x" if bad else raw.members["a.mp4"], "b": raw.members["b.mp4"]}, raw.record())
    load = module(
        processor, train=str(tmp_path / "set"), batch_size=6, shuffle_buffer=0, max_dropped=0.1
    ).train_dataloader()
    first, second = list(load)
    assert first["valid"].tolist() == [True] * 4 + [False] + [True]
    assert second["valid"].all()
    assert first["keys"][4] == "000000"
    assert load.dropped == 1
    assert "key '000004', a.mp4 is no readable video" in first["dropped"][0].reason
    load = module(processor, train=str(tmp_path / "set"), batch_size=6).train_dataloader()
    with pytest.raises(VideoAlignError, match=r"1 of 12 samples could not be used.*'000004'"):
        list(load)


def test_a_damaged_sample_is_no_example(tmp_path: Path, data: Path, processor: RewardProcessor) -> None:
    with ShardWriter(tmp_path / "set", "pairs") as writer:
        for raw in ShardSet(data / "pairs"):
            bad = raw.key == "000001"
            writer.write(raw.key, {"a": b"x" if bad else raw.members["a.mp4"], "b": raw.members["b.mp4"]}, raw.record())
    found = module(processor, val=str(tmp_path / "set")).examples(3)
    straight = module(processor, val=str(data / "pairs")).examples(4)
    assert all(same_pair(a, b) for a, b in zip(found, [straight[0], *straight[2:]], strict=True))


REFUSED = {
    "batch_size": {"batch_size": 0},
    "val_batch_size": {"val_batch_size": -1},
    "workers": {"workers": -1},
    "shuffle_buffer": {"shuffle_buffer": -1},
    "max_dropped": {"max_dropped": 1.0},
    "train_share": {"train_share": 0.0},
    "train_keys and data.train_share": {"train_keys": "keys.txt", "train_share": 0.5},
}


@pytest.mark.parametrize("name", REFUSED)
def test_impossible_options_are_refused(name: str) -> None:
    with pytest.raises(VideoAlignError, match=rf"data\.{name}"):
        VideoPairs(**REFUSED[name])


def test_missing_paths_are_named(data: Path, processor: RewardProcessor) -> None:
    with pytest.raises(VideoAlignError, match=r"data\.train is not set"):
        module(processor).train_dataloader()
    with pytest.raises(VideoAlignError, match=r"data\.val is not set"):
        module(processor).examples(1)
    with pytest.raises(VideoAlignError, match=r"data\.val and data\.benchmarks are both empty"):
        module(processor, stage="validate")
    with pytest.raises(VideoAlignError, match="holds videos, but pairs are needed"):
        module(processor, train=str(data / "videos")).train_dataloader()
    with pytest.raises(VideoAlignError, match="holds pairs, but videos are needed"):
        module(processor, benchmarks={"mine": str(data / "pairs")})
    with pytest.raises(
        VideoAlignError, match=r"12 samples, fewer than one step takes: data\.batch_size 5 on each of 3 ranks"
    ):
        module(processor, world=3, train=str(data / "pairs"), batch_size=5).train_dataloader()


# --- frames that were decoded before --------------------------------------------------------------


def encoded(source: Path, out: Path, processor: RewardProcessor) -> ShardSet:
    shards = ShardSet(source)
    counts = list(encode_frames(shards, out, processor.sampling, processor.factor))
    assert counts == list(range(1, shards.index.samples + 1))
    return ShardSet(out)


def test_cached_frames_are_identical(tmp_path: Path, data: Path, processor: RewardProcessor) -> None:
    for name in ("pairs", "videos"):
        source, cache = ShardSet(data / name), encoded(data / name, tmp_path / name, processor)
        assert cache.index.kind == name
        assert not list(verify(cache))
        samples = zip(list(source), list(cache), strict=True)
        decode, load = (FrameReader(s, processor.sampling, processor.factor) for s in (source, cache))
        for a, b in samples:
            assert a.key == b.key and a.record() == b.record()
            assert all(torch.equal(x, y) for x, y in zip(decode(a), load(b), strict=True))
    assert (tmp_path / "videos" / PAIRS).read_bytes() == (data / "videos" / PAIRS).read_bytes()
    before, after = on_disk(data, processor), on_disk(tmp_path, processor)
    assert all(same_pair(before[key], after[key]) for key in before)


def test_batches_from_a_cache_are_identical(tmp_path: Path, data: Path, processor: RewardProcessor) -> None:
    encoded(data / "pairs", tmp_path / "cache", processor)
    batches: list[list[dict]] = [
        list(module(processor, train=str(path), shuffle_buffer=0).train_dataloader())
        for path in (data / "pairs", tmp_path / "cache")
    ]
    for a, b in zip(*batches, strict=True):
        assert a["keys"] == b["keys"]
        assert same(a["labels"], b["labels"])
        assert same(a["scores"], b["scores"])
        assert all(torch.equal(a["inputs"][name], b["inputs"][name]) for name in a["inputs"])


@pytest.mark.parametrize(("keep", "again"), [(0.0, 1.0), (1.0, 0.0), (3e-4, 0.5)])
def test_kept_videos_are_decoded_once_and_stay_as_they_were(
    data: Path, processor: RewardProcessor, monkeypatch: pytest.MonkeyPatch, keep: float, again: float
) -> None:
    """Without memory every video is decoded again, with enough none, and with little some."""
    shards, decoded = ShardSet(data / "pairs"), []
    monkeypatch.setattr(frames, "decode", lambda *given: decoded.append(given[-1]) or decode(*given))
    plain = FrameReader(shards, processor.sampling, processor.factor)
    kept = FrameReader(shards, processor.sampling, processor.factor, keep_gb=keep)
    samples = list(shards)
    want = [plain(raw) for raw in samples]
    decoded.clear()
    for raw in samples:
        for video in kept(raw):
            video.zero_()  # as an augmentation might
    first = len(decoded)
    got = [kept(raw) for raw in samples]
    assert all(torch.equal(a, b) for x, y in zip(got, want) for a, b in zip(x, y))
    share = (len(decoded) - first) / first
    assert share == again if again in (0, 1) else 0 < share < 1
    assert sum(video.nbytes for video in kept._kept.values()) <= keep * 1e9


def test_training_keeps_videos_and_evaluation_does_not(data: Path, processor: RewardProcessor) -> None:
    pairs = module(processor, train=str(data / "pairs"), val=str(data / "pairs"), keep_gb=1.0)
    train, (val, *_) = pairs.train_dataloader(), pairs.val_dataloader()
    for loader in (train, val):
        list(loader)
    assert train.stream.decode.reader._kept and not val.stream.decode.reader._kept
    with pytest.raises(VideoAlignError, match=r"data\.keep_gb must be at least 0"):
        module(processor, train=str(data / "pairs"), keep_gb=-1.0)


@pytest.mark.parametrize(
    ("option", "value"), [("fps", 4.0), ("max_frames", 4), ("min_pixels", 50), ("max_pixels", 256), ("min_frames", 6)]
)
def test_frames_for_another_sampling_are_refused(
    tmp_path: Path, data: Path, processor: RewardProcessor, option: str, value: float
) -> None:
    cache = encoded(data / "videos", tmp_path / "cache", processor)
    wanted = FrameSampling(**{**processor.sampling.to_dict(), option: value})
    stored = processor.sampling.to_dict()[option]
    with pytest.raises(ShardError, match=rf"another model \({option}: {stored} stored, {value} wanted\)"):
        FrameReader(cache, wanted, processor.factor)


def test_frames_of_another_factor_are_refused(tmp_path: Path, data: Path, processor: RewardProcessor) -> None:
    cache = encoded(data / "videos", tmp_path / "cache", processor)
    with pytest.raises(ShardError, match="factor: 16 stored, 28 wanted"):
        FrameReader(cache, processor.sampling, 28)
    with pytest.raises(ShardError, match="holds decoded frames already"):
        list(encode_frames(cache, tmp_path / "again", processor.sampling, 16))
    by_count = FrameSampling(fps=None, num_frames=8, min_pixels=0)
    with pytest.raises(ShardError, match=r"fps: 8\.0 stored, None wanted; num_frames: None stored, 8 wanted"):
        FrameReader(cache, by_count, 16)


def test_encoding_stops_at_damage_and_leaves_nothing(tmp_path: Path, data: Path, processor: RewardProcessor) -> None:
    with ShardWriter(tmp_path / "set", "videos") as writer:
        writer.write("good", {"": clip(0)}, {"prompt": "p"})
        writer.write("bad", {"": b"x" * 100}, {"prompt": "p"})
    with pytest.raises(VideoAlignError, match="key 'bad'"):
        list(encode_frames(ShardSet(tmp_path / "set"), tmp_path / "out", processor.sampling, 16))
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    (tmp_path / "out").write_text("mine")
    with pytest.raises(VideoAlignError, match="exists already"):
        list(encode_frames(ShardSet(data / "videos"), tmp_path / "out", processor.sampling, 16))
    assert (tmp_path / "out").read_text() == "mine"


def test_encoding_with_processes_gives_the_same_bytes(tmp_path: Path, data: Path, processor: RewardProcessor) -> None:
    encoded(data / "pairs", tmp_path / "one", processor)
    with ThreadPoolExecutor(2) as pool:
        list(encode_frames(ShardSet(data / "pairs"), tmp_path / "two", processor.sampling, processor.factor, pool))
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_encoding_does_not_read_a_whole_set_at_once(tmp_path: Path, processor: RewardProcessor) -> None:
    """Sets are larger than memory: what is read stays near what is written."""
    with ShardWriter(tmp_path / "set", "videos") as writer:
        content = clip(0)
        for i in range(100):
            writer.write(f"{i}", {"": content}, {"prompt": "p"})

    class Counting(ShardSet):
        read_samples = 0

        def __iter__(self) -> Iterator[RawSample]:
            for raw in super().__iter__():
                self.read_samples += 1
                yield raw

    shards = Counting(tmp_path / "set")
    with ThreadPoolExecutor(1) as pool:
        work = encode_frames(shards, tmp_path / "out", processor.sampling, 16, pool)
        try:
            assert next(work) == 1
            assert shards.read_samples < 100
        finally:
            work.close()
    assert not (tmp_path / "out").exists()


def test_pairs_that_nobody_rated_are_refused(tmp_path: Path, processor: RewardProcessor) -> None:
    """Training on them would run to its end, and teach nothing."""
    with ShardWriter(tmp_path / "bare", "pairs") as writer:
        for i in range(4):
            writer.write(f"{i}", {"a": clip(i), "b": clip(i + 5)}, {"prompt": "a circle", "labels": {"VQ": ""}})
    for which in ("train", "val"):
        with pytest.raises(VideoAlignError, match=r"bare: .*4 pairs .*has a label or a score"):
            getattr(module(processor, **{which: str(tmp_path / "bare")}), f"{which}_dataloader")()


@pytest.mark.parametrize(
    ("record", "learns", "lacks"),
    [
        ({"labels": {"VQ": "A", "MQ": "B", "TA": "same"}}, {"btt"}, {"bt": "TA"}),
        ({"labels": {"VQ": "same", "MQ": "same", "TA": "same"}}, {"btt"}, {}),
        ({"labels": {"VQ": "A", "MQ": "B", "TA": ""}}, set(), {"btt": "TA", "bt": "TA"}),
        ({"labels": {}, "scores": {s: dict.fromkeys(DIMENSIONS, 4) for s in "AB"}}, {"reg"}, {}),
        ({"labels": {}, "scores": {"A": {"VQ": 4}, "B": {"MQ": 2}}}, set(), {"reg": "TA"}),
    ],
)
def test_a_loss_without_targets_is_refused(
    record: dict, learns: set, lacks: dict, tmp_path: Path, backbone: Path, sampling: FrameSampling
) -> None:
    """A training on labels by a loss that reads scores, and the like, runs to its end and teaches nothing."""
    with ShardWriter(tmp_path / "set", "pairs") as writer:
        for i in range(4):
            writer.write(f"{i}", {"a": clip(i), "b": clip(i + 5)}, {"prompt": "a circle", **record})
    for loss in ("btt", "bt", "reg"):
        learner = RewardModel(VideoReward(backbone, "plain", sampling), loss=loss)
        pairs = module(learner.processor, train=str(tmp_path / "set"), val=str(tmp_path / "set"))
        pairs.trainer.lightning_module = learner
        pairs.val_dataloader()  # accuracies need no targets
        if loss in lacks:
            with pytest.warns(UserWarning, match=f"set has a target for {lacks[loss]} that"):
                pairs.train_dataloader()
        elif loss in learns:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*has a target.*")
                pairs.train_dataloader()
        else:
            with pytest.raises(VideoAlignError, match=r"none of its 4 pairs has what this model\.loss learns from"):
                pairs.train_dataloader()


def test_one_unsound_rating_does_not_end_what_max_dropped_allows(
    tmp_path: Path, backbone: Path, sampling: FrameSampling
) -> None:
    with ShardWriter(tmp_path / "set", "pairs") as writer:
        for i in range(4):
            scores = {"A": {"VQ": 9 if i == 0 else 4}}
            record = {"prompt": "a circle", "labels": {"VQ": "A", "MQ": "B", "TA": "same"}, "scores": scores}
            writer.write(f"{i}", {"a": clip(i), "b": clip(i + 5)}, record)
    learner = RewardModel(VideoReward(backbone, "plain", sampling))
    pairs = module(learner.processor, train=str(tmp_path / "set"), max_dropped=0.5)
    pairs.trainer.lightning_module = learner
    assert sum(len(batch["dropped"]) for batch in pairs.train_dataloader()) == 1
