"""Splits of sets: no prompt and no video in two shares, files byte by byte, shares as asked, the same for any order."""

import itertools
import random
from pathlib import Path

import pytest

from helpers import call, files, plain_clip, write_latents
from shard_kit import clip, record, write_pairs
from videoalign import VideoAlignError
from videoalign.datamodules.import_csv import import_csv
from videoalign.datamodules.shards import ShardSet, ShardWriter
from videoalign.datamodules.split_sets import items_of, overlap, split
from videoalign.datamodules.splitting import Item, deal

HALF, TENTH = {"train": 0.5, "val": 0.5}, {"train": 0.9, "val": 0.1}


def drawn(seed: int, samples: int, prompts: int, videos: int) -> list[Item]:
    """Pairs of random prompts and videos."""
    rng = random.Random(seed)
    pick = range(videos)
    return [
        Item(
            f"prompt {rng.randrange(prompts)}",
            tuple(f"v{v}" for v in rng.sample(pick, 2)),
            (f"m{rng.randrange(5)}",) * 2,
        )
        for _ in range(samples)
    ]


def components(items: list[Item], by: str) -> list[set[int]]:
    """Groups that hang together, by joining any two that touch until none do."""

    def touch(a: Item, b: Item) -> bool:
        return bool(set(a.videos) & set(b.videos)) or (by == "prompt" and a.prompt == b.prompt)

    groups = [{number} for number in range(len(items))]
    while True:
        for one, other in itertools.combinations(groups, 2):
            if any(touch(items[i], items[j]) for i in one for j in other):
                groups.remove(other)
                one |= other
                break
        else:
            return groups


@pytest.mark.parametrize("by", ["prompt", "video"])
@pytest.mark.parametrize("seed", range(6))
def test_groups_are_whole_and_shares_are_met(by: str, seed: int) -> None:
    items = drawn(seed, 40, 60, 240)
    groups = components(items, by)
    asked = {"train": 0.6, "val": 0.3, "test": 0.1}
    dealt = deal(items, [], by, asked, seed)
    assert all(len({dealt[i] for i in group}) == 1 for group in groups)
    largest = max(map(len, groups))
    for name, share in asked.items():
        assert dealt.count(name) >= 1
        assert abs(dealt.count(name) - share * len(items)) <= largest
    order = random.Random(seed).sample(range(len(items)), len(items))
    assert deal([items[i] for i in order], [], by, asked, seed) == [dealt[i] for i in order]
    assert any(deal(items, [], by, asked, other) != dealt for other in range(50, 55))


def test_single_samples_are_counted_exactly() -> None:
    items = [Item(f"p{i}", (f"v{i}",), ("m",)) for i in range(1000)]
    dealt = deal(items, [], "prompt", TENTH, 3)
    assert dealt.count("val") == 100
    other = deal(items, [], "prompt", TENTH, 4)
    assert 2 < sum(a == b == "val" for a, b in zip(dealt, other)) < 30  # by chance 10 of 100 are the same


def test_a_small_share_gets_groups_of_every_size() -> None:
    """A rule that fills the largest share first would hold out the prompts with the fewest pairs only."""
    sizes = [1 + i % 20 for i in range(400)]
    items = [Item(f"p{g}", (f"v{g}-{i}",), ("m",)) for g, size in enumerate(sizes) for i in range(size)]
    dealt = deal(items, [], "prompt", TENTH, 0)
    held = {item.prompt for item, share in zip(items, dealt) if share == "val"}
    found = [sizes[int(prompt[1:])] for prompt in held]
    assert abs(sum(found) / len(found) - sum(sizes) / len(sizes)) < 1.5
    assert abs(dealt.count("val") / len(items) - 0.1) < 0.005


def test_every_share_of_a_tiny_set_has_a_group() -> None:
    items = [Item(f"p{i}", (f"v{i}",), ("m",)) for i in range(3)]
    assert deal(items, [], "prompt", TENTH, 0).count("val") == 1
    assert len(set(deal(items, [], "prompt", {"a": 0.8, "b": 0.1, "c": 0.1}, 0))) == 3
    with pytest.raises(VideoAlignError, match=r"by prompt there is 1 group .* prompts or videos .* 2 shares"):
        deal(items, [(0, 1), (1, 2)], "prompt", TENTH, 0)
    joined = [Item("p", (f"v{i}",), ("m",)) for i in range(3)]
    with pytest.raises(VideoAlignError, match="by prompt there is 1 group"):
        deal(joined, [], "prompt", TENTH, 0)
    assert deal(joined, [], "video", TENTH, 0).count("val") == 1


def test_pairs_of_models_in_different_shares_are_left_out() -> None:
    ends = [(a, b) for a in "abcdef" for b in "abcdef" if a < b] * 2 + [(a, a) for a in "abcdef"] * 3
    items = [Item("p", (f"{n}A", f"{n}B"), pair) for n, pair in enumerate(ends)]
    dealt = deal(items, [], "source", HALF, 1)
    share_of = {a: dealt[n] for n, (a, b) in enumerate(ends) if a == b}
    assert sorted(share_of.values()) == ["train"] * 3 + ["val"] * 3
    for (a, b), share in zip(ends, dealt):
        assert share == (share_of[a] if share_of[a] == share_of[b] else None)
    with pytest.raises(VideoAlignError, match=r"no pair is left for .*: 1 of 1 pairs compare models of different"):
        deal([Item("p", ("x", "y"), ("a", "b"))], [], "source", HALF, 0)
    with pytest.raises(VideoAlignError, match="1 of 2 samples do not name the models"):
        deal([Item("p", ("x", "y"), ("a", "b")), Item("p", ("z", "w"), ("a", ""))], [], "source", HALF, 0)


def test_one_file_under_two_models_stays_together() -> None:
    items = [Item("p", ("x",), ("a",)), Item("p", ("x",), ("b",)), Item("p", ("y",), ("c",)), Item("p", ("z",), ("d",))]
    for seed in range(10):
        dealt = deal(items, [], "source", HALF, seed)
        assert dealt[0] == dealt[1]


# --- sets on disk -----------------------------------------------------------------------------------------------------


def members(folder: Path) -> dict[str, dict[str, bytes]]:
    return {raw.key: raw.members for raw in ShardSet(folder)}


def whole(folder: Path, *shares: Path) -> dict[str, str]:
    """Assert that the shares hold the set's samples byte by byte and are sound; the share of each key."""
    copied = {}
    for share in shares:
        assert call("shards", "verify", share) == 0
        copied |= {key: (share.name, content) for key, content in members(share).items()}
    assert {key: content for key, (_, content) in copied.items()} == members(folder)
    assert sum(len(ShardSet(share)) for share in shares) == len(copied)
    one, *others = (ShardSet(path).index for path in (folder, *shares))
    for other in others:
        assert (other.kind, other.media, other.frames, other.latents, other.dimensions) == (
            one.kind, one.media, one.frames, one.latents, one.dimensions,
        )  # fmt: skip
    return {key: name for key, (name, _) in copied.items()}


@pytest.mark.parametrize("kind", ["pairs", "frames"])
def test_pairs_are_copied_byte_by_byte(sets: Path, tmp_path: Path, kind: str) -> None:
    assert call("shards", "split", sets / kind, "--out", tmp_path / "out", "--shares", "train=0.7,val=0.3") == 0
    names = list(whole(sets / kind, tmp_path / "out" / "train", tmp_path / "out" / "val").values())
    assert (names.count("train"), names.count("val")) == (5, 2)
    assert overlap(tmp_path / "out" / "train", tmp_path / "out" / "val")[1] is False
    assert overlap(tmp_path / "out" / "train", sets / kind)[1] is True
    split(sets / kind, tmp_path / "again", "prompt", {"train": 0.7, "val": 0.3})
    assert files(tmp_path / "again") == files(tmp_path / "out")


def test_a_video_in_pairs_of_two_prompts_joins_them(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "set", "pairs", per_shard=2) as writer:
        for i, (a, b) in enumerate([(0, 1), (1, 2), (3, 4), (5, 6), (6, 7)]):
            writer.write(f"k{i}", {"a": clip(a), "b": clip(b)}, record(i))
        writer.write("k5", {"a": clip(8), "b": clip(9)}, record(2) | {"prompt": " CLIP  number 2\n"})
    for seed in range(8):
        out = tmp_path / str(seed)
        split(tmp_path / "set", out, "prompt", HALF, seed)
        share = whole(tmp_path / "set", out / "train", out / "val")
        assert share["k0"] == share["k1"] and share["k3"] == share["k4"] and share["k2"] == share["k5"]


def test_rated_pairs_go_with_their_videos(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with ShardWriter(tmp_path / "set", "videos", per_shard=3) as writer:
        for i in range(10):
            writer.write(f"{i}", {"": clip(i)}, {"prompt": f"p {i // 2}", "source": f"m{i % 2}", "num_frames": 6})
        rows = [{"key_A": f"{i}", "key_B": f"{i + 1}", "VQ": "A", "note": 'a "b", c'} for i in (0, 2, 4, 6)]
        writer.write_table("pairs.csv", [*rows, {"key_A": "1", "key_B": "3", "VQ": "B", "note": ""}])
    command = ("shards", "split", tmp_path / "set", "--shares", "train=0.6,val=0.4")
    assert call(*command, "--out", tmp_path / "out") == 0
    text = capsys.readouterr().out
    share = whole(tmp_path / "set", tmp_path / "out" / "train", tmp_path / "out" / "val")
    assert len({share[key] for key in "0123"}) == 1  # the last row compares videos of two prompts
    shares = [ShardSet(tmp_path / "out" / name).table("pairs.csv") for name in ("train", "val")]
    assert sorted(row["key_A"] for rows in shares for row in rows) == ["0", "1", "2", "4", "6"]
    for name, found in zip(("train", "val"), shares):
        assert all(share[row[end]] == name for row in found for end in ("key_A", "key_B"))
        assert f"{name}: {len(found)} rated pairs" in text
    assert 'a "b", c' in {row["note"] for row in shares[0]}
    assert call(*command, "--by", "source", "--out", tmp_path / "two") == 0
    text = capsys.readouterr().out
    assert "4 rated pairs compare models of different shares, and were left out" in text
    assert "5 prompts occur in more than one share; no video does" in text
    share = whole(tmp_path / "set", tmp_path / "two" / "train", tmp_path / "two" / "val")
    assert len({share[key] for key in "02468"}) == len({share[key] for key in "13579"}) == 1


def test_rows_of_a_table_go_with_their_samples(tmp_path: Path) -> None:
    """The held-out scores must not lie in the training set; sets that are read as one keep the rows of both."""
    for part, first in (("one", 0), ("two", 6)):
        with ShardWriter(tmp_path / part, "videos", per_shard=3) as writer:
            for i in range(first, first + 6):
                writer.write(f"{i}", {"": clip(i)}, {"prompt": f"p {i}", "num_frames": 6})
            writer.write_table("scores.csv", [{"key": f"{i}", "VQ": f"{i / 4}"} for i in range(first, first + 6)])
    assert (
        call("shards", "split", f"{tmp_path}/{{one,two}}", "--out", tmp_path / "out", "--shares", "train=0.6,val=0.4")
        == 0
    )
    found = {}
    for name in ("train", "val"):
        assert call("shards", "verify", tmp_path / "out" / name) == 0
        share = ShardSet(tmp_path / "out" / name)
        rows = share.table("scores.csv")
        assert {row["key"] for row in rows} == {*share.contents().keys()}
        found |= {row["key"]: row["VQ"] for row in rows}
    assert found == {f"{i}": f"{i / 4}" for i in range(12)}


@pytest.mark.parametrize("of", ["pairs", "videos"])
def test_latents_keep_their_null_prompt(tmp_path: Path, of: str) -> None:
    def named(i: int) -> dict:
        paths = {"paths": {"A": f"{i}.mp4", "B": f"{i + 1}.mp4"}} if of == "pairs" else {"path": f"{i // 2}.mp4"}
        return {"prompt": f"p{i}", "labels": {"VQ": "A"}, **paths}

    write_latents(tmp_path / "set", {"family": "Wan", "vae": "x"}, (2, 1, 2, 2), named, of=of)
    if of == "pairs":  # each shares a video with the next one
        with pytest.raises(VideoAlignError, match="by prompt there is 1 group"):
            split(tmp_path / "set", tmp_path / "out", "prompt", HALF)
        return
    split(tmp_path / "set", tmp_path / "out", "prompt", HALF)
    share = whole(tmp_path / "set", tmp_path / "out" / "train", tmp_path / "out" / "val")
    assert all(share[f"k{i}"] == share[f"k{i + 1}"] for i in (0, 2, 4, 6)) and len(set(share.values())) == 2
    assert (tmp_path / "out/val/null.safetensors").read_bytes() == (tmp_path / "set/null.safetensors").read_bytes()


def test_latents_of_unknown_videos_are_split_by_prompt_alone(tmp_path: Path) -> None:
    record = {"prompt": "p"}
    write_latents(tmp_path / "set", {"family": "Wan", "vae": "x"}, (2, 1, 2, 2), lambda i: {"prompt": f"p{i % 4}"})
    split(tmp_path / "set", tmp_path / "out", "prompt", HALF)
    share = whole(tmp_path / "set", tmp_path / "out" / "train", tmp_path / "out" / "val")
    assert all(share[f"k{i}"] == share[f"k{i + 4}"] for i in range(4))
    with pytest.raises(VideoAlignError, match="8 of 8 samples do not say which videos they are of"):
        split(tmp_path / "set", tmp_path / "two", "video", HALF)
    assert record == {"prompt": "p"} and not (tmp_path / "two").exists()


def test_an_interrupted_split_leaves_nothing(sets: Path, tmp_path: Path) -> None:
    def stop(what: str, done: int, of: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        split(sets / "pairs", tmp_path / "out", "prompt", HALF, progress=stop)
    assert not [path for path in tmp_path.iterdir() if not path.name.endswith(".lock")]


def test_a_damaged_sample_is_not_copied(sets: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "set")
    content = bytearray((tmp_path / "set/000000.tar").read_bytes())
    span = ShardSet(tmp_path / "set").contents()[1].spans["a.mp4"]
    content[span.start + 5] ^= 1
    (tmp_path / "set/000000.tar").write_bytes(content)
    with pytest.raises(VideoAlignError, match="its bytes are not those that were written"):
        split(tmp_path / "set", tmp_path / "out", "prompt", HALF)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("shares", "why"),
    [
        ("train=0.9", "two shares or more"),
        ("train=0.9,val=0.2", "add up to 1"),
        ("train=1,val=0", "above 0"),
        ("train=nan,val=0.1", "above 0"),
        ("train=0.5,train=0.5", "each once"),
        ("../x=0.5,val=0.5", "names a folder"),
        ("train:0.5,val:0.5", "like train=0.9"),
    ],
)
def test_shares_that_make_no_sense_are_refused(
    sets: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    shares: str,
    why: str,
) -> None:
    assert call("shards", "split", sets / "pairs", "--out", tmp_path / "out", "--shares", shares) == 2
    assert why in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# --- imports ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve clips, of which one stands under two names, and pairs of six prompts."""
    folder = tmp_path_factory.mktemp("table")
    for number in range(12):
        (folder / f"{number}.mp4").write_bytes(plain_clip(20 * (number if number != 11 else 0), 4))
    rows = [f"{2 * i}.mp4,{2 * i + 1}.mp4,prompt {i},A,B,same" for i in range(6)]
    (folder / "ratings.csv").write_text("\n".join(["path_A,path_B,prompt,VQ,MQ,TA", *rows]))
    (folder / "videos.csv").write_text(
        "\n".join(["path,prompt,source", *(f"{i}.mp4,prompt {i // 2},m{i % 3}" for i in range(12))])
    )
    return folder


@pytest.mark.parametrize("kind", ["pairs", "videos"])
def test_holding_out_is_importing_and_splitting(table: Path, tmp_path: Path, kind: str) -> None:
    for seed in (0, 1):
        out = tmp_path / str(seed)
        report = import_csv(table / "ratings.csv", table, out / "one", kind, seed=seed, held_out=0.4)
        import_csv(table / "ratings.csv", table, out / "set", kind, seed=seed)
        text = split(out / "set", out / "two", "prompt", {"train": 0.6, "val": 0.4}, seed)
        assert files(out / "one") == files(out / "two")
        assert report.text().endswith(text)
        share = {item.prompt: name for name in ("train", "val") for item in items_of(ShardSet(out / "one" / name))}
        assert share["prompt 0"] == share["prompt 5"]  # 0.mp4 and 11.mp4 are one video
        assert len(share) == 6


def test_unrated_videos_are_held_out(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    given = ("shards", "import-videos", table / "videos.csv", "--videos", table, "--workers", 1)
    assert call(*given, "--out", tmp_path / "out", "--held-out", "0.3") == 0
    assert "val         30.0%    33.3%        4        2        3" in capsys.readouterr().out
    assert overlap(tmp_path / "out/train", tmp_path / "out/val")[1] is False
    assert call(*given, "--out", tmp_path / "all", "--held-out", "1.0") == 2


# --- overlap ----------------------------------------------------------------------------------------------------------


def test_overlap_names_what_two_sets_share(sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_pairs(tmp_path / "few", samples=2)
    assert call("shards", "overlap", tmp_path / "few", sets / "pairs") == 1
    text = capsys.readouterr().out
    assert f"2 prompts in both: 2 of 2 samples of {tmp_path / 'few'} and 2 of 7 samples of {sets / 'pairs'}" in text
    assert "  clip number 0\n  clip number 1\n4 videos in both: 2 of 2" in text
    assert call("shards", "overlap", tmp_path / "few", sets / "videos") == 1
    assert capsys.readouterr().out.startswith("0 prompts in both\n2 videos in both: 2 of 2 samples")
    assert call("shards", "overlap", sets / "frames", sets / "videos") == 0
    assert "videos are not compared" in capsys.readouterr().out
