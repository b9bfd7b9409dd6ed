"""Encoding clips into latents, and the contents of shards."""

import json
import math
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torchvision.transforms.functional import InterpolationMode, resize

from generator_kit import (
    CLIP,
    counting,
    encode_config,
    failing_after,
    in_the_way,
    noise_video,
    same,
    samples_of,
)
from helpers import call, tree
from videoalign import VideoAlignError
from videoalign.cli import main
from videoalign.datamodules.contents import ShardError
from videoalign.datamodules.encode_list import ClipSize
from videoalign.datamodules.parts import Parts
from videoalign.datamodules.shards import ShardSet, ShardWriter
from videoalign.datamodules.video import decode
from videoalign.models.generator import Generator
from videoalign.models.generator_folder import load_generator

# --- encoding -------------------------------------------------------------------------------------


def frames_by_hand(video: bytes) -> torch.Tensor:
    """Frames 0, 2, 4, 6 and 8 of 9 at 8 fps; 40 x 48 pixels are scaled to 32 x 38, and columns 3 to 35 are kept."""
    whole = decode(video, ClipSize(num_frames=9, height=40, width=48), 1)
    assert whole.shape == (9, 3, 40, 48)
    return resize(whole[::2], [32, 38], InterpolationMode.BICUBIC, antialias=True)[..., 3:35]


@pytest.mark.parametrize(
    ("name", "family", "of"), [("wan", "wan", "pairs"), ("ltx", "ltx", "pairs"), ("videos", "wan", "videos")]
)
def test_latents_are_those_of_the_cut_frames_and_the_prompt(name, family, of, latents, generators, clips, capsys):
    generator, encoded, source = load_generator(generators / family), samples_of(latents / name), ShardSet(clips / of)
    assert encoded.keys() == {content.key for content in source.contents()}
    for content in source.contents():
        record, tensors = encoded[content.key]
        assert record == content.record
        media = {"a": "a.mp4", "b": "b.mp4"} if of == "pairs" else {"video": "mp4"}
        assert tensors.keys() == {*media, "prompt"}
        for side, extension in media.items():
            want = generator.encode_video(frames_by_hand(content.read(extension))[None])[0]
            torch.testing.assert_close(tensors[side], want, rtol=0, atol=1e-5)
        prompt = generator.encode_prompts([record["prompt"]])[0]["prompt"]
        assert len(prompt) == len(generator.pipeline.tokenizer(record["prompt"]).input_ids)
        torch.testing.assert_close(tensors["prompt"], prompt, rtol=0, atol=1e-5)
    null = safetensors.torch.load_file(latents / name / "null.safetensors")["prompt"]
    torch.testing.assert_close(null, generator.encode_prompts([""])[0]["prompt"], rtol=0, atol=1e-6)
    made = ShardSet(latents / name, "latents").index.latents
    assert made == {**generator.identity(), "of": of, **CLIP, "precision": "float32"}
    assert call("shards", "verify", latents / name) == 0 and call("shards", "info", latents / name) == 0
    printed = capsys.readouterr().out
    assert f"{len(encoded)} latents as tensors" in printed
    assert "3 prompts; 9 to 9 frames" in printed


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_latents_are_stored_in_the_precision_asked_for(precision, latents, generators, clips, tmp_path):
    options = {"precision": precision, "batch_size": 3, "workers": 1}
    config = encode_config(tmp_path / "e.yaml", generators / "ltx", clips / "pairs", tmp_path / "out", **options)
    assert call("predict", "--config", config) == 0
    whole = samples_of(latents / "ltx")
    for key, (_, tensors) in samples_of(tmp_path / "out").items():
        for side in "ab":
            assert tensors[side].dtype == getattr(torch, precision)
            torch.testing.assert_close(tensors[side].float(), whole[key][1][side], rtol=1e-2, atol=2e-3)


def test_negative_prompt_stands_in_for_the_empty_one(generators, clips, tmp_path):
    model = {"negative": "a blue square"}
    config = encode_config(
        tmp_path / "e.yaml", generators / "ltx", clips / "videos", tmp_path / "out", model=model, batch_size=8
    )
    assert call("predict", "--config", config) == 0
    null = safetensors.torch.load_file(tmp_path / "out" / "null.safetensors")["prompt"]
    want = load_generator(generators / "ltx", parts=("text_encoder",)).encode_prompts(["a blue square"])[0]["prompt"]
    torch.testing.assert_close(null, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("per_shard", [1, 64])
def test_interrupted_encoding_goes_on_where_it_stopped(per_shard, latents, generators, clips, tmp_path, monkeypatch):
    out = tmp_path / "out"
    config = encode_config(tmp_path / "e.yaml", generators / "wan", clips / "pairs", out, per_shard=per_shard)
    with monkeypatch.context() as patch:
        failing_after(patch, Generator, "encode_video", 3)
        with pytest.raises(SystemExit, match="1"):  # a fault of the program
            main(["predict", "--config", str(config)])
    assert not out.exists()
    calls = counting(monkeypatch, Generator, "encode_video")
    assert call("predict", "--config", config) == 0
    assert len(calls) == 1
    assert same(samples_of(out), samples_of(latents / "wan"))
    assert call("shards", "verify", out) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e.yaml", "out"]


def test_a_set_that_is_written_but_not_finished_is_only_finished(latents, generators, clips, tmp_path, monkeypatch):
    out = tmp_path / "out"
    config = encode_config(tmp_path / "e.yaml", generators / "wan", clips / "pairs", out)
    with monkeypatch.context() as patch:
        failing_after(patch, Parts, "finish", 0)
        with pytest.raises(SystemExit, match="1"):  # a fault of the program
            main(["predict", "--config", str(config)])
    monkeypatch.delattr(Generator, "encode_video")
    assert call("predict", "--config", config) == 0
    assert same(samples_of(out), samples_of(latents / "wan"))
    assert call("shards", "verify", out) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"clip": {**CLIP, "num_frames": 1}}, "latents differ"),
        ({"precision": "float16"}, "latents differ"),
        ({"data": "videos"}, "data, latents differ"),
    ],
)
def test_parts_of_another_encoding_are_refused(change, words, generators, clips, tmp_path, monkeypatch, capfd):
    begin = partial(encode_config, tmp_path / "e.yaml", generators / "ltx")
    with monkeypatch.context() as patch:
        failing_after(patch, Generator, "encode_video", 1)
        with pytest.raises(SystemExit, match="1"):  # a fault of the program
            main(["predict", "--config", str(begin(clips / "pairs", tmp_path / "out"))])
    before = tree(tmp_path / ".out.parts")
    other = begin(clips / change.pop("data", "pairs"), tmp_path / "out", **change)
    assert call("predict", "--config", other) == 2
    assert f"holds parts of another run ({words})" in capfd.readouterr().err
    assert tree(tmp_path / ".out.parts") == before
    assert not (tmp_path / "out").exists()


def test_parts_of_another_text_encoder_are_refused(generators, clips, tmp_path, monkeypatch):
    begin = partial(encode_config, tmp_path / "e.yaml", generators / "ltx", clips / "pairs", tmp_path / "out")
    with monkeypatch.context() as patch:
        failing_after(patch, Generator, "encode_video", 2)
        with pytest.raises(SystemExit, match="1"):  # a fault of the program
            main(["predict", "--config", str(begin())])
    status = call("predict", "--config", begin(model={"dtype": "bfloat16"}))
    if status == 0:
        assert len({tensors["prompt"].dtype for _, tensors in samples_of(tmp_path / "out").values()}) == 1
    assert status == 2


def test_a_shard_that_was_not_accounted_for_does_not_stay(latents, generators, clips, tmp_path, monkeypatch):
    config = encode_config(
        tmp_path / "e.yaml", generators / "wan", clips / "pairs", tmp_path / "out", per_shard=1, batch_size=2
    )
    with monkeypatch.context() as patch:
        failing_after(patch, Generator, "encode_video", 1)
        with pytest.raises(SystemExit, match="1"):  # a fault of the program
            main(["predict", "--config", str(config)])
    # A second process leaves this when it is killed after the shard got its name, before the list was written.
    shutil.copy(tmp_path / ".out.parts" / "r0000-00000.tar", tmp_path / ".out.parts" / "r0001-00000.tar")
    assert call("predict", "--config", config) == 0
    assert same(samples_of(tmp_path / "out"), samples_of(latents / "wan"))
    assert call("shards", "verify", tmp_path / "out") == 0


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """Two sound clips, one that is too short, and one that is damaged."""
    folder = tmp_path_factory.mktemp("mixed") / "videos"
    with ShardWriter(folder, "videos") as writer:
        for key, frames in (("good0", 9), ("short", 7), ("good1", 9)):
            writer.write(key, {"": noise_video(frames, frames)}, {"prompt": "a video"})
        writer.write("torn", {"": noise_video(1)[:300]}, {"prompt": "a video"})
    return folder


def test_unusable_clips_are_left_out_up_to_max_dropped(mixed, generators, tmp_path, capfd):
    begin = partial(encode_config, tmp_path / "e.yaml", generators / "ltx", mixed, tmp_path / "out", batch_size=2)
    assert call("predict", "--config", begin()) == 2
    assert "2 samples could not be used" in (message := capfd.readouterr().err)
    assert "key 'short'" in message
    assert "it has 7 frames at 8 fps, but 5 frames at 4 fps need 9" in message
    assert call("predict", "--config", begin(max_dropped=0.25)) == 2
    assert "2 samples could not be used" in capfd.readouterr().err
    assert call("predict", "--config", begin(max_dropped=0.5)) == 0
    said = capfd.readouterr().out
    assert "2 samples that could not be used; the first one: " in said and "key 'short'" in said
    assert samples_of(tmp_path / "out").keys() == {"good0", "good1"} and call("shards", "verify", tmp_path / "out") == 0


def long_prompt(folder: Path) -> Path:
    with ShardWriter(folder / "long", "videos") as writer:
        writer.write("0", {"": noise_video(0)}, {"prompt": "circle " * 300})
    return folder / "long"


ENCODE_REFUSED = {
    "number of frames": ({"clip": {**CLIP, "num_frames": 6}}, "num_frames is 6, .* such as 5"),
    "height": ({"clip": {**CLIP, "height": 40}}, "multiples of 32"),
    "precision": ({"precision": "int8"}, r"data\.precision 'int8' is unknown"),
    "batch size": ({"batch_size": 0}, r"data\.batch_size must be at least 1"),
    "workers": ({"workers": -1}, r"data\.workers"),
    "no set": ({"data": Path("none")}, "none: there is no such folder"),
    "latents": ({"data": "latents"}, "holds latents as safetensors; pairs or videos with mp4 files"),
    "output in the way": ({"out": in_the_way}, "exists already"),
    "long prompt": ({"data": long_prompt}, r"has \d+ tokens, .*truncate: true"),
    "all too short": ({"clip": {**CLIP, "num_frames": 13}, "max_dropped": 0.9}, "samples could not be used"),
    "share of dropped samples": ({"max_dropped": 10}, r"data\.max_dropped is a share in \[0, 1\), got 10"),
    "frame rate": ({"clip": {**CLIP, "fps": 0}}, r"data\.clip\.fps must be above 0, got 0"),
    "backwards": ({"clip": {**CLIP, "fps": -16}}, r"data\.clip\.fps must be above 0, got -16"),
    "no frame": ({"clip": {**CLIP, "num_frames": 0}}, r"data\.clip\.num_frames must be at least 1, got 0"),
    "no generator": ({"model": {"generator": "none/at/all"}}, "none/at/all"),
    "unknown part": ({"model": {"parts": ["unet"]}}, "unet"),
    "without text encoder": ({"model": {"parts": ["vae", "transformer"]}}, "without its text_encoder"),
}


@pytest.mark.parametrize("name", ENCODE_REFUSED)
def test_encoding_refuses(name, latents, generators, clips, tmp_path, capfd):
    (options, words), options_of = ENCODE_REFUSED[name], {"data": clips / "videos", "out": tmp_path / "out"}
    options = {**options_of, **{k: v(tmp_path) if callable(v) else v for k, v in options.items()}}
    options["data"] = latents / "ltx" if options["data"] == "latents" else options["data"]
    config = encode_config(tmp_path / "e.yaml", generators / "ltx", **options)
    before = tree(tmp_path)
    assert call("predict", "--config", config) == 2
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    assert re.search(words, err, re.DOTALL), err
    after = {name: content for name, content in tree(tmp_path).items() if not name.startswith(".out.parts")}
    assert after == before


def test_prompts_are_cut_on_demand(generators, tmp_path):
    model = {"truncate": True}
    config = encode_config(
        tmp_path / "e.yaml", generators / "ltx", long_prompt(tmp_path), tmp_path / "out", model=model
    )
    assert call("predict", "--config", config) == 0
    assert samples_of(tmp_path / "out")["0"][1]["prompt"].shape == (128, 32)


@pytest.mark.parametrize(
    ("count", "rate", "total", "fps", "want"),
    [
        (5, None, 9, None, [0, 2, 4, 6, 8]),
        (5, None, 5, 30.0, [0, 1, 2, 3, 4]),
        (1, None, 9, 8.0, [0]),
        (5, 4.0, 9, 8.0, [0, 2, 4, 6, 8]),
        (5, 8.0, 9, 8.0, [0, 1, 2, 3, 4]),
        (4, 16.0, 3, 8.0, [0, 1, 1, 2]),  # 0, 0.5, 1, 1.5 with halves to the later one, so that the steps stay even
        (3, 16.0, 61, 29.97, [0, 2, 4]),
    ],
)
def test_indices(count, rate, total, fps, want):
    assert ClipSize(num_frames=count, height=8, width=8, fps=rate).indices(total, fps) == want


def test_frames_of_a_slow_clip_are_repeated():
    video = noise_video(0)  # 9 frames at 8 fps
    whole, slow = (decode(video, ClipSize(num_frames=9, height=40, width=48, fps=fps), 1) for fps in (8.0, 16.0))
    assert torch.equal(slow, whole[[0, 1, 1, 2, 2, 3, 3, 4, 4]])


def test_clips_whose_frames_are_repeated_are_told(generators, tmp_path):
    with ShardWriter(tmp_path / "set", "pairs") as writer:
        for key, a, b in (("0", 8, 16), ("1", 16, 16)):
            record = {"prompt": "a video", "labels": {"VQ": "A"}, "fps": {"A": a, "B": b}}
            writer.write(key, {"a": noise_video(0), "b": noise_video(1)}, record)
    config = encode_config(
        tmp_path / "e.yaml", generators / "wan", tmp_path / "set", tmp_path / "out", clip={**CLIP, "fps": 16.0}
    )
    with pytest.warns(
        match=r"1 of 2 samples of .* fewer than 16 frames per second \(data\.clip\.fps\), the slowest 8:"
    ):
        assert call("predict", "--config", config) == 0


@pytest.mark.parametrize(
    ("rate", "total", "fps", "words"),
    [
        (None, 4, 8.0, "it has 4 frames, but clips of 5 are needed"),
        (8.0, 4, 8.0, "it has 4 frames at 8 fps, but 5 frames at 8 fps need 5"),
        (8.0, 9, None, "states no frame rate"),
        (8.0, 9, math.nan, "states no frame rate"),
    ],
)
def test_clips_without_enough_frames_are_refused(rate, total, fps, words):
    with pytest.raises(VideoAlignError, match=words):
        ClipSize(num_frames=5, height=8, width=8, fps=rate).indices(total, fps)


def test_a_clip_one_frame_too_short_is_told_that_it_needs_more():
    with pytest.raises(VideoAlignError, match=r"it has 16 frames at 16 fps, but 17 frames at 16 fps need 17 of them"):
        ClipSize(num_frames=17, height=8, width=8, fps=16.0).indices(16, 16.0)


@pytest.mark.parametrize("shape", [(40, 48), (48, 40), (32, 32), (16, 16), (100, 33), (31, 500)])
def test_clips_cover_the_frame_and_lose_their_edges_evenly(shape):
    clip = ClipSize(num_frames=1, height=32, width=48)
    height, width = clip.size(*shape, 1)
    assert height >= 32
    assert width >= 48
    assert height == 32 or width == 48
    assert height / width == pytest.approx(shape[0] / shape[1], rel=0.03)
    video = torch.arange(height * width, dtype=torch.int32).view(1, 1, height, width)
    top, left = (height - 32) // 2, (width - 48) // 2
    cut = clip.cut(video)
    assert cut.shape[-2:] == (32, 48) and cut[0, 0, 0, 0] == top * width + left
    assert cut[0, 0, -1, -1] == (top + 31) * width + left + 47


# --- shards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pairs", "videos"])
def test_contents_tell_where_every_member_is(kind, clips):
    shards = ShardSet(clips / kind)
    raws, contents = list(shards), list(shards.contents())
    assert [c.key for c in contents] == [raw.key for raw in raws]
    for raw, content in zip(raws, contents):
        assert content.record == raw.record()
        assert content.name == raw.name
        assert str(content.file) == raw.shard
        assert {extension: content.read(extension) for extension in content.spans} == raw.members


@pytest.mark.parametrize("damage", ["count", "member", "twice", "record", "no tar"])
def test_contents_of_a_damaged_set_are_refused(damage, clips, tmp_path):
    shutil.copytree(clips / "videos", folder := tmp_path / "videos")
    shard = folder / "000000.tar"
    content = shard.read_bytes()
    if damage == "twice":
        shutil.copy(shard, folder / "000001.tar")
    elif damage != "count":
        old, new = {
            "member": (b"v1.mp4", b"v1.mp5"),
            "record": (b'{"prompt"', b'["prompt"'),
            "no tar": (content[:600], b"\1" * 600),
        }[damage]
        if damage == "member":  # the header's checksum is a sum of bytes
            start = content.index(b"v1.mp4")
            header = bytearray(content[start : start + 512].replace(old, new))
            header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 8 * 32)
            content = content[:start] + bytes(header) + content[start + 512 :]
        else:
            content = content.replace(old, new, 1)
        shard.write_bytes(content)
    index = json.loads((folder / "index.json").read_text())
    for row in index["shards"]:
        row["bytes"] = (folder / row["name"]).stat().st_size
        row.pop("contents")  # as in sets of an earlier release, whose shards are walked through
    index["shards"][0]["samples"] -= damage == "count"
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(
        ShardError, match={"record": "json is not valid", "no tar": "cannot be read"}.get(damage, "shards verify")
    ):
        [content.record for content in ShardSet(folder).contents()]
