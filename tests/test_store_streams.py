"""Streams, the cache and writing: remote sets in data loaders, bounded local disk, and sets that appear when whole."""

import multiprocessing
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from shard_kit import clip, record
from store_kit import BUCKET, KEY_ID, SECRET, Server, bucket, flipped, objects, reset, status, truncated, upload
from videoalign import VideoAlignError, cli
from videoalign.datamodules import byte_cache
from videoalign.datamodules.contents import RawSample, ShardError
from videoalign.datamodules.copying import copy
from videoalign.datamodules.shards import ShardSet, ShardWriter
from videoalign.datamodules.stores import StoreError
from videoalign.datamodules.stream import Item, ShardLoader, ShardStream, Share
from videoalign.redaction import redacted, redacted_tree

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def as_it_is(raw: RawSample, epoch: int) -> tuple[str, int, dict[str, bytes]]:
    if "unusable" in raw.key:
        raise ShardError("it is unusable")
    return raw.key, epoch, raw.members


def listed(items: list[Item]) -> dict:
    return {"dropped": [item.value for item in items if not item.valid], "items": [item.value for item in items]}


def loader(shards: ShardSet, workers: int, rank: int = 0, world: int = 1, **options) -> ShardLoader:
    contents = shards.contents()
    stream = ShardStream(contents, as_it_is, Share(len(contents), 2, world, True), rank, 3, 4, shards.name)
    return ShardLoader(stream, listed, workers, options=options)


# --- streams ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers, start", [(0, None), (2, "fork"), pytest.param(2, "spawn", marks=pytest.mark.slow)])
def test_a_stream_from_a_bucket_is_the_local_one(
    workers: int, start: str | None, sets: Path, s3: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDEOALIGN_CACHE_GB", "0")
    address = upload(sets / "pairs", "pairs")
    s3.faults += [(r"GET .*\.tar", fault) for fault in (reset, truncated, flipped, status(503))]
    options = {"multiprocessing_context": start, "persistent_workers": True} if start else {}
    for rank in range(2 if workers == 0 else 1):
        local = loader(ShardSet(sets / "pairs"), 0, rank, 2)
        remote = loader(ShardSet(address), workers, rank, 2, **options)
        for _ in range(2):  # epochs
            assert [batch["items"] for batch in remote] == [batch["items"] for batch in local]
        assert remote.state_dict() == local.state_dict()
    assert not s3.faults


@pytest.mark.parametrize("workers", [0, 2])
def test_resumption_is_exact(workers: int, sets: Path, s3: Server) -> None:
    address = upload(sets / "pairs", "pairs")
    whole = [batch["items"] for batch in loader(ShardSet(sets / "pairs"), 0)]
    began = loader(ShardSet(address), workers)
    before = [next(iter(began))["items"]]
    resumed = loader(ShardSet(address), workers)
    resumed.load_state_dict(began.state_dict())
    assert before + [batch["items"] for batch in resumed] == whole and len(whole) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_store_that_fails_drops_no_sample(
    workers: int, sets: Path, s3: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDEOALIGN_STORE_ATTEMPTS", "2")
    remote = loader(ShardSet(upload(sets / "pairs", "pairs")), workers)
    remote.max_dropped = 0.9
    s3.faults += [(r"GET .*\.tar", status(503))] * 40
    with pytest.raises(StoreError, match=r"s3://bucket/pairs/00000\d\.tar.* 2 attempts") as failed:
        list(remote)
    assert remote.dropped == 0
    found = cli.describe(failed.value)
    assert (found.kind, found.status) == ("environment", 2)
    assert found.message.startswith("s3://bucket/pairs/") and "key '" in found.message


def test_a_batch_is_fetched_at_once(sets: Path, s3: Server) -> None:
    contents = ShardSet(upload(sets / "pairs", "pairs")).contents()
    stream = ShardStream(contents, as_it_is, Share(len(contents), 6, 1, True))
    barrier = threading.Barrier(6, timeout=20)

    def together(handler, answer):
        barrier.wait()
        return answer

    s3.faults += [(r"GET .*\.tar", together)] * 6
    (slots,) = stream.slots(0)
    assert [item.value[0] for item in stream.__getitems__(slots)] == contents.keys()[:6]


# --- the cache --------------------------------------------------------------------------------------


def kept(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*/*"))


def test_the_cache_is_bounded_and_drops_what_was_not_used(tmp_path: Path) -> None:
    cache, always = byte_cache.ByteCache(tmp_path / "c", 1000), lambda content: True
    for number in range(30):
        cache.put(f"k{number}", bytes([number]) * 90)
        assert kept(tmp_path / "c") <= 1000
        assert cache.get("k0", always) == bytes(90), "what is used stays"
        os.utime(cache._path("k0"), (time.time() + number, time.time() + number))
    assert cache.get("k29", always) == bytes([29]) * 90
    assert cache.get("k1", always) is None
    cache.put("large", bytes(1001))
    assert cache.get("large", always) is None and kept(tmp_path / "c") > 0
    assert byte_cache.ByteCache(tmp_path / "none", 0).get("k0", always) is None
    byte_cache.ByteCache(tmp_path / "none", 0).put("k0", b"x")
    assert not (tmp_path / "none").exists()


def fill(folder: Path, first: int) -> None:
    cache = byte_cache.ByteCache(folder, 20_000)
    for number in range(first, first + 60):
        cache.put(f"k{number}", b"x" * 700)


def size_of(path: Path) -> int:
    """Size of a file that another process may be removing."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def test_many_processes_share_the_bound(tmp_path: Path) -> None:
    workers = [
        multiprocessing.get_context("fork").Process(target=fill, args=(tmp_path / "c", n * 60)) for n in range(3)
    ]
    for worker in workers:
        worker.start()
    most = 0
    while any(worker.is_alive() for worker in workers):
        sizes = {path: size_of(path) for path in (tmp_path / "c").glob("*/*")}
        # a file may go, and another one come, while they are looked at: those that are still there were there together
        most = max(most, sum(sizes[path] for path in sizes.keys() & {*(tmp_path / "c").glob("*/*")}))
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert 10_000 < kept(tmp_path / "c") <= 20_000 and most <= 20_000
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o700


def test_damage_in_the_cache_is_fetched_again(sets: Path, s3: Server, tmp_path: Path) -> None:
    remote = ShardSet(upload(sets / "pairs", "pairs"))
    want = [raw.members for raw in remote]
    for path in (tmp_path / "cache").glob("*/*"):
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    s3.log.clear()
    assert [raw.members for raw in ShardSet(remote.name)] == want
    assert s3.gets(r"\.tar") == len(want) and s3.gets(r"\.parquet") == 3
    s3.log.clear()
    assert [raw.members for raw in ShardSet(remote.name)] == want
    assert s3.gets("000") == 0


def opened(address: str, queue: multiprocessing.Queue) -> None:
    queue.put([raw.key for raw in ShardSet(address)])


def test_processes_of_a_run_fetch_each_table_once(sets: Path, s3: Server) -> None:
    address, context = upload(sets / "pairs", "pairs"), multiprocessing.get_context("fork")
    s3.log.clear()
    queue = context.Queue()
    workers = [context.Process(target=opened, args=(address, queue)) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert [queue.get(timeout=60) for _ in workers] == [ShardSet(sets / "pairs").contents().keys()] * 3
    for worker in workers:
        worker.join()
    assert s3.gets(r"\.parquet") == 3


def test_a_cache_that_cannot_be_written_is_done_without(
    sets: Path, s3: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VIDEOALIGN_CACHE", str(tmp_path / "file/cache"))
    assert len(list(ShardSet(upload(sets / "pairs", "pairs")))) == 7
    assert capsys.readouterr().err.count("cannot be written") == 1
    monkeypatch.setenv("VIDEOALIGN_CACHE_GB", "much")
    with pytest.raises(VideoAlignError, match="VIDEOALIGN_CACHE_GB must be a number from 0 on, got 'much'"):
        ShardSet(f"s3://{BUCKET}/pairs").contents()


# --- writing ----------------------------------------------------------------------------------------


def write(out: str, samples: int = 5) -> None:
    with ShardWriter(out, "pairs", per_shard=2) as writer:
        for i in range(samples):
            writer.write(f"{i:06d}", {"a": clip(i), "b": clip(i + 8)}, record(i))
        writer.write_table("pairs.csv", [{"key_A": "000000", "key_B": "000001"}])


def test_a_set_is_written_to_a_bucket(s3: Server, tmp_path: Path) -> None:
    write(str(tmp_path / "local"))
    s3.faults += [("PUT .*", status(503)), ("PUT .*000001", reset)]
    write(f"s3://{BUCKET}/new/set")
    assert objects() == {f"new/set/{path.name}" for path in (tmp_path / "local").iterdir()}
    assert ShardSet(f"s3://{BUCKET}/new/set").digest == ShardSet(tmp_path / "local").digest
    assert [p for m, p, _ in s3.log if m == "PUT"][-1] == f"/{BUCKET}/new/set/index.json"
    before = len(s3.log)
    with pytest.raises(VideoAlignError, match=f"output s3://{BUCKET}/new/set holds a set already"):
        write(f"s3://{BUCKET}/new/set")
    assert {m for m, _, _ in s3.log[before:]} <= {"HEAD", "GET"}


def test_a_store_that_takes_nothing_is_noticed_before_the_work(s3: Server) -> None:
    s3.faults += [("PUT", status(403, "AccessDenied"))]
    with pytest.raises(StoreError, match=f"s3://{BUCKET}/new/writing: access was refused"):
        ShardWriter(f"s3://{BUCKET}/new", "pairs").__enter__()
    with pytest.raises(StoreError, match="HTTP 404 NoSuchBucket"):
        ShardWriter("s3://no-such-bucket/new", "pairs").__enter__()


def test_the_set_of_another_process_stays(s3: Server) -> None:
    with pytest.raises(VideoAlignError, match="holds a set already"):
        with ShardWriter(f"s3://{BUCKET}/new", "pairs") as late:
            late.write("one", {"a": clip(0), "b": clip(1)}, record(0))
            write(f"s3://{BUCKET}/new")
    assert len(list(ShardSet(f"s3://{BUCKET}/new"))) == 5


def test_nothing_is_left_of_a_set_that_fails(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError), ShardWriter(f"s3://{BUCKET}/broken", "pairs", per_shard=1) as writer:
        writer.write("one", {"a": clip(0), "b": clip(1)}, record(0))
        assert objects() == {"broken/000000.tar", "broken/000000.parquet"}
        raise RuntimeError
    assert objects() == set()
    monkeypatch.setenv("VIDEOALIGN_STORE_ATTEMPTS", "2")
    s3.faults += [("PUT .*000001.tar", status(500, "InternalError"))] * 2
    with pytest.raises(StoreError, match=rf"s3://{BUCKET}/broken/000001\.tar: 2 attempts"):
        write(f"s3://{BUCKET}/broken")
    assert objects() == set()
    bucket().put_object(Bucket=BUCKET, Key="broken/000000.tar", Body=b"of a process that was killed")
    write(f"s3://{BUCKET}/broken")
    assert len(list(ShardSet(f"s3://{BUCKET}/broken"))) == 5


def test_copies_go_anywhere_and_go_on(sets: Path, s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, there, back = str(sets / "videos"), f"s3://{BUCKET}/copy", str(tmp_path / "back")
    monkeypatch.setenv("VIDEOALIGN_STORE_ATTEMPTS", "1")
    s3.faults += [("PUT .*000001.tar", status(503))]
    with pytest.raises(StoreError):
        copy(source, there)
    assert {"copy/000000.tar", "copy/000000.parquet"} <= objects() and "copy/index.json" not in objects()
    bucket().put_object(Bucket=BUCKET, Key="copy/000000.parquet", Body=b"another run's")
    s3.log.clear()
    assert "4 videos in 5 files" in copy(source, there)
    assert not any(m == "PUT" and "000000.tar" in path for m, path, _ in s3.log), "it is there already"
    assert ShardSet(there).digest == ShardSet(source).digest
    s3.faults += [("GET .*000001.tar", status(503))]
    with pytest.raises(StoreError):
        copy(there, back)
    assert not Path(back).exists()
    s3.log.clear()
    copy(there, back)
    assert s3.gets("000000.tar") == 0
    assert {p.name: p.read_bytes() for p in Path(back).iterdir()} == {
        p.name: p.read_bytes() for p in Path(source).iterdir()
    }
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert "is a copy of" in copy(there, back) and "is a copy of" in copy(source, there)
    copy(there, f"s3://{BUCKET}/second")
    assert ShardSet(f"s3://{BUCKET}/second").digest == ShardSet(source).digest
    with pytest.raises(VideoAlignError, match="holds another set"):
        copy(str(sets / "pairs"), there)
    with pytest.raises(VideoAlignError, match="exists already"):
        copy(str(sets / "pairs"), back)


def test_a_damaged_set_is_not_copied(sets: Path, s3: Server, tmp_path: Path) -> None:
    folder = shutil.copytree(sets / "videos", tmp_path / "set")
    with open(folder / "000001.tar", "r+b") as file:
        file.write(b"x")
    with pytest.raises(ShardError, match=r"000001\.tar is not the file that was written"):
        copy(str(folder), f"s3://{BUCKET}/copy")
    assert "copy/index.json" not in objects()


# --- the command line, and what it does not show ----------------------------------------------------


def call(capfd: pytest.CaptureFixture, *words: str) -> tuple[int, str]:
    try:
        cli.main([*words])
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    said = capfd.readouterr()
    return code, said.out + said.err


def test_commands_take_addresses(sets: Path, s3: Server, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    address = f"s3://{BUCKET}/videos"
    assert call(capfd, "shards", "copy", str(sets / "videos"), address)[0] == 0
    code, said = call(capfd, "shards", "info", address)
    assert code == 0 and said.startswith(f"{address}: 4 videos as mp4 files, 2 shards")
    assert call(capfd, "shards", "verify", address) == (0, f"{address} is sound: 4 videos in 2 shards\n")
    assert call(capfd, "shards", "join", address, "--out", f"s3://{BUCKET}/joined")[0] == 0
    frames = ("--out", f"s3://{BUCKET}/frames", "--num-frames", "2", "--min-pixels", "0", "--factor", "16")
    assert call(capfd, "shards", "encode-frames", address, *frames, "--workers", "1")[0] == 0
    assert len(ShardSet(f"s3://{BUCKET}/joined")) == len(ShardSet(f"s3://{BUCKET}/frames")) == 4
    code, said = call(capfd, "shards", "index", address)
    assert code == 2 and "one local folder is needed here" in said
    code, said = call(capfd, "shards", "join", address, "--out", f"s3://{BUCKET}/joined")
    assert code == 2 and "holds a set already" in said
    code, said = call(capfd, "sprites", "--out", "s3://bucket/world", "--train", "2")
    assert code == 2 and "this is written to a local folder" in said


@pytest.mark.parametrize(
    "number, code", [(403, "SignatureDoesNotMatch"), (503, "SlowDown"), (400, "AuthorizationHeaderMalformed")]
)
def test_no_credentials_are_shown(
    number: int,
    code: str,
    sets: Path,
    s3: Server,
    web: Server,
    monkeypatch,
    capfd: pytest.CaptureFixture,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("VIDEOALIGN_STORE_ATTEMPTS", "3")
    monkeypatch.setenv("VIDEOALIGN_DEBUG", "1")
    text = f"AWSAccessKeyId={KEY_ID} and {SECRET}; https://h/x?X-Amz-Signature=abcdef0123&X-Amz-Credential={KEY_ID}"
    s3.faults += [("GET", status(number, code, text))] * 9
    web.faults += [("GET", status(number, code, text))] * 9
    private = f"http://person:pass-word@127.0.0.1:{web.port}/set?X-Amz-Signature=abcdef0123&token=tok-tok-tok"
    copies = ("copy", private, str(tmp_path / "c")), ("copy", str(sets / "pairs"), private)
    for words in (("info", f"s3://{BUCKET}/x"), ("info", private), ("verify", private), *copies):
        status_, said = call(capfd, "shards", *words)
        assert status_ == 2 and said
        for secret in (SECRET, KEY_ID, "pass-word", "person", "abcdef0123", "tok-tok"):
            assert secret not in said, said


def test_a_token_in_an_address_reaches_every_file(sets: Path, web: Server, tmp_path: Path) -> None:
    shutil.copytree(sets / "pairs", tmp_path / "web/set")
    remote = ShardSet(f"{web.url}/set?token=tok-tok-tok")
    assert len(list(remote)) == 7
    assert all(path.endswith("?token=tok-tok-tok") for _, path, _ in web.log)
    assert remote.name == f"{web.url}/set" and "tok-tok" not in repr(remote.parts[0].store)


@pytest.mark.parametrize(
    "text, want",
    [
        ("https://user:p@ss@h/x?X-Amz-Signature=abc&b=c is bad", "https://***@h/x?*** is bad"),
        ("s3:/me:pw@bucket/x", "s3:/***@bucket/x"),
        ('{"aws_secret_access_key": "abcdef"}', '{"aws_secret_access_key": "***"}'),
        ("Authorization: Bearer abcdefghijkl", "Authorization: Bearer ***"),
        ("hf_abcdefghijklmnopqrstuv", "***"),
        ("hf://datasets/o/n@main/x has no prompt? yes", "hf://datasets/o/n@main/x has no prompt? yes"),
        ("the special token: reward; tokens = 3", "the special token: reward; tokens = 3"),
    ],
)
def test_redaction(text: str, want: str) -> None:
    assert redacted(text) == want


def test_configurations_are_saved_without_credentials() -> None:
    config = {"data": {"train": "https://me:pw@h/x", "sets": ["s3://b/x?token=1"], "seed": 1, "note": "a token=1"}}
    assert redacted_tree(config) == {
        "data": {"train": "https://***@h/x", "sets": ["s3://b/x?***"], "seed": 1, "note": "a token=1"}
    }
