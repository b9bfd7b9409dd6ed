"""Sets on disk: written whole or not at all, and read back exactly."""

import hashlib
import json
import shutil
import tarfile
from pathlib import Path

import pytest

from helpers import files
from shard_kit import GLANCE, SAMPLES, clip, edit_index, record, write_pairs, write_videos
from videoalign import VideoAlignError
from videoalign.cli import main
from videoalign.datamodules.benchmark import PAIRS, Benchmark
from videoalign.datamodules.contents import ShardError
from videoalign.datamodules.info import info
from videoalign.datamodules.shards import ShardSet, ShardWriter
from videoalign.datamodules.verify import open_damaged, verify

# --- writing and reading --------------------------------------------------------------------------


def test_round_trip(sets: Path) -> None:
    shards = ShardSet(sets / "pairs", "pairs")
    assert [(s.name, s.samples) for s in shards.index.shards] == [
        ("000000.tar", 3),
        ("000001.tar", 3),
        ("000002.tar", 1),
    ]
    assert shards.index.samples == SAMPLES
    for shard in shards.index.shards:
        content = (sets / "pairs" / shard.name).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    samples = list(shards)
    assert [sample.key for sample in samples] == [f"{i:06d}" for i in range(SAMPLES)]
    for i, sample in enumerate(samples):
        assert sample.record() == record(i)
        assert sample.members["a.mp4"] == clip(i) and sample.members["b.mp4"] == clip(i + 8)
        assert sample.shard == f"{i // 3:06d}.tar"


def test_members_are_a_plain_tar(sets: Path) -> None:
    with tarfile.open(sets / "pairs" / "000000.tar") as tar:
        assert sorted(tar.getnames())[:3] == ["000000.a.mp4", "000000.b.mp4", "000000.json"]
        assert {member.mtime for member in tar} == {0}


def test_index_is_plain_json(sets: Path) -> None:
    index = json.loads((sets / "pairs" / "index.json").read_text())
    assert (index["format"], index["version"], index["kind"]) == ("videoalign-shards", 2, "pairs")
    assert index["dimensions"] == ["VQ", "MQ", "TA"] and index["media"] == "mp4"


def test_contents_say_where_samples_stand(sets: Path) -> None:
    shards = ShardSet(sets / "pairs")
    contents = shards.contents()
    assert len(contents) == len(shards) == SAMPLES
    assert contents.keys() == [f"{i:06d}" for i in range(SAMPLES)]
    with tarfile.open(sets / "pairs" / "000001.tar") as tar:
        for i in (3, 4, 5):
            for extension in ("a.mp4", "b.mp4", "json"):
                member = tar.getmember(f"{i:06d}.{extension}")
                span = contents[i].spans[extension]
                assert (span.start, span.size) == (member.offset_data, member.size)
                assert contents[i].read(extension) == tar.extractfile(member).read()
    assert [c.record["prompt"] for c in contents.take([5, 0])] == ["clip number 5", "clip number 0"]
    with pytest.raises(IndexError):
        contents[SAMPLES]


def test_opening_reads_no_shard(sets: Path, tmp_path: Path) -> None:
    """The tables of contents beside the shards make it unnecessary to walk through them."""
    folder = tmp_path / "set"
    shutil.copytree(sets / "pairs", folder)
    for path in folder.glob("*.tar"):
        path.write_bytes(b"\0" * path.stat().st_size)
    assert [c.record["prompt"] for c in ShardSet(folder).contents()] == [f"clip number {i}" for i in range(SAMPLES)]
    assert "7 prompts" in info(str(folder))


def test_sets_of_version_1_are_read_and_brought_up_to_date(sets: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(sets / "pairs", folder)
    whole = [(raw.key, raw.members) for raw in ShardSet(folder)]
    tables = {path.name: path.read_bytes() for path in folder.glob("*.parquet")}
    edit_index(lambda i: (i.update(version=1), [shard.pop("contents") for shard in i["shards"]]))(folder)
    for path in folder.glob("*.parquet"):
        path.unlink()
    assert [(raw.key, raw.members) for raw in ShardSet(folder)] == whole
    assert list(verify(open_damaged(str(folder)))) == []
    main(["shards", "index", str(folder)])
    assert {path.name: path.read_bytes() for path in folder.glob("*.parquet")} == tables
    assert (folder / "index.json").read_bytes() == (sets / "pairs" / "index.json").read_bytes()


def test_videos_and_table(sets: Path) -> None:
    shards = ShardSet(sets / "videos", "videos")
    assert [sample.members.keys() for sample in shards] == [{"mp4", "json"}] * 4
    assert shards.table(PAIRS)[0] == {
        "key_A": "000000",
        "key_B": "000001",
        "VQ": "A",
        "MQ": "same",
        "TA": "B",
        "Overall": "A",
    }
    benchmark = Benchmark(sets / "videos")
    assert benchmark.keys == ["000000", "000001", "000002", "000003"]
    assert benchmark.ends.tolist() == [[0, 1], [1, 2], [2, 3]]
    assert benchmark.labels.tolist() == [[1, 0, -1, 1]] * 3


def test_the_same_samples_make_the_same_bytes(tmp_path: Path, sets: Path) -> None:
    assert files(write_pairs(tmp_path / "again")) == files(sets / "pairs")
    assert files(write_videos(tmp_path / "videos")) == files(sets / "videos")


@pytest.mark.parametrize(("samples", "per_shard", "counts"), [(6, 3, [3, 3]), (1, 3, [1]), (4, 1, [1, 1, 1, 1])])
def test_shards_are_full(tmp_path: Path, samples: int, per_shard: int, counts: list[int]) -> None:
    shards = ShardSet(write_pairs(tmp_path / "set", samples, per_shard))
    assert [shard.samples for shard in shards.index.shards] == counts
    assert sorted(path.name for path in shards.path.glob("*.tar")) == [shard.name for shard in shards.index.shards]
    assert not list(verify(shards))


def test_shards_end_at_their_size(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "set", "videos", shard_bytes=len(clip(0)) + 10) as writer:
        for i in range(3):
            writer.write(f"{i}", {"": clip(i)}, record(i))
    assert [shard.samples for shard in ShardSet(tmp_path / "set").index.shards] == [1, 1, 1]


def test_decoded_frames_stand_in_for_videos(sets: Path) -> None:
    shards = ShardSet(sets / "frames")
    assert shards.index.media == "safetensors"
    assert shards.index.frames == {**GLANCE.to_dict(), "factor": 16}
    assert shards.index.members() == {"a.safetensors", "b.safetensors", "json"}
    assert not list(verify(shards))


def test_kind_is_asked_for(sets: Path) -> None:
    with pytest.raises(ShardError, match="holds pairs, but videos are needed"):
        ShardSet(sets / "pairs", "videos")
    with pytest.raises(ShardError, match=r"no pairs\.csv"):
        ShardSet(sets / "pairs").table(PAIRS)
    with pytest.raises(ShardError, match="holds pairs, but videos are needed"):
        Benchmark(sets / "pairs")


@pytest.mark.parametrize("key", ["a.b", "a/b", "/a", "..", "", " ", "ä", "a\n", "a\\b", "a:b"])
def test_keys_are_plain(tmp_path: Path, key: str) -> None:
    with pytest.raises(ShardError, match="key"), ShardWriter(tmp_path / "set", "videos") as writer:
        writer.write(key, {"": clip(0)}, record(0))
    assert not list(tmp_path.iterdir())


def test_a_long_key_is_kept_or_refused(tmp_path: Path) -> None:
    """The plainest tar header holds names of 100 characters."""
    key = "k" * 120
    try:
        with ShardWriter(tmp_path / "set", "videos") as writer:
            writer.write(key, {"": clip(0)}, record(0))
    except ShardError as error:
        assert "key" in str(error)
        assert not list(tmp_path.iterdir())
    else:
        assert [sample.key for sample in ShardSet(tmp_path / "set")] == [key]


def test_keys_that_look_odd_are_read_back(tmp_path: Path) -> None:
    keys = ["-", "_", "__a__", "0", "A-b_C", "json", "mp4"]
    with ShardWriter(tmp_path / "set", "videos") as writer:
        for key in keys:
            writer.write(key, {"": clip(0)}, record(0))
    assert [sample.key for sample in ShardSet(tmp_path / "set")] == keys


def test_duplicate_keys_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ShardError, match="'one' was written already"),
        ShardWriter(tmp_path / "set", "videos") as writer,
    ):
        for key in ("one", "two", "one"):
            writer.write(key, {"": clip(0)}, record(0))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("videos", [{"a": b"1"}, {"a": b"1", "b": b"2", "c": b"3"}, {"": b"1"}, {}])
def test_a_pair_has_two_videos(tmp_path: Path, videos: dict[str, bytes]) -> None:
    with pytest.raises(ShardError, match="members"), ShardWriter(tmp_path / "set", "pairs") as writer:
        writer.write("one", videos, record(0))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, VideoAlignError])
def test_nothing_stays_after_an_error(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), ShardWriter(tmp_path / "set", "pairs", per_shard=1) as writer:
        for i in range(3):
            writer.write(f"{i}", {"a": clip(0), "b": clip(1)}, record(0))
        raise error("in the middle")
    assert not list(tmp_path.iterdir())


def test_an_empty_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no sample was written"), ShardWriter(tmp_path / "set", "pairs"):
        pass
    assert not list(tmp_path.iterdir())


def test_an_existing_output_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine.txt").write_text("precious")
    with pytest.raises(VideoAlignError, match="exists already"):
        write_pairs(tmp_path / "set")
    assert files(tmp_path) == {"set/mine.txt": b"precious"}
    (tmp_path / "file").write_text("also precious")
    with pytest.raises(VideoAlignError, match="exists already"):
        write_pairs(tmp_path / "file")
    assert files(tmp_path) == {"file": b"also precious", "set/mine.txt": b"precious"}


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    assert ShardSet(write_pairs(tmp_path / "set", 1)).index.samples == 1
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


# --- info and verify on sound sets ----------------------------------------------------------------


def test_info(sets: Path, capsys: pytest.CaptureFixture) -> None:
    main(["shards", "info", str(sets / "pairs")])
    text = capsys.readouterr().out
    for part in ("7 pairs as mp4 files, 3 shards", "7 prompts", "6 to 6 frames", "mist", "clear"):
        assert part in text
    line = next(line for line in text.splitlines() if line.startswith("Overall"))
    assert line.split() == ["Overall", "0.0%", "0.0%", "0.0%", "100.0%", "0.0%"]
    text = info(str(sets / "videos"))
    for part in ("4 videos as mp4 files, 2 shards", "1 prompts", "model-0", "model-1", "3 rated pairs"):
        assert part in text
    assert "decoded frames" in info(str(sets / "frames"))


def test_verify_of_sound_sets(sets: Path, capsys: pytest.CaptureFixture) -> None:
    for name, text in (("pairs", "7 pairs in 3 shards"), ("videos", "4 videos in 2 shards"), ("frames", "7 pairs")):
        assert list(verify(open_damaged(str(sets / name)))) == []
        main(["shards", "verify", str(sets / name)])
        out = capsys.readouterr().out
        assert "is sound" in out
        assert text in out
