"""`videoalign demo`: the whole path in miniature, from rendered clips to a benchmarked reward model.

Every stage is an ordinary command of this package, and leaves a folder; a stage whose folder is there is not repeated,
and an interrupted training goes on from its last checkpoint.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from ..callbacks.reward_bench import bar_chart, table
from ..datamodules.benchmark import Benchmark
from ..datamodules.frames import encode_frames
from ..datamodules.shards import ShardSet
from ..datamodules.sprites import CONTENTS
from ..datamodules.world import WorldSize, ceiling, write_world
from ..models.files import read_json, write_json
from ..models.miniature import make_qwen
from ..models.sampling import FrameSampling
from .bench import measure
from .experiment import quiet, run
from .inference import Source

SAMPLING, FACTOR = FrameSampling(fps=8.0, min_pixels=0), 16
"""Of experiments/sprites: the clips' own frame rate and size, in patches of 8 pixels merged by two."""
BENCHMARKS = ("recent", "older")


def demo(out: str | Path, seed: int, progress: Callable[[str, int, int], None]) -> dict[str, dict]:
    """Render, pre-train, train, benchmark; print the tables and where everything is.

    Args:
        out: folder of all results. seed: of world, weights and training. progress: called with what is done, how many of how many.

    Returns:
        Accuracies by benchmark and column.
    """
    quiet()
    out, started = Path(out), time.monotonic()
    # Half of the cores compute, the others decode: threads of one operation that wait for each other's core are slow.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    world, frames, backbone, reward = out / "world", out / "frames", out / "backbone", out / "reward"

    def stage(folder: Path, text: str) -> bool:
        print(
            f"[{time.monotonic() - started:4.0f} s] {text}" + (": done before" if folder.exists() else ""), flush=True
        )
        return not folder.exists()

    with ProcessPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        if stage(world, "rendering the world: rated pairs, two benchmarks, captioned clips"):
            for place in write_world(world, WorldSize(), seed, pool):
                progress(*place)
        for name in ("train", "captions"):
            if stage(frames / name, f"decoding the clips once: {name}"):
                shards = ShardSet(world / name)
                for done in encode_frames(shards, frames / name, SAMPLING, FACTOR, pool):
                    progress("samples decoded", done, shards.index.samples)
    if stage(out / "random", "making a miniature Qwen2-VL with random weights"):
        make_qwen(out / "random", corpus=[content.prompt for content in CONTENTS], seed=seed)
    if stage(backbone, "caption pre-training, the stand-in for pre-trained weights"):
        _fit("captions", out, seed, {
            "model.init_args.backbone": out / "random", "model.init_args.out": backbone, "data.init_args.data": frames / "captions",
        })  # fmt: skip
    if stage(reward, "training the reward model on rated pairs (Bradley-Terry with ties, separate tokens)"):
        checkpoints = sorted((out / "tensorboard" / "reward_btt").glob("*/checkpoints/last.ckpt"), key=os.path.getmtime)
        cli = _fit("reward_btt", out, seed, {
            "model.init_args.network.init_args.backbone": backbone, "data.init_args.train": frames / "train",
            "data.init_args.val": world / "val", "data.init_args.benchmarks": {n: str(world / n) for n in BENCHMARKS},
            **({"ckpt_path": checkpoints[-1]} if checkpoints else {}),
        })  # fmt: skip
        (Path(cli.trainer.log_dir) / "export").rename(reward)
    if stage(out / "accuracies.json", "benchmarking it: each video once, the pairs joined on both"):
        sets = [str(world / name) for name in BENCHMARKS]
        found = dict(measure(Source(model=str(reward)), sets, str(out / "bench"), 48, 1, "cpu"))
        write_json(out / "accuracies.json", {name: result["accuracies"] for name, result in found.items()})
    return _report(out, time.monotonic() - started)


def _fit(experiment: str, out: Path, seed: int, settings: dict) -> object:
    """Run one of experiments/sprites with paths inside ``out``."""
    settings = {
        "seed_everything": seed,
        "trainer.logger.init_args.save_dir": out / "tensorboard",
        "data.init_args.seed": seed,
        **settings,
    }
    return run(
        [
            "fit",
            "--config",
            f"experiments/sprites/{experiment}.yaml",
            *(f"--{key}={value}" for key, value in settings.items()),
        ]
    )


def _report(out: Path, seconds: float) -> dict[str, dict]:
    results = read_json(out / "accuracies.json", "a finished demo's folder")
    for name in BENCHMARKS:
        best = ceiling(Benchmark(out / "world" / name))
        print(
            f"\nbenchmark: {name} sources (accuracy; ceiling: a judge that knows the true qualities)\n{table(results[name], best)}"
        )
        bar_chart(f"{name} sources", results[name], best).savefig(out / f"{name}.png", dpi=110)
    print(f"\nreward model   {out / 'reward'}   (videoalign score --model {out / 'reward'} --video V.mp4 --prompt \"...\")"
          f"\npictures       {out / 'recent.png'}, {out / 'older.png'}"
          f"\ncurves         tensorboard --logdir {out / 'tensorboard'}   then open http://localhost:6006"
          f"\n{seconds:.0f} seconds")  # fmt: skip
    return results
