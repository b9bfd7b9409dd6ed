"""What a benchmark reads: videos of a set, batches of them, and rewards joined with rated pairs."""

import io
import itertools
import json
import math
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench_kit import RATED, encode_frames, rated, samples, write
from helpers import noise_clip
from videoalign import VideoAlignError
from videoalign.callbacks import RewardBench
from videoalign.datamodules.benchmark import Benchmark
from videoalign.datamodules.contents import ShardError
from videoalign.datamodules.shards import ShardSet
from videoalign.datamodules.stream import in_turn
from videoalign.datamodules.video import decode
from videoalign.datamodules.video_list import Listed, VideoList, by_length, videos_of
from videoalign.models.processor import RewardProcessor

# --- videos of a set ------------------------------------------------------------------------------


@pytest.mark.parametrize("media", ["mp4", "frames"])
def test_every_video_is_found_with_its_bytes(media, kit, processor, tmp_path):
    folder = kit / "world"
    if media == "frames":
        folder = tmp_path / "frames"
        assert encode_frames(kit, folder) == 0
    found, source = videos_of(ShardSet(folder), processor), {raw.key: raw for raw in ShardSet(kit / "world")}
    assert found.keys() == source.keys()
    assert len(found) == 8
    for key, raw in source.items():
        video = found[key]
        assert (video.name, video.prompt) == (key, raw.record()["prompt"])
        want = decode(raw.members["mp4"], processor.sampling, processor.factor)
        torch.testing.assert_close(video.frames(processor), want, rtol=0, atol=0)
        assert video.length == want.shape[0] * want.shape[2] * want.shape[3]  # pixels, as the record tells


@pytest.mark.parametrize(
    "change", [{"height": None}, {"fps": None}, {"num_frames": "many"}, {"num_frames": 1}, {"width": 32 * 201}], ids=str
)
def test_where_the_record_does_not_tell_the_length_is_the_size_in_bytes(change, processor, tmp_path):
    videos = [replace(v, record={**v.record, **change}) for v in samples((5, 9))]
    found = videos_of(ShardSet(write(tmp_path / "set", videos)), processor)
    assert [found[v.key].length for v in videos] == [len(v.content) for v in videos]


def test_a_table_that_contradicts_itself_is_refused(tmp_path):
    """Nobody else would look at a table that was edited by hand."""
    folder = write(tmp_path / "set", samples((5, 9)), rated(2))
    table = (folder / "pairs.csv").read_text().splitlines()
    first = dict(zip(table[0].split(","), table[1].split(",")))
    swapped = {**first, "key_A": first["key_B"], "key_B": first["key_A"]}
    alone = {**first, "key_B": first["key_A"]}
    for row, words in (
        (swapped, "line 3: rates the pair of line 2 again"),
        (alone, "compares the video .* with itself"),
    ):
        (folder / "pairs.csv").write_text("\n".join([*table[:2], ",".join(row.values())]) + "\n")
        with pytest.raises(VideoAlignError, match=words):
            Benchmark(folder)
    (folder / "pairs.csv").write_text("\n".join([table[0].replace("VQ", "vq"), table[1]]) + "\n")
    with pytest.raises(VideoAlignError, match="the column vq would not be read, VQ would"):
        Benchmark(folder)


def rewrite(folder: Path, change: Callable[[list[tuple[str, bytes]]], list[tuple[str, bytes]]]) -> None:
    """Change the members of the first shard, and let the index agree about its size."""
    path = folder / "000000.tar"
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(path, "w") as tar:
        for name, content in change(members):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["bytes"] = path.stat().st_size
    (folder / "index.json").write_text(json.dumps(index))


def without_contents(folder: Path) -> None:
    """Make the set one of an earlier release, whose shards have to be walked through."""
    index = json.loads((folder / "index.json").read_text())
    for shard in index["shards"]:
        shard.pop("contents")
    (folder / "index.json").write_text(json.dumps(index))


def overwrite_header(key: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "000000.tar"
        with tarfile.open(path) as tar:
            place = min(member.offset for member in tar if member.name.startswith(key))
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(b"x" * 512)

    return change


NOT_THE_INDEX = r"000000\.tar.*(index says|has members|occurs twice|do not stand together).*shards verify"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (overwrite_header("000000"), r"000000\.tar cannot be read"),
        (overwrite_header("000002"), NOT_THE_INDEX),
        (lambda f: rewrite(f, lambda m: m[:-2]), NOT_THE_INDEX),
        (lambda f: rewrite(f, lambda m: [x for x in m if x[0] != "000001.json"]), NOT_THE_INDEX),
        (lambda f: rewrite(f, lambda m: [x for x in m if x[0] != "000001.mp4"]), NOT_THE_INDEX),
        (lambda f: rewrite(f, lambda m: [(n.replace("000001.j", "000009.j"), c) for n, c in m]), NOT_THE_INDEX),
        (lambda f: rewrite(f, lambda m: [(n.replace("000001.", "000000."), c) for n, c in m]), NOT_THE_INDEX),
        (lambda f: rewrite(f, lambda m: [(n.replace("000001.", "000005."), c) for n, c in m]), "'000005' occurs twice"),
        (lambda f: rewrite(f, lambda m: [(n, b"{" if n == "000001.json" else c) for n, c in m]), "'000001'.*not valid"),
        (
            lambda f: rewrite(f, lambda m: [(n, b"{}" if n == "000001.json" else c) for n, c in m]),
            "'000001'.*no prompt",
        ),
    ],
    ids=[
        "first header",
        "later header",
        "sample lost",
        "record lost",
        "video lost",
        "record of another key",
        "key twice",
        "key in two shards",
        "record no JSON",
        "no prompt",
    ],
)
def test_damaged_shards_are_refused(damage, words, kit, processor, tmp_path):
    folder = tmp_path / "world"
    shutil.copytree(kit / "world", folder)
    damage(folder)
    without_contents(folder)
    with pytest.raises(ShardError, match=words):
        videos_of(ShardSet(folder), processor)


def test_a_flipped_bit_of_a_video_is_noticed(kit, processor, tmp_path):
    folder = tmp_path / "world"
    shutil.copytree(kit / "world", folder)
    span = ShardSet(folder).contents()[1].spans["mp4"]
    with open(folder / "000000.tar", "r+b") as file:
        file.seek(span.start + span.size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 16]))
    found = videos_of(ShardSet(folder), processor)
    for number, video in enumerate(found.values()):
        if number == 1:
            with pytest.raises(ShardError, match=r"000000\.tar, key '000001', mp4: its bytes are not those"):
                video.frames(processor)
        else:
            video.frames(processor)


# --- batches of videos ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 4, 12, 50])
def test_batches_hold_every_number_once(size):
    lengths = np.random.default_rng(size).integers(1, 5, 12)
    videos = [Listed(f"v{i:02d}", "p", "x", length=float(n)) for i, n in enumerate(lengths)]
    for batches in (in_turn(12, size), by_length(videos, size)):
        assert sorted(number for batch in batches for number in batch) == list(range(12))
        assert [len(batch) for batch in batches] == [size] * (12 // size) + [12 % size] * (12 % size > 0)
    assert list(itertools.chain(*in_turn(12, size))) == list(range(12))
    order = [number for batch in by_length(videos, size) for number in batch]
    assert [lengths[number] for number in order] == sorted(lengths, reverse=True)


def test_batches_by_length_do_not_depend_on_the_order_of_the_list():
    videos = [Listed(f"v{i}", "p", "x", length=float(i // 3)) for i in range(10)]
    want = [[videos[number].name for number in batch] for batch in by_length(videos, 3)]
    for seed in range(5):
        moved = [videos[i] for i in np.random.default_rng(seed).permutation(10)]
        assert [[moved[number].name for number in batch] for batch in by_length(moved, 3)] == want
    assert by_length([], 3) == []


def loaded(data: VideoList, processor: RewardProcessor, rank: int = 0, world: int = 1) -> list[dict]:
    """The batches that one rank loads."""
    data.trainer = SimpleNamespace(
        global_rank=rank,
        world_size=world,
        lightning_module=SimpleNamespace(processor=processor),
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    return list(data.predict_dataloader())


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_the_videos_whatever_is_done(world, kit, processor):
    found = list(videos_of(ShardSet(kit / "world"), processor).values())
    batches = by_length(found, 3)
    whole = [[b["numbers"] for b in loaded(VideoList(found, batches, 0), processor, r, world)] for r in range(world)]
    assert sorted(number for share in whole for batch in share for number in batch) == list(range(8))
    for done in ({batches[0][0]}, set(batches[0]), {0, 3, 5, 7}, set(range(8))):
        for rank, share in enumerate(whole):
            left = [b["numbers"] for b in loaded(VideoList(found, batches, 0, done), processor, rank, world)]
            assert [batch for batch in left if batch] == [
                rest for batch in share if (rest := [n for n in batch if n not in done])
            ]


def test_unreadable_videos_and_prompts_are_left_out_by_name(kit, processor, tmp_path):
    (tmp_path / "cut.mp4").write_bytes(noise_clip(0, 5)[:200])
    (tmp_path / "good.mp4").write_bytes(noise_clip(0, 5))
    good, cut = str(tmp_path / "good.mp4"), str(tmp_path / "cut.mp4")
    videos = [
        Listed("cut", "p", cut),
        Listed("good", "p", good),
        Listed("long", "red " * 5000, good),
        Listed("gone", "p", cut),
    ]
    mixed, lost = loaded(VideoList(videos, [[0, 1, 2], [3]], 0), processor)
    assert mixed["numbers"] == [1]
    assert len(mixed["inputs"]["video_grid_thw"]) == 1
    assert [number for number, _ in mixed["dropped"]] == [0, 2]
    assert "cut" in mixed["dropped"][0][1]
    assert "prompt 'red red" in mixed["dropped"][1][1]
    assert "inputs" not in lost
    assert lost["dropped"][0][0] == 3


# --- joining rewards ------------------------------------------------------------------------------


def table(kit: Path) -> tuple[Benchmark, torch.Tensor]:
    found = Benchmark(kit / "world")
    return found, torch.arange(RATED * 3.0).reshape(RATED, 3) ** 2


def test_margins_are_reward_a_minus_reward_b(kit):
    found, rewards = table(kit)
    margins, whole = found.margins(rewards)
    by_key = dict(zip(found.keys, rewards))
    want = [by_key[row["key_A"]] - by_key[row["key_B"]] for row in found.rows]
    torch.testing.assert_close(margins, torch.stack(want), rtol=0, atol=0)
    assert whole.all()
    assert len(margins) == RATED * (RATED - 1) // 2


def test_pairs_of_videos_without_rewards_are_marked(kit):
    found, rewards = table(kit)
    rewards[2] = math.nan
    _, whole = found.margins(rewards)
    assert whole.tolist() == [found.keys[2] not in (row["key_A"], row["key_B"]) for row in found.rows]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_rewards_that_are_not_finite_have_no_margins(value, kit):
    found, rewards = table(kit)
    rewards[3, 1] = value
    with pytest.raises(VideoAlignError, match=rf"mine: the rewards of 1 videos are not finite.*{found.keys[3]}"):
        found.margins(rewards, "mine")


def test_rewards_of_all_ranks_stay_what_they_are():
    """Infinity stays infinity, so that margins refuse it; NaN becomes it, because NaN marks what was not scored."""
    bench, rewards = RewardBench(), torch.tensor([[math.inf, 1.0, 0.0], [0.0, -math.inf, math.nan]])
    bench._seen = {"mine": [(torch.tensor([0, 2]), rewards)]}
    alone = SimpleNamespace(device=torch.device("cpu"), all_gather=lambda tensor: tensor[None])
    found = bench._gather("mine", 3, alone)
    assert found[[0, 2]].tolist() == [[math.inf, 1.0, 0.0], [0.0, -math.inf, math.inf]]
    assert found[1].isnan().all()
