"""Sets in a store: streaming from an S3 server on loopback against local disk, and opening a million samples."""

import contextlib
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pyarrow as pa
from decoding import clips
from timing import peak_memory, row, timed

from videoalign.datamodules.contents import packed
from videoalign.datamodules.copying import copy
from videoalign.datamodules.frames import FrameReader
from videoalign.datamodules.pairs import PairDecoder
from videoalign.datamodules.set_index import Index, Shard, sha256
from videoalign.datamodules.shards import ShardSet, ShardWriter
from videoalign.datamodules.stream import ShardLoader, ShardStream, Share
from videoalign.models import FrameSampling

MILLION, PER_SHARD = 1_000_000, 512


@contextlib.contextmanager
def loopback(folder: Path) -> Iterator[str]:
    """An S3 server in a process of its own, with a bucket; its address, and an empty cache, are in the environment.

    Args:
        folder: Folder for the cache.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= {"AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "benchmark"}
    os.environ["VIDEOALIGN_CACHE"] = str(folder / "cache")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield "s3://bucket"
    finally:
        server.terminate()
        server.wait()


def stores(folder: Path) -> None:
    """Time decoded mp4 pairs from a store and from disk, with two workers.

    Args:
        folder: Folder of all benchmarks.
    """
    raws, sampling = list(clips(folder)), FrameSampling(num_frames=8, fps=None, max_pixels=224 * 224)
    with ShardWriter(folder / "streamed", "pairs", per_shard=16) as writer:
        for number in range(64):
            raw = raws[number % len(raws)]
            writer.write(f"{number:04d}", {side: raw.members[f"{side}.mp4"] for side in "ab"}, raw.record())
    with loopback(folder) as address:
        copy(str(folder / "streamed"), f"{address}/streamed")
        os.environ["VIDEOALIGN_CACHE_GB"] = "0"
        local, remote = ShardSet(folder / "streamed"), ShardSet(f"{address}/streamed")
        assert [raw.members for raw in remote] == [raw.members for raw in local]
        loaders = [_loader(shards, sampling) for shards in (remote, local)]
        slow, fast = timed(*[lambda loader=loader: _all(loader) for loader in loaders], repeats=5)
        row("64 decoded pairs, two workers: from disk against an S3 server on loopback", slow, fast, 64, "pairs/s")
        del os.environ["VIDEOALIGN_CACHE_GB"]
        kept = _loader(remote, sampling)
        _all(kept)
        slow, fast = timed(lambda: _all(kept), lambda: _all(loaders[1]), repeats=3)
        row("the same, from the cache of what came from the store", slow, fast, 64, "pairs/s")


def _loader(shards: ShardSet, sampling: FrameSampling) -> ShardLoader:
    decode = PairDecoder(FrameReader(shards, sampling, 28), 0)
    stream = ShardStream(shards.contents(), decode, Share(len(shards), 4, 1, True), shuffle_buffer=16)
    return ShardLoader(stream, _counted, 2, options={"persistent_workers": True})


def _counted(items: list) -> dict:
    return {"dropped": [], "samples": len(items)}


def _all(loader: ShardLoader) -> None:
    assert sum(batch["samples"] for batch in loader) == 64


def million(folder: Path) -> None:
    """Time the opening of a set of a million pairs, whose media are holes in files, on disk and from a store.

    Args:
        folder: Folder of all benchmarks.
    """
    place = folder / "million"
    _write_million(place)
    with loopback(folder) as address:
        client = boto3.client("s3")
        for path in [*sorted(place.glob("*.parquet")), place / "index.json"]:
            client.upload_file(str(path), "bucket", f"million/{path.name}")
        for name, source in (
            ("on disk", str(place)),
            ("from the store", f"{address}/million"),
            ("from the store, tables cached", f"{address}/million"),
        ):
            began = time.perf_counter()
            memory = peak_memory("peak_of_opening.py", source)
            print(
                f"opening {MILLION:,} pairs {name:55} {time.perf_counter() - began:.1f} s, {memory:.0f} MiB", flush=True
            )


def _write_million(place: Path) -> None:
    rng, index = random.Random(0), Index("pairs")
    words = [f"word{number}" for number in range(5000)]
    place.mkdir()
    for shard in range(-(-MILLION // PER_SHARD)):
        columns: dict[str, list] = {"key": [f"{shard * PER_SHARD + i:07d}" for i in range(PER_SHARD)], "record": []}
        place_of = 512
        for _ in range(PER_SHARD):
            labels = {name: rng.choice(["A", "B", "same"]) for name in ("VQ", "MQ", "TA", "Overall")}
            columns["record"].append(f'{{"prompt": "{" ".join(rng.choices(words, k=30))}", "labels": {labels}}}')
            for extension, size in (("a.mp4", 700_000), ("b.mp4", 700_000), ("json", len(columns["record"][-1]))):
                size += rng.randrange(10_000) if extension != "json" else 0
                for part, value in (("start", place_of), ("size", size), ("crc32c", rng.randrange(2**32))):
                    columns.setdefault(f"{extension}.{part}", []).append(value)
                place_of += -(-size // 512) * 512 + 512
        name = f"{shard:06d}"
        table = pa.table({**columns, "record": pa.array(columns["record"], pa.large_string())})
        (place / f"{name}.parquet").write_bytes(packed(table))
        with open(place / f"{name}.tar", "wb") as file:
            file.truncate(place_of + 1024)
        digest = sha256(place / f"{name}.parquet")
        index.shards.append(Shard(f"{name}.tar", PER_SHARD, place_of + 1024, digest, digest))
    index.save(place)
