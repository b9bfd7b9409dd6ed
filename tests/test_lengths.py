"""Batches of similar length: what records and bytes tell of a length, and how much of a batch is padding."""

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers import plain_clip
from videoalign import VideoAlignError
from videoalign.datamodules.frames import encode_frames
from videoalign.datamodules.lengths import lengths_of
from videoalign.datamodules.pairs import VideoPairs
from videoalign.datamodules.shards import ShardSet, ShardWriter
from videoalign.models.processor import RewardProcessor
from videoalign.models.template import Template

SAMPLES = 24
FRAMES = random.Random(0).sample(range(2, 2 + 2 * SAMPLES), SAMPLES)
"""Frames of the longer video of each pair."""
SHAPE = {"fps": 8, "height": 32, "width": 32}
"""What else the records tell."""


@pytest.fixture(scope="module")
def processor(backbone, sampling) -> RewardProcessor:
    return RewardProcessor(backbone, Template.load("plain"), sampling)


@pytest.fixture(scope="module")
def data(tmp_path_factory, processor) -> Path:
    """Pairs of clips of many lengths, once with what their records tell, once without, once as decoded frames."""
    folder = tmp_path_factory.mktemp("lengths")
    for name in ("told", "untold"):
        with ShardWriter(folder / name, "pairs", per_shard=5) as writer:
            for i, frames in enumerate(FRAMES):
                sides = {"A": frames, "B": max(2, frames - 1)} if i % 2 else {"B": frames, "A": max(2, frames - 1)}
                record = {"prompt": "a red circle", "labels": {"VQ": "A"}}
                if name == "told":
                    record |= {"num_frames": sides, **{key: dict.fromkeys("AB", v) for key, v in SHAPE.items()}}
                videos = {side.lower(): plain_clip(30 + i, count, 32, 32) for side, count in sides.items()}
                writer.write(f"{i:06d}", videos, record)
    for _ in encode_frames(ShardSet(folder / "untold"), folder / "frames", processor.sampling, processor.factor, None):
        pass
    return folder


def module(processor, path, **options):
    pairs = VideoPairs(train=str(path), workers=0, batch_size=4, **options)
    pairs.trainer = SimpleNamespace(
        world_size=1,
        accumulate_grad_batches=1,
        val_check_interval=1.0,
        global_rank=0,
        lightning_module=SimpleNamespace(processor=processor),
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    pairs.setup("fit")
    return pairs


def loader(processor, path, **options):
    return module(processor, path, **options).train_dataloader()


@pytest.mark.parametrize("kind", ["told", "frames"])
def test_lengths_order_pairs_as_their_frames_do(kind, data, processor):
    shards = ShardSet(data / kind)
    lengths = lengths_of(shards, list(shards.contents()), processor)
    decode = loader(processor, data / kind).stream.decode
    seen = [max(len(video) for video in decode(raw, 0).videos) for raw in shards]
    assert len(set(seen)) > 5
    order = sorted(range(SAMPLES), key=lambda number: lengths[number])
    assert [seen[number] for number in order] == sorted(seen)


def padding(batches) -> float:
    """Share of the places of batches that is padding."""
    masks = [batch["inputs"]["attention_mask"] for batch in batches]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


@pytest.mark.parametrize("kind", ["told", "untold", "frames"])
def test_groups_leave_less_padding_and_drop_nothing(kind, data, processor):
    plain, grouped = (list(loader(processor, data / kind, group_by_length=group)) for group in (0, 6))
    assert padding(grouped) < 0.5 * padding(plain)
    for batches in (plain, grouped):
        assert sorted(key for batch in batches for key in batch["keys"]) == [f"{n:06d}" for n in range(SAMPLES)]


def test_held_out_pairs_keep_their_order(data, processor):
    options = {"val": str(data / "told"), "swap": False}
    plain, grouped = (module(processor, data / "told", group_by_length=group, **options) for group in (0, 6))
    assert list(plain.val_dataloader()[0].stream.slots(0)) == list(grouped.val_dataloader()[0].stream.slots(0))
    assert list(plain.train_dataloader().stream.slots(0)) != list(grouped.train_dataloader().stream.slots(0))


def test_an_epoch_goes_on_with_the_lengths_that_formed_its_batches(data, processor):
    """Other lengths, as of another frame rate, would deal some pairs twice and others never."""
    first = loader(processor, data / "told", group_by_length=6)
    batches = iter(first)
    next(batches)
    state = first.state_dict()
    loader(processor, data / "told", group_by_length=6).load_state_dict(state)
    other = loader(processor, data / "told", group_by_length=6)
    other.stream.lengths = [length + 1 for length in other.stream.lengths]
    with pytest.raises(VideoAlignError, match="lengths of the samples"):
        other.load_state_dict(state)
    other.load_state_dict({**state, "geometry": state["geometry"][:-1]})  # of an earlier release


def test_fewer_than_none_are_refused(data, processor):
    with pytest.raises(VideoAlignError, match=r"data\.group_by_length must be at least 0"):
        loader(processor, data / "told", group_by_length=-1)


def test_a_record_that_tells_nonsense_counts_by_its_bytes(tmp_path, processor):
    shapes = {
        "0": {**SHAPE, "num_frames": "many"},
        "1": {**SHAPE, "num_frames": 4, "fps": 0},
        "2": {**SHAPE, "num_frames": 1e999},
        "3": {**SHAPE},
    }
    with ShardWriter(tmp_path / "set", "videos") as writer:
        for key, shape in shapes.items():
            writer.write(key, {"": plain_clip(40, 4, 32, 32)}, {"prompt": "x", **shape})
    shards = ShardSet(tmp_path / "set")
    contents = list(shards.contents())
    assert lengths_of(shards, contents, processor) == [content.spans["mp4"].size for content in contents]
