"""What surrounds generator alignment: latents, cached reference errors, samples, pairs from rewards, win rates, averages, exports."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from itertools import combinations, permutations
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from diffusers import DiffusionPipeline, LTXPipeline, WanPipeline, WanTransformer3DModel
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision.transforms.functional import InterpolationMode, resize

from videoalign import VideoAlignError
from videoalign.alignment import CacheReference, FlowDPO
from videoalign.callbacks import EMA, SideBySide, side_by_side
from videoalign.callbacks.prompt_sampler import Sampling
from videoalign.cli import main
from videoalign.commands.lightning_cli import run as experiment
from videoalign.datamodules.encode_list import ClipSize
from videoalign.datamodules.parts import Parts
from videoalign.datamodules.prompts import read_prompts
from videoalign.datamodules.reference_errors import ReferenceDraws, ReferenceErrors
from videoalign.datamodules.shards import ShardError, ShardSet, ShardWriter
from videoalign.datamodules.video import decode, encode, resample
from videoalign.miniature.networks.pipelines import make_generator
from videoalign.models import VideoReward
from videoalign.models.flow import draw_seed
from videoalign.models.frame_sampling import FrameSampling
from videoalign.models.generator import Generator
from videoalign.models.generator_folder import load_generator
from videoalign.models.win_rates import win_rates

PROMPTS = ["a red circle moves left to right", "a blue square", "a red circle moves left to right", "a video"]
CLIP = {"num_frames": 5, "height": 32, "width": 32, "fps": 4.0}
SIZE = {"num_frames": 5, "height": 32, "width": 32, "fps": 8, "steps": 2}
FAMILIES = ["wan", "ltx"]
COLUMNS = ["VQ", "MQ", "TA", "Overall"]
ALIGNMENT, CALLBACKS = "videoalign.alignment", "videoalign.callbacks"
DATA = "videoalign.datamodules"


def call(*args) -> int:
    """A command's exit status."""
    try:
        main([str(a) for a in args])
    except SystemExit as stop:
        return stop.code or 0
    return 0


def noise_video(seed: int, frames: int = 9, height: int = 40, width: int = 48) -> bytes:
    """Blocks of random colours, which a lossy codec keeps apart."""
    blocks = np.random.default_rng(seed).integers(0, 255, (frames, height // 8, width // 8, 3), dtype=np.uint8)
    return encode(blocks.repeat(8, 1).repeat(8, 2), 8)


def save_yaml(path: Path, config: dict) -> Path:
    path.write_text(yaml.safe_dump(json.loads(json.dumps(config, default=str))))
    return path


def node(name: str, /, **init_args) -> dict:
    return {"class_path": name, "init_args": init_args}


TRAINER = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
           "enable_checkpointing": False, "num_sanity_val_steps": 0, "log_every_n_steps": 1, "callbacks": []}  # fmt: skip


def predict_config(path: Path, model: dict, data: dict, callbacks=()) -> Path:
    trainer = {**TRAINER, "default_root_dir": path.parent, "callbacks": list(callbacks)}
    return save_yaml(path, {"trainer": trainer, "model": model, "data": data, "return_predictions": False})


def encode_config(path: Path, generator: Path, data: Path, out: Path, per_shard=64, model=None, **options) -> Path:
    options = {"data": data, "out": out, "clip": CLIP, "precision": "float32", "workers": 0, **options}
    return predict_config(
        path,
        node(f"{ALIGNMENT}.EncodeLatents", **{"generator": generator, **(model or {})}),
        node(f"{DATA}.encode_list.EncodeList", **options),
        [node(f"{CALLBACKS}.WriteParts", per_shard=per_shard)],
    )


def reference_config(path: Path, generator: Path, data: Path, out: Path, model=None, **options) -> Path:
    options = {"data": data, "out": out, "draws": 2, "batch_size": 2, "workers": 0, **options}
    return predict_config(
        path,
        node(f"{ALIGNMENT}.CacheReference", generator=generator, **(model or {})),
        node(f"{DATA}.reference_errors.ReferenceDraws", **options),
    )


def flow_config(path: Path, generator: Path, latents: Path, callbacks=(), data=None, lora=True, trainer=None, **model):
    adapters = {"rank": 4, "alpha": 16, "targets": ["to_q", "to_k", "to_v", "to_out.0"]} if lora else None
    settings = {"generator": generator, "lora": adapters, "optimizer": node("torch.optim.SGD", lr=0.01), **model}
    return save_yaml(
        path,
        {
            "trainer": {
                **TRAINER,
                "default_root_dir": path.parent,
                "max_steps": 2,
                "callbacks": list(callbacks),
                **(trainer or {}),
            },
            "model": node(f"{ALIGNMENT}.FlowDPO", **settings),
            "data": node(
                f"{DATA}.latents.LatentPairs",
                **{
                    "train": latents,
                    "val": latents,
                    "batch_size": 2,
                    "workers": 0,
                    "shuffle_buffer": 0,
                    **(data or {}),
                },
            ),
        },
    )


def logger(folder: Path) -> dict:
    return node("lightning.pytorch.loggers.TensorBoardLogger", save_dir=folder, name="run", default_hp_metric=False)


def samples_of(folder: Path) -> dict[str, tuple[dict, dict[str, torch.Tensor]]]:
    """Record and tensors of a latents set, by key."""
    return {raw.key: (raw.record(), safetensors.torch.load(raw.members["safetensors"])) for raw in ShardSet(folder)}


def same(one, other) -> bool:
    """Whether two latents sets hold the same samples, in whatever order."""
    return one.keys() == other.keys() and all(
        one[k][0] == other[k][0]
        and one[k][1].keys() == other[k][1].keys()
        and all(torch.equal(t, other[k][1][n]) for n, t in one[k][1].items())
        for k in one
    )


def failing_after(monkeypatch, target, name: str, count: int) -> list:
    """Let a function fail at its call number ``count`` + 1; the list of calls."""
    calls, original = [], getattr(target, name)

    def replacement(*args, **kwargs):
        calls.append(args)
        if len(calls) > count:
            raise RuntimeError("interrupted here")
        return original(*args, **kwargs)

    monkeypatch.setattr(target, name, replacement)
    return calls


def counting(monkeypatch, target, name: str) -> list:
    """The list of a function's calls."""
    return failing_after(monkeypatch, target, name, 10**9)


def tree(folder: Path) -> dict:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.fixture(scope="module")
def generators(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generators")
    for family in FAMILIES:
        make_generator(folder / family, family, hidden=48, layers=1)
    make_generator(folder / "wan_other", "wan", hidden=48, layers=1, seed=1)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Rated pairs, and videos: four of one prompt, three of another, one of a third."""
    folder = tmp_path_factory.mktemp("clips")
    words = ("A", "B", "same", "B")
    with ShardWriter(folder / "pairs", "pairs") as writer:
        for i, prompt in enumerate(PROMPTS):
            record = {
                "prompt": prompt,
                "labels": {"VQ": words[i], "MQ": "A", "TA": "B" if i else "A"},
                "sources": {"A": "one", "B": "two"},
                "rewards": {side: {"VQ": i + 0.5, "MQ": 1.0 - (side == "B"), "TA": 0.25} for side in "AB"},
                "fps": {"A": 8, "B": 8},
                "num_frames": {"A": 9, "B": 9},
            }
            writer.write(f"pair{i}", {"a": noise_video(2 * i), "b": noise_video(2 * i + 1)}, record)
    with ShardWriter(folder / "videos", "videos", per_shard=3) as writer:
        for i, prompt in enumerate([PROMPTS[0]] * 4 + [PROMPTS[1]] * 3 + [PROMPTS[3]]):
            record = {
                "prompt": prompt,
                "source": f"model{i}",
                "seed": 100 + i,
                "guidance": 1.0,
                "fps": 8,
                "num_frames": 9,
                "height": 40,
                "width": 48,
                "rewards": {"VQ": 0.5, "MQ": 0.0, "TA": float(i)},
            }
            writer.write(f"v{i}", {"": noise_video(50 + i)}, record)
    return folder


@pytest.fixture(scope="module")
def latents(tmp_path_factory, generators, clips) -> Path:
    """Encoded sets: wan (pairs), ltx (pairs), videos (wan), one sample a batch."""
    folder = tmp_path_factory.mktemp("latents")
    for name, family, of in (("wan", "wan", "pairs"), ("ltx", "ltx", "pairs"), ("videos", "wan", "videos")):
        out = folder / name
        experiment(["predict", "--config", str(encode_config(folder / "e.yaml", generators / family, clips / of, out))])
    return folder


@pytest.fixture(scope="module")
def judge(tmp_path_factory, backbone, sampling) -> Path:
    """A reward model with statistics of its own."""
    folder = tmp_path_factory.mktemp("judge") / "model"
    torch.manual_seed(0)
    network = VideoReward(backbone, template="plain", sampling=sampling, language="full")
    network.statistics.mean, network.statistics.std = [0.1, -0.2, 0.3], [0.5, 0.25, 2.0]
    network.save_pretrained(folder)
    return folder


# --- encoding -----------------------------------------------------------------------------------------------------


def frames_by_hand(video: bytes) -> torch.Tensor:
    """Frames 0, 2, 4, 6, 8 of 9 at 8 fps, 40 x 48 scaled to 32 x 38, columns 3 to 35."""
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
        (prompt,) = generator.encode_prompts([record["prompt"]])
        assert len(prompt) == len(generator.pipeline.tokenizer(record["prompt"]).input_ids)
        torch.testing.assert_close(tensors["prompt"], prompt, rtol=0, atol=1e-5)
    null = safetensors.torch.load_file(latents / name / "null.safetensors")["prompt"]
    torch.testing.assert_close(null, generator.encode_prompts([""])[0], rtol=0, atol=1e-6)
    made = ShardSet(latents / name, "latents").index.latents
    assert made == {**generator.identity(), "of": of, **CLIP, "precision": "float32"}
    assert call("shards", "verify", latents / name) == 0 and call("shards", "info", latents / name) == 0
    printed = capsys.readouterr().out
    assert f"{len(encoded)} latents as tensors" in printed and "3 prompts; 9 to 9 frames" in printed


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
    want = load_generator(generators / "ltx", parts=("text_encoder",)).encode_prompts(["a blue square"])[0]
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
    assert len(calls) == 1 and same(samples_of(out), samples_of(latents / "wan"))
    assert call("shards", "verify", out) == 0 and sorted(p.name for p in tmp_path.iterdir()) == ["e.yaml", "out"]


def test_a_set_that_is_written_but_not_finished_is_only_finished(latents, generators, clips, tmp_path, monkeypatch):
    out = tmp_path / "out"
    config = encode_config(tmp_path / "e.yaml", generators / "wan", clips / "pairs", out)
    with monkeypatch.context() as patch:
        failing_after(patch, Parts, "finish", 0)
        with pytest.raises(SystemExit, match="1"):  # a fault of the program
            main(["predict", "--config", str(config)])
    monkeypatch.delattr(Generator, "encode_video")
    assert call("predict", "--config", config) == 0
    assert same(samples_of(out), samples_of(latents / "wan")) and call("shards", "verify", out) == 0


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
    assert tree(tmp_path / ".out.parts") == before and not (tmp_path / "out").exists()


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
    # as a second process leaves it that is killed after the shard got its name, before the list was written
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
    assert "key 'short'" in message and "it has 7 frames at 8 fps, but 5 frames at 4 fps need 9" in message
    assert call("predict", "--config", begin(max_dropped=0.25)) == 2
    assert "2 samples could not be used" in capfd.readouterr().err
    assert call("predict", "--config", begin(max_dropped=0.5)) == 0
    assert samples_of(tmp_path / "out").keys() == {"good0", "good1"} and call("shards", "verify", tmp_path / "out") == 0


def long_prompt(folder: Path) -> Path:
    with ShardWriter(folder / "long", "videos") as writer:
        writer.write("0", {"": noise_video(0)}, {"prompt": "circle " * 300})
    return folder / "long"


def in_the_way(folder: Path) -> Path:
    (folder / "out").mkdir()
    (folder / "out" / "notes.txt").write_text("precious")
    return folder / "out"


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
    "all too short": ({"clip": {**CLIP, "num_frames": 13}, "max_dropped": 1.0}, "no sample was written"),
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
    assert height >= 32 and width >= 48 and (height == 32 or width == 48)
    assert height / width == pytest.approx(shape[0] / shape[1], rel=0.03)
    video = torch.arange(height * width, dtype=torch.int32).view(1, 1, height, width)
    top, left = (height - 32) // 2, (width - 48) // 2
    cut = clip.cut(video)
    assert cut.shape[-2:] == (32, 48) and cut[0, 0, 0, 0] == top * width + left
    assert cut[0, 0, -1, -1] == (top + 31) * width + left + 47


# --- shards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pairs", "videos"])
def test_contents_tell_where_every_member_is(kind, clips):
    shards = ShardSet(clips / kind)
    raws, contents = list(shards), list(shards.contents())
    assert [c.key for c in contents] == [raw.key for raw in raws]
    for raw, content in zip(raws, contents):
        assert content.record == raw.record() and content.name == raw.name and content.path.name == raw.shard
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


# --- cached reference errors ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory, generators, latents) -> Path:
    """Errors of two draws."""
    folder = tmp_path_factory.mktemp("cache")
    experiment(
        [
            "predict",
            "--config",
            str(reference_config(folder / "r.yaml", generators / "wan", latents / "wan", folder / "errors")),
        ]
    )
    return folder / "errors"


def test_cached_errors_are_the_live_ones(cache, generators, latents):
    tensors, record = (
        safetensors.torch.load_file(cache / "reference.safetensors"),
        json.loads((cache / "reference.json").read_text()),
    )
    module, encoded = FlowDPO(generator=str(generators / "wan")), samples_of(latents / "wan")
    assert record["keys"] == list(encoded) and tensors["errors"].shape == (2, 4, 2)
    assert len(set(tensors["seeds"].flatten().tolist())) == 8  # every draw is of its own noise and time
    for k in range(2):
        for i, key in enumerate(record["keys"]):
            sides, seed = torch.stack([encoded[key][1][s] for s in "ab"])[:, None], tensors["seeds"][k, i : i + 1]
            with module.as_reference() as net:
                live, _ = module.errors(sides, seed, [encoded[key][1]["prompt"]], net)
            torch.testing.assert_close(tensors["errors"][k, i], live[:, 0], rtol=0, atol=1e-6)


def test_epochs_cycle_through_the_draws(cache):
    record = json.loads((cache / "reference.json").read_text())
    cached, tensors = (
        ReferenceErrors(cache, record["made"]["data"], {}),
        safetensors.torch.load_file(cache / "reference.safetensors"),
    )
    for epoch, draw in enumerate((0, 1, 0, 1, 0)):
        for i, key in enumerate(record["keys"]):
            seed, errors = cached(key, epoch)
            assert seed == tensors["seeds"][draw, i] and torch.equal(errors, tensors["errors"][draw, i])


def test_training_with_the_cache_is_training_without(cache, generators, latents, tmp_path, monkeypatch):
    """Three epochs of two steps: the losses of every step, and the reference's errors, at the same draws."""
    losses = {}
    before_step = FlowDPO.on_before_optimizer_step

    def recording(self, optimizer):
        before_step(self, optimizer)
        logged = self.trainer.callback_metrics
        names = ("loss", "error/chosen/reference", "error/rejected/reference")
        losses.setdefault(which, []).append([logged[f"train/{name}"].item() for name in names])

    monkeypatch.setattr(FlowDPO, "on_before_optimizer_step", recording)
    config = flow_config(
        tmp_path / "f.yaml",
        generators / "wan",
        latents / "wan",
        data={"reference": cache, "val": None},
        trainer={"max_steps": 6, "limit_val_batches": 0},
        beta=node(f"{ALIGNMENT}.ConstantBeta", beta=10.0),
    )
    calls = counting(monkeypatch, FlowDPO, "errors")
    which = "cached"
    experiment(["fit", "--config", str(config)])
    assert len(calls) == 6  # no forward of the reference
    monkeypatch.setattr(
        ReferenceErrors,
        "__call__",
        lambda self, key, epoch, old=ReferenceErrors.__call__: (old(self, key, epoch)[0], torch.full((2,), torch.nan)),
    )
    which = "live"
    experiment(["fit", "--config", str(config)])
    assert len(calls) == 6 + 12
    assert losses["cached"][0][0] == pytest.approx(losses["live"][0][0], abs=1e-6)
    np.testing.assert_allclose(losses["cached"], losses["live"], rtol=0, atol=1e-5)
    assert losses["live"][0][0] == pytest.approx(math.log(2), abs=1e-5) and losses["live"][2][0] != losses["live"][0][0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"latents": "videos"}, "other data"),
        ({"times": {"law": "logit_normal"}}, "other times"),
        ({"generator": "wan_other", "vae": "wan"}, "other transformer"),
        ({"dtype": "bfloat16"}, "other dtype"),
        ({"fps": 16.0}, "other fps"),
        pytest.param({"precision": "bf16-mixed"}, "precision"),
    ],
)
def test_errors_of_another_training_are_refused(change, words, cache, generators, latents, clips, tmp_path, capfd):
    generator, data = generators / "wan", latents / "wan"
    if "vae" in change:  # the same autoencoder, another transformer
        shutil.copytree(generators / "wan", generator := tmp_path / "wan")
        shutil.rmtree(generator / "transformer")
        shutil.copytree(generators / "wan_other" / "transformer", generator / "transformer")
    if change.get("latents"):
        data = tmp_path / "again"
        config = encode_config(tmp_path / "e.yaml", generator, clips / "pairs", data, precision="float16")
        experiment(["predict", "--config", str(config)])
    model = {k: v for k, v in change.items() if k in ("times", "dtype", "fps")}
    config = flow_config(
        tmp_path / "f.yaml",
        generator,
        data,
        data={"reference": cache},
        **model,
        trainer={"precision": change.get("precision", "32-true"), "max_steps": 1, "limit_val_batches": 0},
    )
    assert call("fit", "--config", config) == 2
    assert words in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"draws": 0}, "data.draws must be at least 1"),
        pytest.param({"workers": -1}, "workers"),
        ({"data": "pairs"}, "holds pairs, but latents are needed"),
        ({"data": "ltx"}, "holds latents of another generator"),
    ],
)
def test_reference_run_refuses(options, words, generators, latents, clips, tmp_path, capfd):
    options = {"data": latents / "wan", **options}
    options["data"] = {"pairs": clips / "pairs", "ltx": latents / "ltx"}.get(options["data"], options["data"])
    config = reference_config(tmp_path / "r.yaml", generators / "wan", out=tmp_path / "out", **options)
    assert call("predict", "--config", config) == 2
    assert words in capfd.readouterr().err and not (tmp_path / "out").exists()


def test_reference_run_refuses_an_output_in_the_way_before_the_work(generators, latents, tmp_path, capfd, monkeypatch):
    calls = counting(monkeypatch, CacheReference, "errors")
    config = reference_config(tmp_path / "r.yaml", generators / "wan", latents / "wan", in_the_way(tmp_path))
    assert call("predict", "--config", config) == 2
    assert "exists already" in capfd.readouterr().err and (tmp_path / "out" / "notes.txt").exists()
    assert not calls


def test_every_process_of_a_reference_run_has_a_batch(generators, latents):
    data = ReferenceDraws(str(latents / "wan"), "none", batch_size=8, workers=0)
    module = SimpleNamespace(generator=load_generator(generators / "wan", parts=("transformer", "vae")))
    data.trainer = SimpleNamespace(global_rank=1, world_size=2, lightning_module=module)
    data.setup("predict")
    assert len(data.predict_dataloader()) >= 1  # as EncodeList, Prompts and VideoList see to


# --- generate -------------------------------------------------------------------------------------------------------


def generate(generators: Path, out: Path, prompts: Path, *options, family: str = "wan") -> int:
    size = [f"--{k.replace('_', '-')}={v}" for k, v in SIZE.items()]
    return call(
        "generate",
        "--generator",
        generators / family,
        "--prompts",
        prompts,
        "--out",
        out,
        *size,
        "--samples",
        2,
        "--device",
        "cpu",
        "--source",
        "mine",
        *options,
    )


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(dict.fromkeys(PROMPTS)) + "\n")
    return path


@pytest.fixture(scope="module")
def generated(tmp_path_factory, generators, prompts) -> Path:
    """Three prompts, two samples each, four videos a step, seed 7."""
    out = tmp_path_factory.mktemp("generated") / "set"
    assert generate(generators, out, prompts, "--seed", 7, "--batch-size", 4) == 0
    return out


def videos_of(folder: Path) -> dict[tuple[str, int], torch.Tensor]:
    """Frames by prompt and seed."""
    whole = ClipSize(num_frames=5, height=32, width=32)
    return {(r.record()["prompt"], r.record()["seed"]): decode(r.members["mp4"], whole, 1) for r in ShardSet(folder)}


def alike(one: dict, other: dict) -> None:
    """The same videos up to what sums in another order come to: a level of brightness here and there."""
    assert one.keys() == other.keys()
    for key, video in one.items():
        assert apart(video, other[key]) < 0.2, key


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean difference, in levels of brightness."""
    return float((one.int() - other.int()).abs().float().mean())


def test_generated_videos_are_recorded_and_made_from_their_seeds(generated, generators):
    generator, found = load_generator(generators / "wan", fps=8), list(ShardSet(generated, "videos"))
    names = list(dict.fromkeys(PROMPTS))
    assert [raw.key for raw in found] == [f"{i:05d}-{n:03d}" for i in range(3) for n in range(2)]
    for raw, (i, n) in zip(found, [(i, n) for i in range(3) for n in range(2)]):
        record = raw.record()
        assert record.pop("seconds") > 0
        assert record == {
            "prompt": names[i],
            "source": "mine",
            "seed": draw_seed(7, names[i], n),
            "guidance": 1.0,
            **SIZE,
        }
        source = torch.Generator().manual_seed(record["seed"])
        torch.rand((), generator=source)  # a draw is of a time and its noise
        noise = torch.randn(1, 16, 2, 4, 4, generator=source)
        condition = generator.condition(generator.encode_prompts([names[i]]))
        video = generator.decode(generator.sample(condition, noise, 2))[0]
        want = decode(encode(video.permute(0, 2, 3, 1).numpy(), 8, 10), ClipSize(num_frames=5, height=32, width=32), 1)
        have = decode(raw.members["mp4"], ClipSize(num_frames=5, height=32, width=32), 1)
        assert apart(want, have) < 0.2
    videos = list(videos_of(generated).values())
    assert all(apart(a, b) > 2 for a, b in combinations(videos, 2))
    assert call("shards", "verify", generated) == 0 and call("shards", "info", generated) == 0


def test_a_video_depends_on_seed_prompt_and_number_alone(generated, generators, prompts, tmp_path):
    turned = tmp_path / "p.csv"
    turned.write_text("id,prompt\n" + "".join(f'{i},"{p}"\n' for i, p in enumerate(reversed(read_prompts(prompts)))))
    assert generate(generators, tmp_path / "out", turned, "--seed", 7, "--batch-size", 1) == 0
    alike(videos_of(tmp_path / "out"), videos_of(generated))
    assert generate(generators, tmp_path / "other", prompts, "--seed", 8, "--batch-size", 6) == 0
    assert not videos_of(tmp_path / "other").keys() & videos_of(generated).keys()


@pytest.mark.parametrize(
    ("options", "null"),
    [([], None), (["--cfg-scale", 3], ""), (["--cfg-scale", 3, "--negative", "a video"], "a video")],
)
def test_guidance_steers_away_from_the_empty_prompt(options, null, generators, prompts, tmp_path, monkeypatch):
    sample, seen = Generator.sample, []
    monkeypatch.setattr(Generator, "sample", lambda self, *args: (seen.append((self, args)), sample(self, *args))[1])
    assert generate(generators, tmp_path / "out", prompts, *options, "--batch-size", 6, family="ltx") == 0
    ((generator, (_, _, steps, guidance, given)),) = seen
    assert steps == 2 and guidance == (3 if options else 1)
    if null is None:
        assert given is None
    else:
        want = generator.condition(generator.encode_prompts([null]))
        assert all(torch.equal(given[name], want[name]) for name in want)
    assert {raw.record()["guidance"] for raw in ShardSet(tmp_path / "out")} == {guidance}


def test_interrupted_generation_goes_on_where_it_stopped(generated, generators, prompts, tmp_path, monkeypatch, capfd):
    again = partial(generate, generators, tmp_path / "out", prompts, "--seed", 7, "--batch-size")
    with monkeypatch.context() as patch:
        failing_after(patch, Generator, "sample", 1)
        assert again(4) == 1  # a fault of the program
    assert generate(generators, tmp_path / "out", prompts, "--seed", 8) == 2
    assert "holds parts of another run (seed differ)" in capfd.readouterr().err
    sample, sizes = Generator.sample, []
    monkeypatch.setattr(
        Generator, "sample", lambda self, c, noise, *args: (sizes.append(len(noise)), sample(self, c, noise, *args))[1]
    )
    assert again(5) == 0  # the batch size may change
    assert sizes == [1, 1] and call("shards", "verify", tmp_path / "out") == 0
    alike(videos_of(tmp_path / "out"), videos_of(generated))
    assert again(4) == 2 and "exists already" in capfd.readouterr().err


GENERATE_REFUSED = {
    "no prompts": (["--prompts", "none.txt"], "none.txt"),
    "prompts in a folder": (["--prompts", "."], "cannot be read"),
    "number of frames": (["--num-frames", 6], "num_frames is 6"),
    "width": (["--width", 40], "multiples of 16"),
    "guidance": (["--cfg-scale", 0.5], "cfg_scale 0.5"),
    "guidance nan": (["--cfg-scale", "nan"], "cfg_scale nan"),
    "no generator": (["--generator", "none/at/all"], "none/at/all"),
    "no adapters": (["--lora", "none/at/all"], "adapters none/at/all cannot be loaded"),
    "steps": (["--steps", 0], "must be a whole number from 1 on"),
    "samples": (["--samples", 0], "must be a whole number from 1 on"),
}


@pytest.mark.parametrize("name", GENERATE_REFUSED)
def test_generate_refuses(name, generators, prompts, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options, words = GENERATE_REFUSED[name]
    assert generate(generators, tmp_path / "out", prompts, *options) == 2
    out, err = capfd.readouterr()
    assert words in err and "Traceback" not in out + err and not list(tmp_path.iterdir())


def test_adapters_of_another_architecture_are_refused(generators, prompts, trained, tmp_path, capfd):
    assert generate(generators, tmp_path / "out", prompts, "--lora", trained["ltx"].out) == 2
    assert "cannot be loaded into this generator" in capfd.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "want"),
    [
        ("p.txt", "one\n\n two \none\n", ["one", "two"]),
        ("p.txt", "\ufeffa, b\n", ["a, b"]),
        ("p.csv", '\ufeffid,prompt\n1,"a, b"\n2,\n3\n4,ü\n', ["a, b", "ü"]),
    ],
)
def test_prompts_are_read_in_order_and_once(name, content, want, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_prompts(tmp_path / name) == want


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", b"", "holds no prompt"),
        ("p.txt", b"\n  \n", "holds no prompt"),
        ("p.csv", b"prompt\n", "at least one row"),
        ("p.csv", b"text\na\n", "needs a column prompt"),
        ("p.csv", b'prompt\n""\n', "holds no prompt"),
        ("p.txt", b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_files_without_prompts_are_refused(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VideoAlignError, match=words):
        read_prompts(tmp_path / name)


# --- pairs from rewards -----------------------------------------------------------------------------------------------


def pair_up(judge: Path, data: Path, out: Path, *options) -> int:
    return call(
        "shards",
        "pairs-from-rewards",
        "--model",
        judge,
        "--data",
        data,
        "--out",
        out,
        "--device",
        "cpu",
        "--workers",
        0,
        "--batch-size",
        3,
        *options,
    )


@pytest.fixture(scope="module")
def rewards(judge, clips) -> dict[str, torch.Tensor]:
    """Normalised rewards of every video, by the network itself."""
    network, found = VideoReward.from_pretrained(judge).eval(), {}
    for kind, sides in (("videos", ("",)), ("pairs", ("a", "b"))):
        for content in ShardSet(clips / kind).contents():
            for side in sides:
                video = content.read(f"{side}.mp4".lstrip("."))
                frames = decode(video, network.processor.sampling, network.processor.factor)
                with torch.no_grad():
                    raw = network(**network.processor([frames], [content.record["prompt"]]))[0]
                mean, std = torch.tensor([0.1, -0.2, 0.3]), torch.tensor([0.5, 0.25, 2.0])
                found[f"{content.key}.{side}".rstrip(".")] = (raw - mean) / std
    return found


def groups(clips: Path) -> list[list[str]]:
    keys = [content.key for content in ShardSet(clips / "videos").contents()]
    return [keys[:4], keys[4:7], keys[7:]]


def weighted(rewards: dict, key: str, weights=(1, 1, 1)) -> float:
    return float((rewards[key] * torch.tensor(weights)).sum() / sum(weights))


@pytest.mark.parametrize("weights", [(1, 1, 1), (0, 0, 1)])
@pytest.mark.parametrize("mode", ["best-worst", "margin"])
def test_pairs_of_each_prompt(mode, weights, judge, clips, rewards, tmp_path, capsys):
    score = {key: weighted(rewards, key, weights) for group in groups(clips) for key in group}
    every = [pair for group in groups(clips) for pair in combinations(group, 2)]
    gaps = sorted(abs(score[a] - score[b]) for a, b in every)
    margin = (gaps[3] + gaps[4]) / 2 if mode == "margin" else 0.0
    if mode == "margin":
        want = [(a, b) for a, b in every if abs(score[a] - score[b]) > margin]
    else:
        ends = [(min(g, key=score.get), max(g, key=score.get)) for g in groups(clips)[:2]]
        want = [tuple(sorted(pair)) for pair in ends]  # the first key is A, whichever is better
    assert (
        pair_up(judge, clips / "videos", tmp_path / "out", "--mode", mode, "--margin", margin, "--weights", *weights)
        == 0
    )
    assert f"{len(want)} pairs of 8 samples" in capsys.readouterr().out
    media = {raw.key: (raw.members["mp4"], raw.record()) for raw in ShardSet(clips / "videos")}
    found = list(ShardSet(tmp_path / "out", "pairs"))
    assert [tuple(raw.record()["keys"].values()) for raw in found] == want
    for raw, (a, b) in zip(found, want):
        record = raw.record()
        assert (raw.members["a.mp4"], raw.members["b.mp4"]) == (media[a][0], media[b][0])
        assert record["prompt"] == media[a][1]["prompt"] == media[b][1]["prompt"]
        for field, name in (
            ("sources", "source"),
            ("seeds", "seed"),
            ("fps", "fps"),
            ("num_frames", "num_frames"),
            ("guidance", "guidance"),
        ):
            assert record[field] == {"A": media[a][1][name], "B": media[b][1][name]}
        have = torch.tensor([[record["rewards"][s][d] for d in COLUMNS[:3]] for s in "AB"])
        torch.testing.assert_close(have, torch.stack([rewards[a], rewards[b]]), rtol=0, atol=1e-4)
        gap = (have[0] - have[1]).tolist()
        signs = {c: "A" if g > 0 else "B" if g < 0 else "same" for c, g in zip(COLUMNS, [*gap, sum(gap)])}
        assert record["labels"] == signs
    assert call("shards", "verify", tmp_path / "out") == 0 and call("shards", "info", tmp_path / "out") == 0


def test_relabelled_pairs_keep_what_they_were(judge, clips, rewards, tmp_path, capsys):
    gaps = {f"pair{i}": abs(weighted(rewards, f"pair{i}.a") - weighted(rewards, f"pair{i}.b")) for i in range(4)}
    margin = sum(sorted(gaps.values())[:2]) / 2
    assert pair_up(judge, clips / "pairs", tmp_path / "out", "--mode", "relabel", "--margin", margin) == 0
    assert "3 pairs of 4 samples, 1 left out" in capsys.readouterr().out
    old, new = ({raw.key: raw for raw in ShardSet(folder)} for folder in (clips / "pairs", tmp_path / "out"))
    assert new.keys() == {key for key, gap in gaps.items() if gap > margin}
    for key, raw in new.items():
        before, after = old[key].record(), raw.record()
        assert {e: raw.members[e] for e in ("a.mp4", "b.mp4")} == {e: old[key].members[e] for e in ("a.mp4", "b.mp4")}
        assert {k: v for k, v in after.items() if k not in ("labels", "rewards")} == {
            k: v for k, v in before.items() if k not in ("labels", "rewards")
        }
        gap = rewards[f"{key}.a"] - rewards[f"{key}.b"]
        assert [after["labels"][c] for c in COLUMNS] == [
            "A" if g > 0 else "B" for g in [*gap.tolist(), float(gap.sum())]
        ]
        assert list(after["rewards"]["B"].values()) == pytest.approx(rewards[f"{key}.b"].tolist(), abs=1e-4)


def test_interrupted_scoring_goes_on_where_it_stopped(judge, clips, tmp_path, monkeypatch):
    assert pair_up(judge, clips / "videos", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        failing_after(patch, VideoReward, "forward", 2)
        assert pair_up(judge, clips / "videos", tmp_path / "out") == 1  # a fault of the program
    assert not (tmp_path / "out").exists()
    calls = counting(monkeypatch, VideoReward, "forward")
    assert pair_up(judge, clips / "videos", tmp_path / "out") == 0
    assert len(calls) == 1  # of three batches
    whole, again = ([(r.key, r.members) for r in ShardSet(tmp_path / name)] for name in ("whole", "out"))
    assert whole == again


PAIRS_REFUSED = {
    "nothing differs enough": (["--mode", "margin", "--margin", 1e6], "no pair to write"),
    "best and worst too close": (["--margin", 1e6], "no sample was written"),
    "no prompt with two videos": (["--data", "single"], "no pair to write"),
    "pairs in place of videos": (["--data", "pairs"], "holds pairs as mp4; --mode best-worst needs videos"),
    "videos in place of pairs": (["--mode", "relabel"], "holds videos as mp4; --mode relabel needs pairs"),
    "latents": (["--data", "latents"], "holds latents as safetensors"),
    "no model": (["--model", "none"], "there is no such folder of a reward model"),
    "model that was never measured": (["--model", "unmeasured"], "unmeasured has no statistics of its rewards"),
    "weights of nothing": (["--weights", 0, 0, 0], "weights"),
    "negative weight": (["--weights", -1, 1, 1], "weights"),
    "margin nan": (["--margin", "nan"], "margin"),
    "negative margin": (["--margin", -1], "margin"),
}


@pytest.mark.parametrize("name", PAIRS_REFUSED)
def test_pairs_from_rewards_refuses(name, judge, clips, latents, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ShardWriter(tmp_path / "single", "videos") as writer:
        writer.write("0", {"": noise_video(0)}, {"prompt": "a video"})
    never = json.loads((shutil.copytree(judge, tmp_path / "unmeasured") / "reward.json").read_text())
    never["statistics"] = {"mean": [0.0] * 3, "std": [1.0] * 3}
    (tmp_path / "unmeasured" / "reward.json").write_text(json.dumps(never))
    options, words = PAIRS_REFUSED[name]
    options = [{"pairs": clips / "pairs", "latents": latents / "wan"}.get(o, o) for o in options]
    assert pair_up(judge, clips / "videos", tmp_path / "out", *options) == 2
    err = capfd.readouterr().err
    assert words in err.split("videoalign: error:")[-1] and "Traceback" not in err and not (tmp_path / "out").exists()


# --- win rates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 3), (4, 2), (3, 1), (1, 4)])
def test_win_rates_are_those_of_loops(shape):
    torch.manual_seed(sum(shape))
    policy, reference = torch.randint(0, 4, (2, *shape, 4)).float() / 2  # with ties
    found = win_rates(policy, reference, resamples=500)
    won = lambda a, b: 1.0 if a > b else 0.5 if a == b else 0.0  # noqa: E731
    for d, column in enumerate(COLUMNS):
        p, r, row = policy[..., d].tolist(), reference[..., d].tolist(), found[column]
        matched = [won(p[i][n], r[i][n]) for i in range(shape[0]) for n in range(shape[1])]
        apart = [won(p[i][n], r[i][m]) for i in range(shape[0]) for n, m in permutations(range(shape[1]), 2)]
        assert row["win_rate"] == pytest.approx(np.mean(matched)) and row["prompts"] == shape[0]
        assert row["policy"] == pytest.approx(np.mean(p)) and row["reference"] == pytest.approx(np.mean(r))
        if shape[1] > 1:
            assert row["superiority"] == pytest.approx(np.mean(apart))
        else:
            assert math.isnan(row["superiority"])
        for kind in ("win_rate", "superiority")[: 1 + (shape[1] > 1)]:
            low, high = row[f"{kind}_interval"]
            assert low - 1e-9 <= row[kind] <= high + 1e-9 if shape[0] > 1 else math.isnan(low) and math.isnan(high)


def test_a_small_shift_wins_with_the_same_noise_only():
    """Noise spreads by 1, the policy is better by 0.01 everywhere: superiority stays near chance, the win rate is 1."""
    torch.manual_seed(0)
    reference = torch.randn(40, 4, 4)
    row = win_rates(reference + 0.01, reference)["VQ"]
    assert row["win_rate"] == 1.0 and row["win_rate_interval"] == (1.0, 1.0)
    assert 0.5 <= row["superiority"] < 0.52 and row["superiority_interval"][1] < 0.52


def test_equal_rewards_win_half():
    rewards = torch.randn(3, 2, 4)
    for row in win_rates(rewards, rewards).values():
        assert row["win_rate"] == 0.5 and row["win_rate_interval"] == (0.5, 0.5) and row["superiority"] == 0.5


def win_rate_config(path, generator, latents, judge, prompts, samples=2, trainer=None, **sampling) -> Path:
    callback = node(
        f"{CALLBACKS}.WinRate",
        reward_model=judge,
        prompts=prompts,
        samples=samples,
        sampling={**SIZE, "batch_size": 3, "seed": 5, **sampling},
    )
    return flow_config(path, generator, latents, [node(f"{CALLBACKS}.EMA"), callback], trainer=trainer)


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"tensors": 0, "images": 0, "scalars": 0})
    return found.Reload()


def test_win_rate_of_an_untrained_policy_is_one_half(generators, latents, judge, prompts, tmp_path):
    config = win_rate_config(
        tmp_path / "w.yaml", generators / "wan", latents / "wan", judge, prompts, trainer={"logger": logger(tmp_path)}
    )
    assert call("test", "--config", config) == 0
    run = tmp_path / "run" / "version_0"
    saved = json.loads((run / "win_rate.json").read_text())
    assert saved["drift"] == 0 and saved["prompts"] == read_prompts(prompts) and saved["samples"] == 2
    for row in saved["columns"].values():
        assert row["win_rate"] == 0.5 and row["win_rate_interval"] == [0.5, 0.5] and row["policy"] == row["reference"]
        assert row["superiority"] == 0.5
    assert not tmp_path.joinpath("win_rate.json").exists()


@pytest.fixture(scope="module")
def won(tmp_path_factory, trained, generators, latents, judge, prompts) -> SimpleNamespace:
    """`videoalign test` of a checkpoint's average, with guidance."""
    folder = tmp_path_factory.mktemp("won")
    config = win_rate_config(
        folder / "w.yaml",
        generators / "wan",
        latents / "wan",
        judge,
        prompts,
        cfg_scale=2.0,
        trainer={"logger": logger(folder)},
    )
    assert call("test", "--config", config, "--ckpt_path", trained["wan"].checkpoint) == 0
    return SimpleNamespace(config=config, run=folder / "run" / "version_0")


def test_win_rates_end_to_end(won, trained, generators, judge, prompts):
    """Everything again, a video at a time: noise by its seed, sampling, frames, rewards, loops."""
    saved, network = json.loads((won.run / "win_rate.json").read_text()), VideoReward.from_pretrained(judge).eval()
    module, texts = trained["wan"].module.eval(), read_prompts(prompts)
    encoder = load_generator(generators / "wan", parts=("text_encoder",))
    shape, rewards, drifts = torch.Size((16, 2, 4, 4)), {"policy": [], "reference": []}, []
    null = module.generator.condition(encoder.encode_prompts([""]))
    for prompt in texts:
        condition = module.generator.condition(encoder.encode_prompts([prompt]))
        for number in range(2):
            source = torch.Generator().manual_seed(draw_seed(5, prompt, number))
            torch.rand((), generator=source)
            noise = torch.randn(1, *shape, generator=source)
            outputs = {"policy": module.generator.sample(condition, noise, 2, 2.0, null)}
            with module.generator.without_adapters():
                outputs["reference"] = module.generator.sample(condition, noise, 2, 2.0, null)
            for t in (0.125, 0.375, 0.625, 0.875):
                x, time = (1 - t) * outputs["reference"] + t * noise, torch.tensor([t])
                with torch.no_grad():
                    mine = module.generator.velocity(x, time, condition)
                    with module.generator.without_adapters():
                        drifts.append(float((mine - module.generator.velocity(x, time, condition)).square().mean()))
            for name, sample in outputs.items():
                frames = module.generator.decode(sample)[0]
                kept = frames[network.processor.sampling.indices(5, 8.0)]
                with torch.no_grad():
                    row = network.normalise(network(**network.processor([kept], [prompt])))[0]
                rewards[name].append([*row.tolist(), float(row.sum())])
    assert saved["drift"] == pytest.approx(np.mean(drifts), rel=1e-3) and saved["drift"] > 0
    policy, reference = (torch.tensor(rewards[name]).view(3, 2, 4) for name in ("policy", "reference"))
    want = win_rates(policy, reference)
    for column in COLUMNS:
        for key in ("win_rate", "superiority", "policy", "reference"):
            assert saved["columns"][column][key] == pytest.approx(want[column][key], abs=0.02), (column, key)
    assert any(row["policy"] != row["reference"] for row in saved["columns"].values())


def test_win_rates_are_shown_in_tensorboard(won):
    saved, found = json.loads((won.run / "win_rate.json").read_text()), events(won.run)
    scalars = {tag: found.Scalars(tag)[-1].value for tag in found.Tags()["scalars"]}
    for column, row in saved["columns"].items():
        for tag, key in (
            ("win_rate", "win_rate"),
            ("superiority", "superiority"),
            ("reward/policy", "policy"),
            ("reward/reference", "reference"),
        ):
            assert scalars[f"test/{tag}/{column}"] == pytest.approx(row[key], abs=1e-5)
    assert scalars["test/drift"] == pytest.approx(saved["drift"], rel=1e-4)
    text = found.Tensors("test/win_rate/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert all(f"| {column} | {row['win_rate']:.3f}" in text for column, row in saved["columns"].items())
    assert "test/win_rate" in found.Tags()["images"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"samples": 0}, "WinRate.samples must be at least 1"),
        ({"num_frames": 6}, "num_frames is 6"),
        ({"judge": Path("none")}, "none"),
        ({"prompts": Path("none.txt")}, "none.txt"),
    ],
)
def test_win_rate_refuses(options, words, generators, latents, judge, prompts, tmp_path, capfd):
    options = {"judge": judge, "prompts": prompts, **options}
    config = win_rate_config(tmp_path / "w.yaml", generators / "ltx", latents / "ltx", **options)
    assert call("test", "--config", config) == 2
    assert words in capfd.readouterr().err


@pytest.mark.parametrize(
    "sampling",
    [FrameSampling(fps=4.0, min_pixels=0), FrameSampling(fps=None, num_frames=6, min_pixels=0, max_pixels=900)],
)
def test_resample_is_decode_of_a_video_that_was_not_encoded(sampling):
    video = noise_video(3, 14)
    whole = decode(video, ClipSize(num_frames=14, height=40, width=48), 1)  # every frame as the decoder has it
    assert torch.equal(resample(whole, 8, sampling, 4), decode(video, sampling, 4))


# --- training: averages, samples, export ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory, generators, latents) -> dict[str, SimpleNamespace]:
    """Some steps of Flow-DPO with an average, samples at every second step, an export, a checkpoint."""
    runs, shown, add = {}, [], side_by_side.add_animation

    def recording(*args):
        shown.append(np.stack(args[2]))
        add(*args)

    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(f"trained_{family}")
        callbacks = [
            node(f"{CALLBACKS}.EMA", decay=0.5),
            node(f"{CALLBACKS}.ExportGenerator", out=folder / "export"),
            node(f"{CALLBACKS}.SideBySide", prompts=PROMPTS[:1], sampling={**SIZE, "seed": 5}),
            node("lightning.pytorch.callbacks.ModelCheckpoint", dirpath=folder, filename="end", every_n_train_steps=4),
        ]
        trainer = {"max_steps": 4, "logger": logger(folder), "enable_checkpointing": True, "check_val_every_n_epoch": 1}
        config = flow_config(
            folder / "f.yaml",
            generators / family,
            latents / family,
            callbacks,
            trainer=trainer,
            optimizer=node("torch.optim.AdamW", lr=0.05),
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(side_by_side, "add_animation", recording)
            cli = experiment(["fit", "--config", str(config)])
        ema = next(c for c in cli.trainer.callbacks if isinstance(c, EMA))
        runs[family] = SimpleNamespace(
            module=cli.model,
            ema=ema,
            out=folder / "export",
            checkpoint=folder / "end.ckpt",
            shown=shown[-2:],
            run=folder / "run" / "version_0",
            config=config,
        )
    return runs


def plain(folder: Path, **parts) -> DiffusionPipeline:
    kind = {"wan": WanPipeline, "ltx": LTXPipeline}[folder.name]  # DiffusionPipeline's own ignores transformer=
    pipe = kind.from_pretrained(folder, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def plain_sample(pipe, family: str, prompt: str, noise: torch.Tensor) -> torch.Tensor:
    """What a user of diffusers gets: text in, latents out."""
    more = {"frame_rate": 25.0} if family == "ltx" else {}
    latents = noise.flatten(2).transpose(1, 2) if family == "ltx" else noise
    found = pipe(
        prompt=prompt,
        negative_prompt=None,
        latents=latents,
        num_frames=5,
        height=32,
        width=32,
        num_inference_steps=3,
        guidance_scale=1.0,
        output_type="latent",
        max_sequence_length=128 if family == "ltx" else 512,
        **more,
    ).frames
    return found.transpose(1, 2).unflatten(2, noise.shape[2:]) if family == "ltx" else found


def our_sample(module, folder: Path, prompt: str, noise: torch.Tensor, net=None) -> torch.Tensor:
    encoder = load_generator(folder, parts=("text_encoder",))
    module.eval()
    return module.generator.sample(
        module.generator.condition(encoder.encode_prompts([prompt])), noise, 3, transformer=net
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_exported_adapters_give_the_policy_in_plain_diffusers(family, trained, generators):
    """Bit for bit; with rank 4 and alpha 16 they would not at scale 1."""
    module, folder = trained[family].module, generators / family
    noise = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    policy = our_sample(module, folder, PROMPTS[0], noise)
    pipe = plain(folder)
    before = plain_sample(pipe, family, PROMPTS[0], noise)
    pipe.load_lora_weights(trained[family].out)
    assert torch.equal(plain_sample(pipe, family, PROMPTS[0], noise), policy)
    with module.as_reference():
        assert torch.equal(before, our_sample(module, folder, PROMPTS[0], noise))
    assert (before - policy).abs().max() > 1e-3  # there is something to export
    assert [p.name for p in trained[family].out.iterdir()] == ["pytorch_lora_weights.safetensors"]


def test_exported_adapters_are_loaded_by_generate(trained, generators, prompts, tmp_path):
    assert generate(generators, tmp_path / "out", prompts, "--lora", trained["wan"].out, "--seed", 7) == 0
    module = trained["wan"].module.eval()
    raw = next(iter(ShardSet(tmp_path / "out")))
    source = torch.Generator().manual_seed(raw.record()["seed"])
    torch.rand((), generator=source)
    noise = torch.randn(1, 16, 2, 4, 4, generator=source)
    encoder = load_generator(generators / "wan", parts=("text_encoder",))
    condition = module.generator.condition(encoder.encode_prompts([raw.record()["prompt"]]))
    whole = ClipSize(num_frames=5, height=32, width=32)

    def through_codec(latents):
        return decode(encode(module.generator.decode(latents)[0].permute(0, 2, 3, 1).numpy(), 8, 10), whole, 1)

    have = decode(raw.members["mp4"], whole, 1)
    assert apart(have, through_codec(module.generator.sample(condition, noise, 2))) < 0.2
    with module.as_reference():
        assert apart(have, through_codec(module.generator.sample(condition, noise, 2))) > 1


def test_a_fully_trained_transformer_is_exported_whole(generators, latents, tmp_path):
    export = node(f"{CALLBACKS}.ExportGenerator", out=tmp_path / "export")
    config = flow_config(
        tmp_path / "f.yaml", generators / "wan", latents / "wan", [export], lora=False, trainer={"limit_val_batches": 0}
    )
    cli = experiment(["fit", "--config", str(config)])
    noise = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    transformer = WanTransformer3DModel.from_pretrained(tmp_path / "export")
    found = plain_sample(plain(generators / "wan", transformer=transformer), "wan", PROMPTS[0], noise)
    ours = our_sample(cli.model, generators / "wan", PROMPTS[0], noise)
    weights = dict(cli.model.policy.named_parameters())
    assert all(torch.equal(weights[name], p) for name, p in transformer.named_parameters())
    torch.testing.assert_close(found, ours, rtol=0, atol=1e-5)  # where weights lie in memory changes the last bit
    assert not torch.equal(found, our_sample(cli.model, generators / "wan", PROMPTS[0], noise, cli.model.reference))
    # an earlier export is replaced, by one of the same kind only
    assert call("fit", "--config", config) == 0


@pytest.mark.parametrize("lora", [True, False])
def test_an_export_in_the_way_is_refused_before_training(lora, generators, latents, tmp_path, capfd, monkeypatch):
    export = node(f"{CALLBACKS}.ExportGenerator", out=in_the_way(tmp_path))
    config = flow_config(tmp_path / "f.yaml", generators / "ltx", latents / "ltx", [export], lora=lora)
    calls = counting(monkeypatch, FlowDPO, "training_step")
    assert call("fit", "--config", config) == 2
    assert "exists already" in capfd.readouterr().err and not calls
    assert (tmp_path / "out" / "notes.txt").read_text() == "precious"


def halves(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Videos of 32 pixels, shown at four times their size, at the two edges."""
    assert picture.shape[-3] == 128 and picture.shape[-2] < 2 * 128 + 16
    return picture[..., :128, :], picture[..., -128:, :]


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_stand_beside_the_reference_with_the_same_noise(family, trained):
    """Validated after steps 2 and 4: the reference's half stays, the policy's moves."""
    paths = sorted((trained[family].run / "samples").iterdir())
    assert [p.name for p in paths] == ["00_step000002.gif", "00_step000004.gif"]
    (policy, reference), (later, again) = (halves(frames.astype(int)) for frames in trained[family].shown)
    assert np.array_equal(reference, again) and np.abs(later - policy).mean() > 1 < np.abs(policy - reference).mean()
    for path, frames in zip(paths, trained[family].shown):
        with Image.open(path) as gif:
            assert gif.n_frames == 5 and gif.size == frames.shape[2:0:-1]
            for number, frame in enumerate(frames):
                gif.seek(number)
                difference = np.abs(np.asarray(gif.convert("RGB")).astype(int) - frame).mean()
                assert difference < 12  # a palette of 256 colours
    (tag,) = events(trained[family].run).Tags()["images"]
    assert tag.startswith("samples/0 a red circle")


def test_before_training_both_halves_are_equal(generators, latents, tmp_path):
    show = node(f"{CALLBACKS}.SideBySide", prompts=PROMPTS[:2], sampling={**SIZE, "cfg_scale": 2.0})
    config = flow_config(
        tmp_path / "f.yaml", generators / "ltx", latents / "ltx", [show], trainer={"logger": logger(tmp_path)}
    )
    assert call("validate", "--config", config) == 0
    paths = sorted((tmp_path / "run" / "version_0" / "samples").iterdir())
    assert len(paths) == 2
    for path in paths:
        with Image.open(path) as gif:
            left, right = halves(np.asarray(gif.convert("RGB")))
        assert np.array_equal(left, right) and left.std() > 0


def test_samples_are_shown_at_every_nth_validation():
    show, seen = SideBySide(["a"], Sampling(num_frames=5, height=32, width=32), every=3), []
    show.sampler = SimpleNamespace(both=lambda items: seen.append(show.count) or (None, None))
    trainer = SimpleNamespace(sanity_checking=False, is_global_zero=False, log_dir=None, loggers=[])
    for _ in range(7):
        show.on_validation_epoch_end(trainer, None)
    trainer.sanity_checking = True
    show.on_validation_epoch_end(trainer, None)
    assert seen == [1, 4, 7]


def test_samples_at_every_validation_but_none_are_refused():
    with pytest.raises(VideoAlignError, match="every"):
        SideBySide(["a"], Sampling(num_frames=5, height=32, width=32), every=0)


class Line(L.LightningModule):
    """Two weights, of which one trains."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        self.frozen = torch.nn.Parameter(torch.ones(1), requires_grad=False)
        self.training_saw, self.validation_saw = [], []

    def training_step(self, batch, batch_idx):
        self.training_saw.append(self.weight.detach().clone())
        return ((self.weight - batch) ** 2).sum() * self.frozen

    def validation_step(self, batch, batch_idx):
        self.validation_saw.append(self.weight.detach().clone())

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.full((40, 1), 3.0), batch_size=1)

    val_dataloader = test_dataloader = lambda self: torch.utils.data.DataLoader(torch.zeros(1, 1))


def line(folder: Path, steps: int, *callbacks, ckpt=None, **options):
    module = Line()
    trainer = L.Trainer(
        **{**TRAINER, "default_root_dir": folder, "max_steps": steps, "callbacks": list(callbacks), **options}
    )
    trainer.fit(module, ckpt_path=ckpt)
    return module, trainer


@pytest.mark.parametrize(("decay", "accumulate"), [(0.3, 1), (0.999, 1), (0.3, 2)])
def test_the_average_follows_its_formula(decay, accumulate, tmp_path):
    ema, after = EMA(decay), []
    record = L.pytorch.callbacks.LambdaCallback(
        on_train_batch_end=lambda trainer, module, *rest: after.append(
            (trainer.global_step, module.weight.detach().clone())
        )
    )
    module, _ = line(tmp_path, 5, ema, record, accumulate_grad_batches=accumulate)
    average = torch.tensor([1.0, -2.0])
    for step, weight in dict(after).items():
        if step:
            d = min(decay, (1 + step) / (10 + step))
            average = d * average + (1 - d) * weight
    assert max(dict(after)) == 5 and ema.average.keys() == {"weight"}
    torch.testing.assert_close(ema.average["weight"], average)
    torch.testing.assert_close(module.weight.detach(), average)  # what is exported
    assert not torch.allclose(after[-1][1], average)


def test_validation_sees_the_average_and_training_goes_on_with_the_weights(tmp_path):
    ema, averages = EMA(0.3), []
    note = L.pytorch.callbacks.LambdaCallback(
        on_validation_end=lambda trainer, module: averages.append(ema.average["weight"].clone())
    )
    module, _ = line(tmp_path, 6, ema, note, val_check_interval=2)
    without, _ = line(tmp_path, 6, val_check_interval=2)
    assert len(module.validation_saw) == 3 and all(map(torch.equal, module.validation_saw, averages))
    assert all(map(torch.equal, module.training_saw, without.training_saw)) and len(module.training_saw) == 6
    assert not torch.allclose(module.validation_saw[0], without.validation_saw[0])


def checkpoint(folder: Path, **options):
    return L.pytorch.callbacks.ModelCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1, **options)


def test_a_checkpoint_resumes_the_average(tmp_path):
    whole = EMA(0.3)
    straight, _ = line(tmp_path, 6, whole)
    line(tmp_path, 3, EMA(0.3), checkpoint(tmp_path, every_n_train_steps=3), enable_checkpointing=True)
    (path,) = tmp_path.glob("*.ckpt")
    again = EMA(0.3)
    resumed, _ = line(tmp_path, 6, again, ckpt=path)
    assert all(map(torch.equal, resumed.training_saw, straight.training_saw[3:])) and len(resumed.training_saw) == 3
    torch.testing.assert_close(again.average["weight"], whole.average["weight"], rtol=0, atol=0)
    assert again.steps == 6


def test_testing_a_checkpoint_sees_its_average(tmp_path):
    ema = EMA(0.3)
    line(tmp_path, 3, ema, checkpoint(tmp_path, every_n_train_steps=3), enable_checkpointing=True)
    (path,) = tmp_path.glob("*.ckpt")
    for stage in ("test", "validate"):
        module = Line()
        trainer = L.Trainer(**{**TRAINER, "callbacks": [EMA(0.3)], "default_root_dir": tmp_path})
        getattr(trainer, stage)(module, ckpt_path=path, verbose=False)
        assert all(torch.equal(seen, ema.average["weight"]) for seen in module.validation_saw) and module.validation_saw


@pytest.mark.parametrize("every", [3, pytest.param(100)])
def test_the_last_checkpoint_holds_the_weights_that_trained(every, tmp_path):
    """Not the average, from which a resumed training would go on as from weights."""
    seen = []
    note = L.pytorch.callbacks.LambdaCallback(
        on_train_batch_end=lambda trainer, module, *rest: seen.append(module.weight.detach().clone())
    )
    last = checkpoint(tmp_path, every_n_train_steps=every, save_last=True)
    line(tmp_path, 3, EMA(0.3), note, last, enable_checkpointing=True)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert saved["global_step"] == 3 and torch.equal(saved["state_dict"]["weight"], seen[-1])


@pytest.mark.parametrize("decay", [0.0, 1.0, -1, math.nan])
def test_a_decay_that_averages_nothing_is_refused(decay):
    with pytest.raises(VideoAlignError, match=r"EMA\.decay must be in"):
        EMA(decay)


def test_the_export_holds_the_average(trained):
    run = trained["wan"]
    for name, average in run.ema.average.items():
        assert torch.equal(run.module.get_parameter(name).detach(), average), name
    weights = torch.load(run.checkpoint, weights_only=False)["state_dict"]
    assert weights.keys() == run.ema.average.keys() and any(
        not torch.equal(weights[n], a) for n, a in run.ema.average.items()
    )


# --- two processes ----------------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
import torch
from videoalign.cli import main
torch.set_num_threads(1)
for args in json.loads(sys.argv[1]):
    print("command", args[0], flush=True)
    main(args)
"""


def two_processes(folder: Path, *commands: list, timeout: int = 300) -> subprocess.CompletedProcess:
    """Commands one after the other in the same two processes, which the first command starts."""
    (folder / "script.py").write_text(SCRIPT)
    text = json.dumps([[str(a) for a in command] for command in commands])
    return subprocess.run(
        [sys.executable, folder / "script.py", text],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


DDP = ["--trainer.devices", 2, "--trainer.strategy", "ddp", "--trainer.accelerator", "cpu"]
SHARED = [*DDP, "--trainer.use_distributed_sampler", "false"]  # the DataModules share the batches themselves


@pytest.fixture(scope="module")
def two(tmp_path_factory, generators, clips, latents, prompts, won, trained) -> Path:
    """Latents, reference errors, samples and win rates, made by two processes."""
    folder = tmp_path_factory.mktemp("two")
    encoding = encode_config(folder / "e.yaml", generators / "wan", clips / "pairs", folder / "latents")
    errors = reference_config(folder / "r.yaml", generators / "wan", latents / "wan", folder / "errors", batch_size=3)
    size = [f"--{k.replace('_', '-')}={v}" for k, v in SIZE.items()]
    config = yaml.safe_load(won.config.read_text())
    config["trainer"]["logger"] = logger(folder)
    done = two_processes(
        folder,
        ["predict", "--config", encoding, *SHARED],
        ["predict", "--config", encoding, *DDP, "--data.out", folder / "as_shipped"],
        ["predict", "--config", errors, *SHARED],
        [
            "generate",
            "--generator",
            generators / "wan",
            "--prompts",
            prompts,
            "--out",
            folder / "videos",
            *size,
            "--samples",
            2,
            "--device",
            "cpu",
            "--seed",
            7,
            "--batch-size",
            2,
            "--devices",
            2,
        ],
        ["test", "--config", save_yaml(folder / "w.yaml", config), "--ckpt_path", trained["wan"].checkpoint, *DDP],
    )
    assert done.returncode == 0, done.stderr[-20000:]
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


@pytest.mark.slow
def test_two_processes_encode_the_same_samples(two, latents):
    assert same(samples_of(two / "latents"), samples_of(latents / "wan"))
    assert [shard.name for shard in ShardSet(two / "latents").index.shards] == ["r0000-00000.tar", "r0001-00000.tar"]
    assert [shard.samples for shard in ShardSet(two / "latents").index.shards] == [2, 2]
    assert call("shards", "verify", two / "latents") == 0


@pytest.mark.slow
def test_two_processes_encode_every_sample_as_the_experiments_are(two, latents):
    """Without use_distributed_sampler: false, which the experiments do not set either."""
    assert samples_of(two / "as_shipped").keys() == samples_of(latents / "wan").keys()


@pytest.mark.slow
def test_two_processes_find_the_same_reference_errors(two, cache):
    one, other = (safetensors.torch.load_file(folder / "reference.safetensors") for folder in (cache, two / "errors"))
    assert torch.equal(one["seeds"], other["seeds"])
    torch.testing.assert_close(one["errors"], other["errors"], rtol=0, atol=1e-6)
    assert json.loads((cache / "reference.json").read_text()) == json.loads(
        (two / "errors" / "reference.json").read_text()
    )


@pytest.mark.slow
def test_two_processes_generate_the_same_videos(two, generated):
    alike(videos_of(two / "videos"), videos_of(generated))
    assert call("shards", "verify", two / "videos") == 0


@pytest.mark.slow
def test_a_mistake_met_by_the_second_process_is_told(generators, tmp_path):
    with ShardWriter(tmp_path / "videos", "videos") as writer:
        for key, frames in (("good", 9), ("short", 5)):
            writer.write(key, {"": noise_video(frames, frames)}, {"prompt": "a video"})
    config = encode_config(tmp_path / "e.yaml", generators / "ltx", tmp_path / "videos", tmp_path / "out")
    done = two_processes(tmp_path, ["predict", "--config", config, *SHARED])
    assert done.returncode and done.stderr.count("key 'short'") == 1 and "Traceback" not in done.stderr


@pytest.mark.slow
def test_two_processes_say_once_where_the_videos_are(two):
    assert (two / "stdout.txt").read_text().count("videos in") == 1


@pytest.mark.slow
def test_two_processes_find_the_same_win_rates(two, won):
    one, other = (json.loads((run / "win_rate.json").read_text()) for run in (won.run, two / "run" / "version_0"))
    assert one["drift"] == pytest.approx(other["drift"], rel=1e-4)
    for column in COLUMNS:
        for key, value in one["columns"][column].items():
            assert other["columns"][column][key] == pytest.approx(value, abs=1e-4), (column, key)
