"""Damage of sets on disk: none passes unnoticed."""

import gzip
import hashlib
import io
import json
import lzma
import math
import re
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import files
from shard_kit import GLANCE, SAMPLES, edit_index
from videoalign import VideoAlignError
from videoalign.cli import main
from videoalign.datamodules.benchmark import PAIRS, Benchmark
from videoalign.datamodules.contents import ShardError
from videoalign.datamodules.frames import FrameReader, dump_frames, encode_frames
from videoalign.datamodules.pairs import PairDecoder, VideoDecoder
from videoalign.datamodules.shards import ShardSet
from videoalign.datamodules.stream import Dropped, Item, ShardStream, Share
from videoalign.datamodules.verify import open_damaged, verify
from videoalign.datamodules.video import encode

# --- damage ---------------------------------------------------------------------------------------

Member = tuple[tarfile.TarInfo, bytes]


def unpack(path: Path) -> list[Member]:
    with tarfile.open(path) as tar:
        return [(member, tar.extractfile(member).read()) for member in tar]


def pack(path: Path, members: list[Member]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def plain(name: str, content: bytes) -> Member:
    return tarfile.TarInfo(name), content


def linked(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> Member:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member, b""


def sign(folder: Path) -> None:
    """Write sizes and digests of the shards into the index, as if another program had written the set."""
    index = json.loads((folder / "index.json").read_text())
    for shard in index["shards"]:
        content = (folder / shard["name"]).read_bytes()
        shard.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        if shard.pop("contents", None):
            (folder / shard["name"]).with_suffix(".parquet").unlink()
    (folder / "index.json").write_text(json.dumps(index))


def edit_members(change: Callable[[list[Member]], list[Member]], shard: str = "000000.tar") -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        pack(folder / shard, change(unpack(folder / shard)))

    return damage


def replace_member(name: str, content: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def change(members: list[Member]) -> list[Member]:
        assert any(member.name == name for member, _ in members)
        return [(m, content(c) if m.name == name else c) for m, c in members]

    return edit_members(change)


def edit_record(**changes: object) -> Callable[[Path], None]:
    """Change values in the second sample's JSON; None removes one."""

    def content(old: bytes) -> bytes:
        new = {**json.loads(old), **changes}
        return json.dumps({name: value for name, value in new.items() if value is not None}).encode()

    return replace_member("000001.json", content)


def rename(members: list[Member], old: str, new: str) -> list[Member]:
    for member, _ in members:
        member.name = member.name.replace(old, new)
    return members


def cut(member: int, places: int) -> Callable[[Path], None]:
    """Cut the first shard ``places`` bytes after the start of a member's content."""

    def damage(folder: Path) -> None:
        path = folder / "000000.tar"
        with tarfile.open(path) as tar:
            end = tar.getmembers()[member].offset_data + places
        path.write_bytes(path.read_bytes()[:end])

    return damage


def end_mark(folder: Path) -> None:
    cut(8, 512)(folder)
    assert len(unpack(folder / "000000.tar")) == 9  # nothing of the samples is gone


def elsewhere(folder: Path) -> None:
    (folder / "000001.tar").rename(folder.parent / "moved.tar")
    (folder / "000001.tar").symlink_to(folder.parent / "moved.tar")


def garbage(content: bytes) -> bytes:
    return np.random.default_rng(0).bytes(len(content))


def flip(content: bytes) -> bytes:
    place = content.rindex(b"mdat") + 40
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def flip_bit(name: str) -> Callable[[Path], None]:
    """Flip one bit in the middle of a file."""

    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(bytes(content))

    return damage


@dataclass
class Damage:
    """``verify`` names it with words that match ``found``; ``signed`` mends size and digest in the index afterwards."""

    do: Callable[[Path], object]
    found: str
    signed: bool = False


def rewrite_header(change: Callable[[bytearray], None]) -> Callable[[Path], None]:
    """Change the header of the first shard's first member."""

    def damage(folder: Path) -> None:
        path = folder / "000000.tar"
        content = bytearray(path.read_bytes())
        change(content)
        content[148:156] = b" " * 8
        content[148:156] = b"%06o\0 " % sum(content[:512])
        path.write_bytes(content)

    return damage


def state_8_gib(content: bytearray) -> None:
    content[124:136] = b"77777777777\0"


def make_sparse(content: bytearray) -> None:
    """A GNU sparse file that stands for 8 GiB."""
    content[156:157] = b"S"
    content[483:495] = b"77777777777\0"


def compress(how: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """Compress the first shard; zeros behind it keep it from being too small for its samples."""
    return lambda folder: (folder / "000000.tar").write_bytes(how((folder / "000000.tar").read_bytes()) + bytes(8192))


DAMAGE = {
    "gzip": Damage(compress(gzip.compress), r"000000\.tar is compressed \(gzip\); unpack it", True),
    "xz": Damage(compress(lzma.compress), r"000000\.tar is compressed \(xz\)", True),
    "a member states 8 GiB": Damage(rewrite_header(state_8_gib), "is cut short, or states a wrong size", True),
    "a sparse member": Damage(rewrite_header(make_sparse), "is no regular file", True),
    "byte order mark in a record": Damage(
        replace_member("000001.json", lambda content: b"\xef\xbb\xbf" + content), "its .json is not valid", True
    ),
    "half a character in a prompt": Damage(edit_record(prompt="a \ud800 b"), "its prompt holds half a character", True),
    "a prompt that cannot be seen": Damage(edit_record(prompt="\u200b\u200b"), "there is no prompt", True),
    "truncated": Damage(cut(4, 100), r"000000\.tar has \d+ bytes, the index says \d+"),
    "truncated, signed": Damage(cut(4, 100), r"000000\.tar cannot be read past", True),
    "truncated between samples, signed": Damage(cut(2, 512), "holds 1 samples, the index says 3", True),
    "cut to nothing": Damage(lambda f: (f / "000000.tar").write_bytes(b""), r"000000\.tar has 0 bytes"),
    "end mark missing": Damage(end_mark, r"000000\.tar has \d+ bytes, the index says \d+"),
    "not a tar, signed": Damage(
        lambda f: (f / "000000.tar").write_bytes(garbage(b"0" * 20480)), "cannot be read", True
    ),
    "members of two samples mixed": Damage(
        edit_members(lambda m: [m[0], m[3], m[1], m[4], m[2], m[5], *m[6:]]), "do not stand together"
    ),
    "samples in another order": Damage(edit_members(lambda m: m[3:6] + m[:3] + m[6:]), "sha256"),
    "member missing": Damage(edit_members(lambda m: m[:4] + m[5:]), r"000000\.tar.* (bytes|sha256)"),
    "member missing, signed": Damage(edit_members(lambda m: m[:4] + m[5:]), r"key '000001': has members", True),
    "sample missing, signed": Damage(edit_members(lambda m: m[:3] + m[6:]), "holds 2 samples, the index says 3", True),
    "member too many": Damage(edit_members(lambda m: [*m, plain("000002.txt", b"?")]), r"000000\.tar.* (bytes|sha256)"),
    "member too many, signed": Damage(
        edit_members(lambda m: [*m, plain("000002.txt", b"?")]), r"key '000002': has members", True
    ),
    "sample too many, signed": Damage(
        edit_members(lambda m: m + [(plain(f"9.{i.name.split('.', 1)[1]}", c)) for i, c in m[:3]]),
        "holds 4 samples, the index says 3",
        True,
    ),
    "file without a key, signed": Damage(
        edit_members(lambda m: [m[0], m[1], m[2], plain("README", b"?"), *m[3:]]), "README", True
    ),
    "hidden file, signed": Damage(edit_members(lambda m: [*m, plain(".hidden", b"?")]), "hidden", True),
    "member twice, signed": Damage(edit_members(lambda m: [m[0], *m]), "duplicate|twice", True),
    "key twice": Damage(edit_members(lambda m: rename(m, "000002", "000000")), "key '000000' occurs twice"),
    "key twice in two shards, signed": Damage(
        edit_members(lambda m: rename(m, "000003", "000000"), "000001.tar"), "key '000000' occurs 2 times", True
    ),
    "symbolic link, signed": Damage(
        edit_members(lambda m: [*m[:3], linked("000001.a.mp4", "/etc/hostname"), *m[4:]]), "no regular file", True
    ),
    "hard link, signed": Damage(
        edit_members(lambda m: [*m[:3], linked("000001.a.mp4", "000000.a.mp4", tarfile.LNKTYPE), *m[4:]]),
        "no regular file",
        True,
    ),
    "folder, signed": Damage(
        edit_members(lambda m: [linked("folder", "", tarfile.DIRTYPE), *m]), "no regular file", True
    ),
    "absolute name, signed": Damage(
        edit_members(lambda m: rename(m, "000001", "/000001")), "not a plain (name|key)", True
    ),
    "name that leads out, signed": Damage(
        edit_members(lambda m: rename(m, "000001", "../000001")), "not a plain (name|key)", True
    ),
    "name in a folder, signed": Damage(edit_members(lambda m: rename(m, "000001", "x/000001")), "not a plain", True),
    "one byte of a video changed": Damage(replace_member("000001.a.mp4", flip), "sha256"),
    "video is garbage": Damage(replace_member("000001.b.mp4", garbage), r"key '000001', b\.mp4 is no readable video"),
    "video is garbage, signed": Damage(replace_member("000001.b.mp4", garbage), r"key '000001', b\.mp4", True),
    "video is empty, signed": Damage(
        replace_member("000001.a.mp4", lambda c: b""), r"key '000001', a\.mp4 is empty", True
    ),
    "video is cut, signed": Damage(
        replace_member("000001.a.mp4", lambda c: c[: len(c) // 2]), r"key '000001', a\.mp4", True
    ),
    "video of one frame, signed": Damage(
        replace_member("000001.a.mp4", lambda c: encode(np.zeros((1, 16, 16, 3), np.uint8), 8)), "1 frame", True
    ),
    "json cut": Damage(replace_member("000001.json", lambda c: c[:-1] + b" "), r"key '000001'.*json is not valid"),
    "json not UTF-8": Damage(
        replace_member("000001.json", lambda c: b"\xff" + c[1:]), r"key '000001'.*json is not valid"
    ),
    "json no object, signed": Damage(replace_member("000001.json", lambda c: b"[1, 2]"), "not an object", True),
    "unknown label": Damage(replace_member("000001.json", lambda c: c.replace(b'"A"', b'"C"', 1)), "unknown labels"),
    "label no text, signed": Damage(edit_record(labels={"VQ": ["A"]}), "unknown labels", True),
    "unknown dimension, signed": Damage(edit_record(labels={"XQ": "A"}), "labels must be", True),
    "labels no object, signed": Damage(edit_record(labels=["A", "B"]), "labels must be", True),
    "labels missing, signed": Damage(edit_record(labels=None), "labels must be", True),
    "score NaN, signed": Damage(edit_record(scores={"A": {"VQ": math.nan}}), "score nan", True),
    "score out of range, signed": Damage(edit_record(scores={"A": {"VQ": 5.5}}), r"score 5\.5", True),
    "score a text, signed": Damage(edit_record(scores={"A": {"VQ": "4"}}), "score '4'", True),
    "score true, signed": Damage(edit_record(scores={"A": {"VQ": True}}), "score True", True),
    "scores a list, signed": Damage(edit_record(scores=[[1, 2, 3], [1, 2, 3]]), "scores", True),
    "scores of a side a number, signed": Damage(edit_record(scores={"A": 3}), "scores", True),
    "sources a list, signed": Damage(edit_record(sources=["mist", "clear"]), "sources", True),
    "prompt missing, signed": Damage(edit_record(prompt=None), "key '000001': there is no prompt", True),
    "prompt blank, signed": Damage(edit_record(prompt=" "), "key '000001': there is no prompt", True),
    "prompt a number, signed": Damage(edit_record(prompt=5), "key '000001': there is no prompt", True),
    "shard missing": Damage(lambda f: (f / "000001.tar").unlink(), r"000001\.tar is missing"),
    "shard a folder": Damage(lambda f: ((f / "000001.tar").unlink(), (f / "000001.tar").mkdir()), r"000001\.tar"),
    "shard a link": Damage(elsewhere, r"000001\.tar: a shard must be a plain file"),
    "shards exchanged": Damage(
        lambda f: (
            (f / "000000.tar").rename(f / "x"),
            (f / "000001.tar").rename(f / "000000.tar"),
            (f / "x").rename(f / "000001.tar"),
        ),
        "sha256",
    ),
    "index says more samples": Damage(
        edit_index(lambda i: i["shards"][0].update(samples=4)), "holds 3 samples, the index says 4"
    ),
    "index says fewer samples": Damage(
        edit_index(lambda i: i["shards"][0].update(samples=2)), "holds 3 samples, the index says 2"
    ),
    "index says more bytes": Damage(edit_index(lambda i: i["shards"][0].update(bytes=10**6)), "the index says 1000000"),
    "index names a shard outside": Damage(
        edit_index(lambda i: i["shards"][0].update(name="../000000.tar")), "must be a plain file"
    ),
    "index lacks a shard": Damage(
        edit_index(lambda i: i["shards"].pop()), r"000002\.tar is in the folder, but not in the index"
    ),
    "index lists a shard twice": Damage(edit_index(lambda i: i["shards"].append(i["shards"][0])), "occurs 2 times"),
    "table of contents missing": Damage(lambda f: (f / "000001.parquet").unlink(), r"000001\.parquet is missing"),
    "table of contents changed": Damage(flip_bit(r"000001.parquet"), r"000001\.parquet: its sha256"),
    "table of contents of another shard": Damage(
        lambda f: shutil.copy(f / "000000.parquet", f / "000001.parquet"), r"000001\.tar: 6 samples are not as"
    ),
    "file that is not listed": Damage(lambda f: (f / "notes.txt").write_text("?"), r"notes\.txt is in the folder"),
    "shard that is not listed": Damage(
        lambda f: shutil.copy(f / "000000.tar", f / "000009.tar"), r"000009\.tar is in the folder"
    ),
}


def streamed(shards: ShardSet, decode: Callable, training: bool = False) -> list[Item]:
    """Every sample of a set, as one rank streams it."""
    contents = shards.contents()
    stream = ShardStream(contents, decode, Share(len(contents), 1, 1, training), shuffle_buffer=2 * training)
    return [stream[slot] for batch in stream.slots(0) for slot in batch]


def damaged(sets: Path, kind: str, tmp_path: Path, damage: Damage) -> Path:
    folder = tmp_path / "set"
    shutil.copytree(sets / kind, folder)
    damage.do(folder)
    if damage.signed:
        sign(folder)
    return folder


@pytest.mark.parametrize("name", DAMAGE)
def test_verify_finds(sets: Path, tmp_path: Path, name: str) -> None:
    folder = damaged(sets, "pairs", tmp_path, DAMAGE[name])
    lines = list(verify(open_damaged(str(folder))))
    assert any(re.search(DAMAGE[name].found, line) for line in lines), f"not among the damage found: {lines}"


SILENT = {"index lacks a shard"}
"""Damage that no reader of the set can tell; `verify` finds it."""


@pytest.mark.parametrize("name", [name for name in DAMAGE if name not in SILENT])
@pytest.mark.parametrize("training", [False, True])
def test_nothing_wrong_is_streamed(sets: Path, tmp_path: Path, name: str, training: bool) -> None:
    """Opening refuses the set, or every sample comes out as it was, or is dropped with a reason."""
    folder = damaged(sets, "pairs", tmp_path, DAMAGE[name])
    whole = ShardSet(sets / "pairs")
    sound = {raw.key: PairDecoder(FrameReader(whole, GLANCE, 16), None)(raw, 0) for raw in whole}
    try:
        shards = ShardSet(folder, "pairs")
        items = streamed(shards, PairDecoder(FrameReader(shards, GLANCE, 16), None), training)
    except ShardError as error:
        assert str(error)
        return
    dropped = [item.value for item in items if isinstance(item.value, Dropped)]
    pairs = [item.value for item in items if item.valid]
    assert all(drop.reason for drop in dropped)
    assert len(dropped) + len(pairs) == len(items)
    for pair in pairs:
        want = sound[pair.key]
        assert pair.prompt == want.prompt and pair.sources == want.sources
        assert torch.equal(pair.labels.nan_to_num(9), want.labels.nan_to_num(9))
        assert torch.equal(pair.scores.nan_to_num(9), want.scores.nan_to_num(9))
        assert all(torch.equal(a, b) for a, b in zip(pair.videos, want.videos))
    assert len({pair.key for pair in pairs}) == len(pairs), "a key came twice"
    assert len(pairs) == SAMPLES or dropped, "a sample is missing without a word"


@pytest.mark.parametrize(
    "name",
    [
        "truncated",
        "video is garbage",
        "json cut",
        "key twice",
        "shard missing",
        "index says more samples",
        "file that is not listed",
    ],
)
def test_verify_by_command(sets: Path, tmp_path: Path, name: str, capfd: pytest.CaptureFixture) -> None:
    folder = damaged(sets, "pairs", tmp_path, DAMAGE[name])
    before = files(folder)
    with pytest.raises(SystemExit) as stop:
        main(["shards", "verify", str(folder)])
    out, err = capfd.readouterr()
    assert stop.value.code == 1
    assert re.search(DAMAGE[name].found, out)
    assert "Traceback" not in err
    assert "is sound" not in out
    assert files(folder) == before


INDEX = {
    "missing": (lambda f: (f / "index.json").unlink(), r"no index\.json"),
    "empty": (lambda f: (f / "index.json").write_text(""), r"index\.json"),
    "no json": (lambda f: (f / "index.json").write_text('{"format": '), r"index\.json.*cannot be read"),
    "not UTF-8": (lambda f: (f / "index.json").write_bytes(b"\xff\xfe{}"), r"index\.json.*cannot be read"),
    "a list": (lambda f: (f / "index.json").write_text("[1]"), "no index of shards"),
    "a text": (lambda f: (f / "index.json").write_text('"shards"'), "no index of shards"),
    "null": (lambda f: (f / "index.json").write_text("null"), "no index of shards"),
    "another format": (edit_index(lambda i: i.update(format="webdataset")), "is of format"),
    "a later version": (edit_index(lambda i: i.update(version=3)), "is of format"),
    "no version": (edit_index(lambda i: i.pop("version")), "is of format"),
    "no shards": (edit_index(lambda i: i.pop("shards")), "no index of shards"),
    "shards a number": (edit_index(lambda i: i.update(shards=3)), "no index of shards"),
    "a shard without digest": (edit_index(lambda i: i["shards"][0].pop("sha256")), "no index of shards"),
    "unknown entry": (edit_index(lambda i: i.update(colour="red")), "no index of shards"),
    "unknown kind": (edit_index(lambda i: i.update(kind="triples")), "no index of shards|kind"),
    "unknown media": (edit_index(lambda i: i.update(media="gif")), "gif"),
    "count a text": (edit_index(lambda i: i["shards"][0].update(samples="3")), "no index of shards|samples"),
    "count negative": (edit_index(lambda i: i["shards"][0].update(samples=-3)), "no index of shards|samples"),
    "name a number": (edit_index(lambda i: i["shards"][0].update(name=3)), "no index of shards|name"),
    "no shard at all": (edit_index(lambda i: i.update(shards=[])), "no index of shards.*no shard"),
    "count beyond its bytes": (edit_index(lambda i: i["shards"][0].update(samples=10**12)), "no index of shards.*hold"),
    "count of nothing": (edit_index(lambda i: i["shards"][0].update(samples=0)), "no index of shards.*hold"),
    "bytes of nothing": (edit_index(lambda i: i["shards"][0].update(bytes=0)), "no index of shards.*hold"),
    "frames a list": (edit_index(lambda i: i.update(frames=[])), "no index of shards.*frames"),
    "latents a text": (edit_index(lambda i: i.update(latents="wan")), "no index of shards.*latents"),
    "tables a list": (edit_index(lambda i: i.update(tables=["pairs.csv"])), "no index of shards|tables"),
    "table outside": (edit_index(lambda i: i.update(tables={"../evil.csv": "0"})), r"evil\.csv"),
}


@pytest.mark.parametrize("name", INDEX)
def test_an_index_that_means_nothing_is_not_read(sets: Path, tmp_path: Path, name: str) -> None:
    do, words = INDEX[name]
    folder = damaged(sets, "pairs", tmp_path, Damage(do, words))
    try:
        shards = ShardSet(folder)
        keys = [sample.key for sample in shards]
        assert shards.index.samples == SAMPLES
    except VideoAlignError as error:
        assert re.search(words, str(error))
    else:  # what is wrong concerns tables only
        assert name.startswith("table")
        assert len(keys) == SAMPLES


@pytest.mark.parametrize("name", INDEX)
def test_verify_of_an_index_that_means_nothing(sets: Path, tmp_path: Path, name: str) -> None:
    do, words = INDEX[name]
    folder = damaged(sets, "pairs", tmp_path, Damage(do, words))
    try:
        lines = "\n".join(verify(open_damaged(str(folder))))
    except VideoAlignError as error:
        lines = str(error)
    assert re.search(words, lines)


def test_a_table_outside_is_never_copied(sets: Path, tmp_path: Path) -> None:
    """An index from elsewhere must not lead the encoder to write beside its output."""
    shutil.copytree(sets / "pairs", tmp_path / "theirs" / "deep" / "set")
    (tmp_path / "theirs" / "evil.csv").write_text("key_A,key_B\n1,2\n")
    edit_index(lambda i: i.update(tables={"../../evil.csv": "0"}))(tmp_path / "theirs" / "deep" / "set")
    out = tmp_path / "ours" / "deep" / "out"
    try:
        list(encode_frames(ShardSet(tmp_path / "theirs" / "deep" / "set"), out, GLANCE, 16))
    except VideoAlignError:
        pass
    assert all(path.is_relative_to(out) for path in (tmp_path / "ours").rglob("*") if path.is_file())


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no such folder"):
        ShardSet(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(ShardError, match="no such folder"):
        ShardSet(tmp_path / "file")


def test_damage_after_opening_is_met_when_reading(sets: Path, tmp_path: Path) -> None:
    for damage in (lambda f: (f / "000001.tar").unlink(), lambda f: (f / "000001.tar").write_bytes(b"")):
        folder = tmp_path / "set"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sets / "pairs", folder)
        shards = ShardSet(folder)
        shards.contents()
        damage(folder)
        with pytest.raises(ShardError, match=r"000001\.tar"):
            list(shards)
        items = streamed(shards, lambda raw, epoch: raw.key)
        assert [item.valid for item in items] == [True] * 3 + [False] * 3 + [True]
        assert all("000001.tar" in item.value.reason for item in items[3:6])


# --- tables of rated pairs ------------------------------------------------------------------------


def edit_table(change: Callable[[str], str], signed: bool = True) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        old = (folder / PAIRS).read_text()
        new = change(old)
        assert new != old
        (folder / PAIRS).write_text(new)
        if signed:
            digest = hashlib.sha256((folder / PAIRS).read_bytes()).hexdigest()
            edit_index(lambda index: index["tables"].update({PAIRS: digest}))(folder)

    return damage


TABLE = {
    "changed": (edit_table(lambda t: t.replace(",A", ",B", 1), signed=False), "sha256"),
    "missing": (lambda f: (f / PAIRS).unlink(), r"pairs\.csv is missing"),
    "unknown video": (edit_table(lambda t: t.replace("000003", "000777")), "line 4: video '000777' is not in the set"),
    "unknown label": (edit_table(lambda t: t.replace(",same", ",draw", 1)), "line 2: unknown label 'draw' in MQ"),
    "pair twice": (edit_table(lambda t: t + t.splitlines()[1] + "\n"), "occurs 2 times"),
    "pair twice, turned round": (edit_table(lambda t: t + "000001,000000,A,A,A,A\n"), "occurs 2 times"),
    "short row": (edit_table(lambda t: t + "000000,000002\n"), "line 5"),
    "no keys": (edit_table(lambda t: t.replace("key_A", "left")), "is not in the set|key_A"),
    "garbage": (lambda f: (f / PAIRS).write_bytes(b"\xff\xfe\x00key_A" * 20), r"pairs\.csv"),
}


@pytest.mark.parametrize("name", TABLE)
def test_verify_finds_damage_of_a_table(sets: Path, tmp_path: Path, name: str) -> None:
    do, words = TABLE[name]
    folder = damaged(sets, "videos", tmp_path, Damage(do, words))
    lines = "\n".join(verify(open_damaged(str(folder))))
    assert re.search(words, lines), lines


@pytest.mark.parametrize(
    "name", [name for name in TABLE if name not in ("changed", "pair twice", "pair twice, turned round")]
)
def test_a_damaged_table_is_no_benchmark(sets: Path, tmp_path: Path, name: str) -> None:
    """Opening refuses it; a pair of a video that is not there may also be left without any reward."""
    folder = damaged(sets, "videos", tmp_path, Damage(*TABLE[name]))
    try:
        benchmark = Benchmark(folder)
    except VideoAlignError as error:
        assert PAIRS in str(error)
        return
    assert name == "unknown video"
    decode = VideoDecoder(FrameReader(benchmark.shards, GLANCE, 16), benchmark.numbers)
    items = streamed(benchmark.shards, decode)
    assert all(item.valid for item in items)
    assert [item.value.number for item in items] == [0, 1, 2, -1]  # 000003 is in no pair any more
    assert benchmark.numbers["000777"] == 3  # and no video gives this pair a reward


# --- decoded frames -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage" * 40,
        dump_frames(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))[:-20],
        dump_frames(torch.zeros(2, 3, 16, 16)),
        dump_frames(torch.zeros(3, 16, 16, dtype=torch.uint8)),
        dump_frames(torch.zeros(2, 1, 16, 16, dtype=torch.uint8)),
    ],
    ids=["empty", "garbage", "cut", "float", "one picture", "grey"],
)
def test_damaged_frames_are_found_and_dropped(sets: Path, tmp_path: Path, content: bytes) -> None:
    change = replace_member("000001.a.safetensors", lambda old: content)
    folder = damaged(sets, "frames", tmp_path, Damage(change, "", signed=True))
    lines = list(verify(open_damaged(str(folder))))
    assert len(lines) == 1
    assert "key '000001', a.safetensors" in lines[0]
    shards = ShardSet(folder)
    decode = PairDecoder(FrameReader(shards, GLANCE, 16), None)
    items = streamed(shards, decode)
    assert [item.valid for item in items] == [True, False, True, True, True, True, True]
    assert "key '000001', a.safetensors" in items[1].value.reason
