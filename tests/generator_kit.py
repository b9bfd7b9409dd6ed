"""What the tests around generator alignment share: clips, latents, a judge, trainings, configurations."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers import QUIET, call, flags
from videoalign.callbacks import EMA
from videoalign.callbacks.run_media import Media
from videoalign.commands.lightning_cli import run as experiment
from videoalign.datamodules.encode_list import ClipSize
from videoalign.datamodules.shards import ShardSet, ShardWriter
from videoalign.datamodules.video import decode, encode
from videoalign.miniature.networks.pipelines import make_generator
from videoalign.models import VideoReward

PROMPTS = ["a red circle moves left to right", "a blue square", "a red circle moves left to right", "a video"]
CLIP = {"num_frames": 5, "height": 32, "width": 32, "fps": 4.0}
SIZE = {"num_frames": 5, "height": 32, "width": 32, "fps": 8, "steps": 2}
FAMILIES = ["wan", "ltx"]
COLUMNS = ["VQ", "MQ", "TA", "Overall"]
ALIGNMENT, CALLBACKS = "videoalign.alignment", "videoalign.callbacks"
DATA = "videoalign.datamodules"


def noise_video(seed: int, frames: int = 9, height: int = 40, width: int = 48) -> bytes:
    """Blocks of random colours, which a lossy codec keeps apart."""
    blocks = np.random.default_rng(seed).integers(0, 255, (frames, height // 8, width // 8, 3), dtype=np.uint8)
    return encode(blocks.repeat(8, 1).repeat(8, 2), 8)


def save_yaml(path: Path, config: dict) -> Path:
    path.write_text(yaml.safe_dump(json.loads(json.dumps(config, default=str))))
    return path


def node(name: str, /, **init_args) -> dict:
    return {"class_path": name, "init_args": init_args}


TRAINER = {**QUIET, "callbacks": []}


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
    steps = {"default_root_dir": path.parent, "max_steps": 2, "callbacks": list(callbacks)}
    sets = {"train": latents, "val": latents, "batch_size": 2, "workers": 0, "shuffle_buffer": 0}
    config = {
        "trainer": {**TRAINER, **steps, **(trainer or {})},
        "model": node(f"{ALIGNMENT}.FlowDPO", **settings),
        "data": node(f"{DATA}.latents.LatentPairs", **{**sets, **(data or {})}),
    }
    return save_yaml(path, config)


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
    """Let a function fail at its call number ``count`` + 1; returns the list of its calls."""
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


@pytest.fixture(scope="session")
def generators(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generators")
    for family in FAMILIES:
        make_generator(folder / family, family, hidden=48, layers=1)
    make_generator(folder / "wan_other", "wan", hidden=48, layers=1, seed=1)
    return folder


@pytest.fixture(scope="session")
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
                "scores": {side: {"VQ": 1.0 + i, "MQ": 3.0, "TA": 2.0} for side in "AB"},
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


@pytest.fixture(scope="session")
def latents(tmp_path_factory, generators, clips) -> Path:
    """Encoded sets: pairs for Wan and for LTX, videos for Wan."""
    folder = tmp_path_factory.mktemp("latents")
    for name, family, of in (("wan", "wan", "pairs"), ("ltx", "ltx", "pairs"), ("videos", "wan", "videos")):
        out = folder / name
        experiment(["predict", "--config", str(encode_config(folder / "e.yaml", generators / family, clips / of, out))])
    return folder


@pytest.fixture(scope="session")
def judge(tmp_path_factory, backbone, sampling) -> Path:
    """A reward model with statistics of its own."""
    folder = tmp_path_factory.mktemp("judge") / "model"
    torch.manual_seed(0)
    network = VideoReward(backbone, template="plain", sampling=sampling, language="full")
    network.statistics.mean, network.statistics.std = [0.1, -0.2, 0.3], [0.5, 0.25, 2.0]
    network.save_pretrained(folder)
    return folder


def in_the_way(folder: Path) -> Path:
    (folder / "out").mkdir()
    (folder / "out" / "notes.txt").write_text("precious")
    return folder / "out"


@pytest.fixture(scope="session")
def cache(tmp_path_factory, generators, latents) -> Path:
    """Cached reference errors of two draws."""
    folder = tmp_path_factory.mktemp("cache")
    config = reference_config(folder / "r.yaml", generators / "wan", latents / "wan", folder / "errors")
    experiment(["predict", "--config", str(config)])
    return folder / "errors"


def generate(generators: Path, out: Path, prompts: Path, *options, family: str = "wan") -> int:
    given = {"generator": generators / family, "prompts": prompts, "out": out, "samples": 2, **SIZE}
    return call("generate", *flags(**given, device="cpu", source="mine"), *options)


@pytest.fixture(scope="session")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(dict.fromkeys(PROMPTS)) + "\n")
    return path


@pytest.fixture(scope="session")
def generated(tmp_path_factory, generators, prompts) -> Path:
    """Videos of three prompts, two samples each, sampled four at a time with seed 7."""
    out = tmp_path_factory.mktemp("generated") / "set"
    assert generate(generators, out, prompts, "--seed", 7, "--batch-size", 4) == 0
    return out


def videos_of(folder: Path) -> dict[tuple[str, int], torch.Tensor]:
    """Frames by prompt and seed."""
    whole = ClipSize(num_frames=5, height=32, width=32)
    return {(r.record()["prompt"], r.record()["seed"]): decode(r.members["mp4"], whole, 1) for r in ShardSet(folder)}


def alike(one: dict, other: dict) -> None:
    """Assert that videos agree up to rounding: sums in another order change a pixel by a level now and then."""
    assert one.keys() == other.keys()
    for key, video in one.items():
        assert apart(video, other[key]) < 0.2, key


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean difference, in levels of brightness."""
    return float((one.int() - other.int()).abs().float().mean())


def win_rate_config(path, generator, latents, judge, prompts, samples=2, trainer=None, **sampling) -> Path:
    sampling = {**SIZE, "batch_size": 3, "seed": 5, **sampling}
    callback = node(f"{CALLBACKS}.WinRate", reward_model=judge, prompts=prompts, samples=samples, sampling=sampling)
    return flow_config(path, generator, latents, [node(f"{CALLBACKS}.EMA"), callback], trainer=trainer, fps=8.0)


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"tensors": 0, "images": 0, "scalars": 0})
    return found.Reload()


@pytest.fixture(scope="session")
def won(tmp_path_factory, trained, generators, latents, judge, prompts) -> SimpleNamespace:
    """`videoalign test` of a checkpoint's average, with guidance."""
    folder = tmp_path_factory.mktemp("won")
    wan, trainer = (generators / "wan", latents / "wan"), {"logger": logger(folder)}
    config = win_rate_config(folder / "w.yaml", *wan, judge, prompts, cfg_scale=2.0, trainer=trainer)
    assert call("test", "--config", config, "--ckpt_path", trained["wan"].checkpoint) == 0
    return SimpleNamespace(config=config, run=folder / "run" / "version_0")


@pytest.fixture(scope="session")
def trained(tmp_path_factory, generators, latents) -> dict[str, SimpleNamespace]:
    """Some steps of Flow-DPO with an average, samples at every second step, an export, a checkpoint."""
    runs, shown, add = {}, [], Media.clip

    def recording(media, tag, clip):
        shown.append(clip.sides)
        add(media, tag, clip)

    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(f"trained_{family}")
        callbacks = [
            node(f"{CALLBACKS}.EMA", decay=0.5),
            node(f"{CALLBACKS}.ExportGenerator", out=folder / "export"),
            node(f"{CALLBACKS}.SideBySide", prompts=PROMPTS[:1], sampling={**SIZE, "seed": 5, "fps": 25}),
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
            patch.setattr(Media, "clip", recording)
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
