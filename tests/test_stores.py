"""Sets in stores: the same samples as from disk, whatever happens on the way, and nothing that must not be shown."""

import shutil
from pathlib import Path

import pytest

from shard_kit import edit_index, write_pairs, write_videos
from store_kit import BUCKET, KEY_ID, SECRET, Server, bucket, flipped, reset, short, slow, status, truncated, upload
from videoalign import VideoAlignError
from videoalign.datamodules import addresses, stores
from videoalign.datamodules.benchmark import Benchmark
from videoalign.datamodules.contents import ShardError
from videoalign.datamodules.copying import copy
from videoalign.datamodules.info import info
from videoalign.datamodules.shards import ShardSet, ShardWriter
from videoalign.datamodules.stores import StoreError
from videoalign.datamodules.verify import open_damaged, verify
from videoalign.datamodules.video_sets import join

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def members(shards: ShardSet) -> list[tuple]:
    return [(raw.key, raw.shard, raw.members) for raw in shards]


# --- reading ----------------------------------------------------------------------------------------


def test_a_set_in_a_bucket_is_the_local_one(sets: Path, s3: Server) -> None:
    local = ShardSet(sets / "pairs")
    remote = ShardSet(upload(sets / "pairs", "a/pairs"))
    s3.log.clear()
    contents = remote.contents()
    assert s3.gets(r"\.tar") == 0, "opening reads no media"
    assert s3.gets(r"\.parquet") == len(local.index.shards)
    assert remote.digest == local.digest
    assert contents.keys() == local.contents().keys()
    assert [c.record for c in contents] == [c.record for c in local.contents()]
    assert members(remote) == members(local)
    assert s3.gets(r"\.tar") == len(local), "one request a sample"
    s3.log.clear()
    again = ShardSet(f"s3://{BUCKET}/a/pairs/")
    assert members(again) == members(local)
    assert [path for _, path, _ in s3.log] == [f"/{BUCKET}/a/pairs/index.json"], "the rest is in the cache"


def test_members_that_are_not_asked_for_are_not_fetched(sets: Path, s3: Server) -> None:
    remote = ShardSet(upload(sets / "pairs", "pairs"))
    content = remote.contents()[1]
    s3.log.clear()
    assert content.read("a.mp4") == ShardSet(sets / "pairs").contents()[1].read("a.mp4")
    span = content.spans["a.mp4"]
    assert s3.log == [("GET", f"/{BUCKET}/pairs/000000.tar", f"bytes={span.start}-{span.start + span.size - 1}")]


def test_what_reads_sets_reads_them_from_a_bucket(sets: Path, s3: Server, tmp_path: Path) -> None:
    address = upload(sets / "videos", "videos")
    assert Benchmark(address).rows == Benchmark(sets / "videos").rows
    assert info(address).splitlines()[1:] == info(str(sets / "videos")).splitlines()[1:]
    assert list(verify(open_damaged(address))) == []
    join([address], tmp_path / "joined")
    join([sets / "videos"], tmp_path / "local")
    assert ShardSet(tmp_path / "joined").digest == ShardSet(tmp_path / "local").digest


def test_verify_finds_damage_in_a_bucket(sets: Path, s3: Server, tmp_path: Path) -> None:
    folder = shutil.copytree(sets / "videos", tmp_path / "set")
    tar = bytearray((folder / "000000.tar").read_bytes())
    tar[600] ^= 1
    (folder / "000000.tar").write_bytes(tar)
    with open(folder / "pairs.csv", "a") as file:
        file.write("000000,nobody,A,A,A,A\n")
    (folder / "000001.parquet").unlink()
    (folder / "stray.txt").write_text("x")
    found = "\n".join(verify(open_damaged(upload(folder, "set"))))
    for part in (
        "stray.txt is in the folder",
        "000000.tar: its sha256",
        "000001.parquet is missing",
        "'nobody' is not",
    ):
        assert part in found
    locally = "\n".join(verify(open_damaged(str(folder)))).replace(str(folder), f"s3://{BUCKET}/set")
    assert found == locally


@pytest.mark.parametrize("web_or_hub", ["web", "hub"])
def test_web_servers_and_the_hub(web_or_hub: str, sets: Path, web: Server, tmp_path: Path, monkeypatch) -> None:
    if web_or_hub == "web":
        shutil.copytree(sets / "videos", tmp_path / "web/deep/set one")
        address = f"{web.url}/deep/set%20one"
    else:
        template = web.url + "/{repo_id}/resolve/{revision}/{filename}"  # as HF_ENDPOINT makes it
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        shutil.copytree(sets / "videos", tmp_path / "web/datasets/lab/clips/resolve/v1.0/train")
        address = "hf://datasets/lab/clips@v1.0/train"
    remote = ShardSet(address)
    assert members(remote) == members(ShardSet(sets / "videos"))
    assert web.gets(r"\.tar") == len(remote)
    assert Benchmark(address).rows == Benchmark(sets / "videos").rows
    assert list(verify(open_damaged(address))) == []
    with pytest.raises(VideoAlignError, match="cannot be written to"):
        ShardWriter(address, "videos").__enter__()


def test_a_server_without_ranges_is_refused(sets: Path, web: Server, tmp_path: Path) -> None:
    shutil.copytree(sets / "pairs", tmp_path / "web/set")
    answer = web.answer

    def without(handler, sent):
        del handler.headers["Range"]
        return answer(handler, sent)

    web.answer = without
    with pytest.raises(StoreError, match=r"000000\.tar: the server sends whole files"):
        ShardSet(f"{web.url}/set").contents()[0].raw()


# --- faults -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", [reset, truncated, short, flipped, slow(0.2), status(503, "SlowDown"), status(500), status(429)]
)
def test_a_fault_on_the_way_is_mended(fault, sets: Path, s3: Server) -> None:
    remote = ShardSet(upload(sets / "pairs", "pairs"))
    s3.faults += [(r"GET .*\.tar", fault), (r"GET .*\.parquet", fault)] * 2
    assert members(remote) == members(ShardSet(sets / "pairs"))
    assert not s3.faults


@pytest.mark.parametrize("fault", [reset, truncated, short, flipped, status(503)])
def test_a_fault_of_a_web_server_is_mended(fault, sets: Path, web: Server, tmp_path: Path) -> None:
    shutil.copytree(sets / "pairs", tmp_path / "web/set")
    web.faults += [(r"GET .*\.tar", fault)] * 2
    assert members(ShardSet(f"{web.url}/set")) == members(ShardSet(sets / "pairs"))
    assert not web.faults


def test_attempts_have_a_limit(sets: Path, s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = ShardSet(upload(sets / "pairs", "pairs"))
    content = remote.contents()[0]
    for most in (1, 3):
        monkeypatch.setenv("VIDEOALIGN_STORE_ATTEMPTS", str(most))
        s3.log.clear()
        s3.faults[:] = [(r"GET .*\.tar", status(503, "SlowDown"))] * 20
        with pytest.raises(StoreError, match=rf"pairs/000000\.tar: {most} attempts .* HTTP 503 SlowDown.*key '000000'"):
            content.raw()
        assert s3.gets(r"\.tar") == most


def test_a_hanging_server_is_given_up(sets: Path, s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = ShardSet(upload(sets / "pairs", "pairs"))
    content = remote.contents()[0]
    monkeypatch.setenv("VIDEOALIGN_STORE_TIMEOUT", "0.3")
    monkeypatch.setenv("VIDEOALIGN_STORE_ATTEMPTS", "2")
    s3.faults += [(r"GET .*\.tar", slow(3))] * 2
    with pytest.raises(StoreError, match="2 attempts in 1 s failed, the last one with no answer in time"):
        content.raw()


@pytest.mark.parametrize("code", ["AccessDenied", "InvalidAccessKeyId", "ExpiredToken"])
def test_what_is_refused_is_not_tried_again(code: str, sets: Path, s3: Server) -> None:
    address = upload(sets / "pairs", "pairs")
    s3.log.clear()
    s3.faults += [("GET .*index", status(403, code, f"The key {KEY_ID} with {SECRET} may not"))] * 9
    with pytest.raises(StoreError) as refused:
        ShardSet(address)
    assert s3.gets("index") == 1
    assert all(part in str(refused.value) for part in (address, f"HTTP 403 {code}", "AWS_PROFILE", "FSSPEC_S3_ANON"))
    assert SECRET not in str(refused.value) and KEY_ID not in str(refused.value)


def test_what_is_not_there(sets: Path, s3: Server) -> None:
    with pytest.raises(VideoAlignError, match=f"s3://{BUCKET}/none is not a folder of shards: it has no index.json"):
        ShardSet(f"s3://{BUCKET}/none")
    with pytest.raises(VideoAlignError, match="s3://no-such-bucket/x is not a folder of shards"):
        ShardSet("s3://no-such-bucket/x")
    address = upload(sets / "pairs", "pairs")
    remote = ShardSet(address)
    remote.contents()
    bucket().delete_object(Bucket=BUCKET, Key="pairs/000001.tar")
    with pytest.raises(StoreError, match=rf"{address}/000001\.tar: there is no such file \(HTTP 404.*key '000003'"):
        list(remote)


def test_damage_at_the_source_is_damage(sets: Path, s3: Server, tmp_path: Path) -> None:
    folder = shutil.copytree(sets / "pairs", tmp_path / "set")
    span = ShardSet(folder).contents()[1].spans["a.mp4"]
    tar = bytearray((folder / "000000.tar").read_bytes())
    tar[span.start + span.size // 2] ^= 1
    (folder / "000000.tar").write_bytes(tar)
    remote = ShardSet(upload(folder, "set"))
    contents = remote.contents()
    s3.log.clear()
    with pytest.raises(ShardError, match=r"000000\.tar, key '000001', a\.mp4: its bytes are not"):
        contents[1].raw()
    assert s3.gets(r"\.tar") == stores.SAME
    assert contents[0].raw().key == "000000"


def test_a_store_that_corrupts_everything(sets: Path, s3: Server) -> None:
    remote = ShardSet(upload(sets / "pairs", "pairs"))
    content = remote.contents()[0]

    def other(handler, answer):
        place = len(s3.log) % len(answer.body)
        answer.body = answer.body[:place] + bytes([answer.body[place] ^ 1]) + answer.body[place + 1 :]
        return answer

    s3.faults += [(r"GET .*\.tar", other)] * 30
    with pytest.raises(StoreError, match="differently"):
        content.read("a.mp4")


def test_a_table_or_an_index_that_was_changed(sets: Path, s3: Server, tmp_path: Path) -> None:
    folder = shutil.copytree(sets / "pairs", tmp_path / "set")
    (folder / "000001.parquet").write_bytes(b"no parquet")
    with pytest.raises(ShardError, match=r"s3://bucket/set: 000001\.parquet is not the table of contents"):
        ShardSet(upload(folder, "set")).contents()
    (folder / "index.json").write_text("{")
    with pytest.raises(VideoAlignError, match=r"s3://bucket/set/index\.json: a folder of shards needs it"):
        ShardSet(upload(folder, "set"))


@pytest.mark.parametrize("name", ["../../up.tar", "/etc/x.tar", "a/b.tar"])
def test_names_that_lead_elsewhere_are_refused(name: str, sets: Path, s3: Server, tmp_path: Path) -> None:
    folder = shutil.copytree(sets / "pairs", tmp_path / "set")
    edit_index(lambda index: index["shards"][0].update(name=name))(folder)
    address = upload(folder, "set")
    for use in (ShardSet, lambda address: copy(address, str(tmp_path / "copy"))):
        with pytest.raises(ShardError, match="must be a plain file"):
            use(address)
    assert any("must be a plain file" in line for line in verify(open_damaged(address)))


def test_version_1_is_copied_first(sets: Path, s3: Server, tmp_path: Path) -> None:
    folder = shutil.copytree(sets / "pairs", tmp_path / "old")

    def older(index: dict) -> None:
        index["version"] = 1
        for shard in index["shards"]:
            del shard["contents"]

    edit_index(older)(folder)
    address = upload(folder, "old")
    with pytest.raises(ShardError, match=f"format version 1.*shards copy {address} FOLDER.*shards index FOLDER"):
        ShardSet(address).contents()
    copy(address, str(tmp_path / "copy"))
    assert members(ShardSet(tmp_path / "copy")) == members(ShardSet(sets / "pairs"))


# --- addresses --------------------------------------------------------------------------------------


def test_braces_join_sets(s3: Server, tmp_path: Path, sets: Path) -> None:
    for name, first in (("x", 0), ("y", 10)):
        with ShardWriter(tmp_path / f"part-{name}", "pairs", per_shard=2) as writer:
            for number, raw in enumerate(ShardSet(sets / "pairs")):
                writer.write(f"{first + number:03d}", {s: raw.members[f"{s}.mp4"] for s in "ab"}, raw.record())
        upload(tmp_path / f"part-{name}", f"part-{name}")
    apart = [content for name in "xy" for content in ShardSet(tmp_path / f"part-{name}").contents()]
    for place in (f"{tmp_path}/part-{{x,y}}", f"s3://{BUCKET}/part-{{x..y}}"):
        both = ShardSet(place)
        assert both.contents().keys() == [content.key for content in apart]
        assert [raw.members for raw in both] == [content.raw().members for content in apart]
        assert both.contents()[9].name == "part-y/000001.tar, key '012'"
        assert list(verify(open_damaged(place))) == []
    assert ShardSet(f"s3://{BUCKET}/part-{{x..y}}").digest == ShardSet(f"{tmp_path}/part-{{x,y}}").digest
    with pytest.raises(ShardError, match="one local folder is needed"):
        _ = both.path
    with pytest.raises(ShardError, match="key '000' occurs twice; sets that are read as one must have different keys"):
        ShardSet(f"{tmp_path}/part-{{x,x}}").contents()
    with pytest.raises(VideoAlignError, match="names 2 sets"):
        copy(f"{tmp_path}/part-{{x,y}}", str(tmp_path / "copy"))


def test_joined_benchmarks_have_all_pairs(tmp_path: Path) -> None:
    write_videos(tmp_path / "a")
    with ShardWriter(tmp_path / "b", "videos") as writer:
        for raw in ShardSet(tmp_path / "a"):
            writer.write(f"b{raw.key}", {"": raw.members["mp4"]}, raw.record())
        rows = Benchmark(tmp_path / "a").rows
        writer.write_table("pairs.csv", [{**row, **{k: f"b{row[k]}" for k in ("key_A", "key_B")}} for row in rows])
    both = Benchmark(f"{tmp_path}/{{a,b}}")
    assert len(both.rows) == 2 * len(rows) and len(both.keys) == 8


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda index: index.update(kind="latents", media="safetensors"), "their kind differ: pairs, latents"),
        (lambda index: index.update(dimensions=["VQ"]), "their dimensions differ"),
        (lambda index: index.update(media="safetensors", frames={"fps": 2}), "their media differ"),
        (lambda index: index["tables"].update({"pairs.csv": "0"}), "only one has pairs.csv"),
    ],
)
def test_sets_that_differ_are_not_joined(change, why: str, sets: Path, tmp_path: Path) -> None:
    for name in "ab":
        shutil.copytree(sets / "pairs", tmp_path / name)
    edit_index(change)(tmp_path / "b")
    with pytest.raises(ShardError, match=f"/a and .*/b cannot be read as one: {why}"):
        ShardSet(f"{tmp_path}/{{a,b}}")


def test_addresses_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VideoAlignError, match="ftp://h/x: sets are read from local folders and from s3://, gs://"):
        ShardSet("ftp://h/x")
    with pytest.raises(VideoAlignError, match="a brace is not closed"):
        ShardSet("s3://b/set-{0..3")
    with pytest.raises(VideoAlignError, match="hf://datasets/OWNER/NAME/FOLDER"):
        ShardSet("hf://datasets")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(VideoAlignError, match=r"needs the package gcsfs.*pip install 'videoalign\[gs\]'"):
        ShardSet("gs://b/x")
    write_pairs(tmp_path / "{odd}", 2)
    assert len(ShardSet(f"{tmp_path}/{{odd}}")) == len(ShardSet(f"file://{tmp_path}/{{odd}}")) == 2


@pytest.mark.parametrize("begin", ["file://", "FILE://", "file://localhost"])
def test_a_local_folder_as_an_address(begin, tmp_path):
    for name in ("my set", "50%20off"):
        write_pairs(tmp_path / name, 1)
    write_pairs(tmp_path / "50 off", 2)
    for text in ("my set", "my%20set"):
        assert addresses.expanded(f"{begin}{tmp_path}/{text}") == [tmp_path / "my set"]
    assert len(ShardSet(f"{begin}{tmp_path}/50%20off")) == 1, "a folder that has this very name comes first"
    assert addresses.expanded(f"{tmp_path}/my%20set") == [tmp_path / "my%20set"], "a path is no address"


@pytest.mark.parametrize("braces", ["{0..9999999999999}", "{5..-10000}", "{0..99}{0..99}{0..99}{0..99}{0..99}{0..99}"])
def test_braces_that_name_countless_sets_are_refused_before_they_are_counted(braces):
    """The first range would not fit into memory."""
    with pytest.raises(VideoAlignError, match="the braces name more than 10000 sets"):
        ShardSet(f"set-{braces}")
    assert len(addresses.expanded("set-{0..99999900..100000}")) == 1000


@pytest.mark.parametrize("address", ["s3://", "hf://", "https://", "s3:///"])
def test_an_address_without_a_place_is_refused(address):
    with pytest.raises(VideoAlignError, match="the address names no place"):
        ShardSet(address)
