"""`videoalign demo`: the whole paper in miniature, from rendered clips to aligned and guided generators.

Every stage is an ordinary command of this package, and leaves a folder or file; a stage whose result is there is not
repeated. Two tracks run side by side, the reward model's in this process, the generator's in another one: both together
are the closed loop that follows them.
"""

import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import VideoAlignError
from ..callbacks.prompt_sampler import Sampling
from ..callbacks.reward_bench import bar_chart, table
from ..datamodules.benchmark import Benchmark
from ..datamodules.frames import encode_frames
from ..datamodules.latents import Weights
from ..datamodules.oracle import Oracle, autoencoded
from ..datamodules.rated_samples import rate_benchmark, rate_pairs
from ..datamodules.shards import ShardSet
from ..datamodules.sprites import CONTENTS, FPS, FRAMES, SIZE
from ..datamodules.world import GENERATED, WorldSize, ceiling, write_world
from ..models.files import new_folder, read_json, write_json
from ..models.generator import load_generator
from ..models.guidance import Guidance
from ..models.miniature import make_qwen
from ..models.miniature_generators import make_generator
from ..models.sampling import FrameSampling
from .bench import measure
from .compare import Arm, Sweep, compare
from .demo_page import write_page
from .experiment import quiet, run
from .inference import Source, generate
from .pairs_from_rewards import pairs_from_rewards

FRAME_SAMPLING, FACTOR = FrameSampling(fps=8.0, min_pixels=0), 16
"""Of experiments/sprites: the clips' own frame rate and size, in patches of 8 pixels merged by two."""
BENCHMARKS = ("recent", "older")
STEPS = 12
"""Of the sampler."""


@dataclass(frozen=True, kw_only=True)
class DemoSize:
    """How long everything is trained and how much is sampled; the defaults take sixteen minutes on two cores."""

    world: WorldSize = field(default_factory=WorldSize)
    """What is rendered."""
    captions: int = 900
    """Steps of caption pre-training."""
    reward: int = 800
    """Steps of the reward model."""
    generated: int = 250
    """Further steps on pairs of generated clips."""
    autoencoder: int = 420
    """Steps of the autoencoder."""
    generator: int = 1500
    """Steps of the generator."""
    noisy: int = 300
    """Steps of the reward on noisy latents."""
    align: int = 120
    """Steps of each alignment algorithm."""
    samples: int = 16
    """Videos per prompt that annotators rate pairs of."""
    rated: int = 900
    """Rated pairs of them."""
    fresh: int = 8
    """Videos per prompt that the generator is aligned on."""
    judged: int = 8
    """Noises per prompt in the final comparison."""


class Demo:
    """One demo folder.

    Args:
        out: folder of all results. size: how much. seed: of world, weights and training. progress: called with what is done,
            how many of how many.
    """

    def __init__(self, out: str | Path, size: DemoSize, seed: int, progress: Callable[[str, int, int], None]) -> None:
        self.out, self.size, self.seed, self.progress = Path(out).resolve(), size, seed, progress
        self.started = time.time()

    # --- stages -----------------------------------------------------------------------------------------------

    def stage(self, result: str, text: str) -> bool:
        """Announce a stage; whether its result is still to be made."""
        there = (self.out / result).exists()
        print(f"[{time.time() - self.started:4.0f} s] {text}" + (": done before" if there else ""), flush=True)
        return not there

    def fit(self, experiment: str, *overlays: str, **settings: Any) -> Any:
        """Run one of experiments/sprites with paths inside the folder; ``__`` in a name stands for a dot."""
        given = {
            "seed_everything": self.seed,
            "trainer.logger.init_args.save_dir": self.out / "tensorboard",
            "data.init_args.seed": self.seed,
        }
        given |= {name.replace("__", "."): value for name, value in settings.items()}
        configs = [
            part for name in (experiment, *overlays) for part in ("--config", f"experiments/sprites/{name}.yaml")
        ]
        return run(["fit", *configs, *(f"--{key}={value}" for key, value in given.items())])

    def export_of(self, cli: Any, name: str) -> None:
        """Give a run's export its place."""
        (Path(cli.trainer.log_dir) / "export").rename(self.out / name)

    def encode(self, data: str, latents: str, generator: str) -> None:
        """A set as latents."""
        run(["predict", "--config", "experiments/sprites/encode.yaml", f"--model.init_args.generator={self.out / generator}",
             f"--data.init_args.data={self.out / data}", f"--data.init_args.out={self.out / latents}"])  # fmt: skip

    def sample(self, prompts: str, out: str, samples: int, draw: int) -> None:
        """Videos of the base generator without guidance: guided ones would teach the guidance."""
        generate(
            {"generator": str(self.out / "generator"), "num_frames": FRAMES, "height": SIZE, "width": SIZE, "fps": FPS, "steps": STEPS},
            {"prompts": str(self.out / "world" / prompts), "out": str(self.out / out), "samples": samples, "batch_size": 32,
             "seed": 1000 * self.seed + draw}, "cpu", 1,
        )  # fmt: skip

    # --- tracks -----------------------------------------------------------------------------------------------

    def reward_track(self, pool: ProcessPoolExecutor) -> None:
        """Backbone and reward model, on rendered clips."""
        out, size = self.out, self.size
        for name in ("train", "captions"):
            if self.stage(f"frames/{name}", f"decoding the clips once: {name}"):
                shards = ShardSet(out / "world" / name)
                for done in encode_frames(shards, out / "frames" / name, FRAME_SAMPLING, FACTOR, pool):
                    self.progress("samples decoded", done, shards.index.samples)
        if self.stage("random", "making a miniature Qwen2-VL with random weights"):
            make_qwen(out / "random", corpus=[content.prompt for content in CONTENTS], seed=self.seed)
        if self.stage("backbone", "caption pre-training, the stand-in for pre-trained weights"):
            self.fit("captions", model__init_args__backbone=out / "random", model__init_args__out=out / "backbone",
                     data__init_args__data=out / "frames/captions", trainer__max_steps=size.captions)  # fmt: skip
        if self.stage(
            "reward_rendered", "training the reward model on rated pairs (Bradley-Terry with ties, separate tokens)"
        ):
            checkpoints = sorted((out / "tensorboard/reward_btt").glob("*/checkpoints/last.ckpt"), key=os.path.getmtime)
            resumed = {"ckpt_path": checkpoints[-1]} if checkpoints else {}
            cli = self.fit(
                "reward_btt", model__init_args__network__init_args__backbone=out / "backbone", trainer__max_steps=size.reward,
                trainer__val_check_interval=max(1, size.reward // 4), data__init_args__train=out / "frames/train",
                data__init_args__val=out / "world/val",
                data__init_args__benchmarks={n: str(out / "world" / n) for n in BENCHMARKS}, **resumed,
            )  # fmt: skip
            self.export_of(cli, "reward_rendered")

    def generator_track(self) -> None:
        """Autoencoder and generator, on good and flawed clips; samples, and what annotators say of them."""
        out, size = self.out, self.size
        if self.stage("random_wan", "generator: making a miniature Wan pipeline with random weights"):
            make_generator(
                out / "random_wan",
                "wan",
                [c.prompt for c in CONTENTS],
                hidden=128,
                layers=4,
                max_tokens=16,
                seed=self.seed,
            )
        if self.stage("encoder", "generator: training its autoencoder"):
            self.fit("autoencoder", model__init_args__generator=out / "random_wan", model__init_args__out=out / "encoder",
                     data__init_args__data=out / "world/clips", trainer__max_steps=size.autoencoder)  # fmt: skip
        if self.stage("oracle.json", "generator: calibrating the oracle on renders behind that autoencoder"):
            eyes = autoencoded(load_generator(str(out / "encoder"), parts=("vae", "transformer")))
            Oracle.calibrated(eyes, GENERATED, seed=self.seed).save(out / "oracle.json")
        if self.stage("latents/clips", "generator: encoding the clips"):
            self.encode("world/clips", "latents/clips", "encoder")
        if self.stage("generator", "generator: flow matching from scratch"):
            cli = self.fit("generator", model__init_args__generator=out / "encoder", data__init_args__train=out / "latents/clips",
                     trainer__max_steps=size.generator)  # fmt: skip
            self.export_of(cli, "generator")
        oracle = Oracle.load(out / "oracle.json")
        for draw, (prompts, name) in enumerate((("prompts.txt", "rated"), ("unseen.txt", "benchmark"))):
            if self.stage(f"samples/{name}", f"generator: sampling videos for annotators ({name})"):
                self.sample(prompts, f"samples/{name}", size.samples, draw)
        if self.stage("rated", "annotators rate pairs of generated videos"):
            with new_folder(out / "rated") as folder:
                rate_pairs(ShardSet(out / "samples/rated"), oracle, folder, size.rated, size.rated // 9,
                           ShardSet(out / "world/train"), size.rated, self.seed)  # fmt: skip
        if self.stage("generated", "annotators rate pairs of generated videos of unseen prompts: a benchmark"):
            rate_benchmark(ShardSet(out / "samples/benchmark"), oracle, out / "generated", size.rated, self.seed)

    # --- the closed loop --------------------------------------------------------------------------------------

    def loop(self) -> None:
        """From a reward model and a generator to better generators."""
        out, size = self.out, self.size
        if self.stage("reward", "training the reward model on, with rated pairs of generated videos"):
            cli = self.fit(
                "reward_generated", model__init_args__network__init_args__folder=out / "reward_rendered",
                data__init_args__train=out / "rated/train", data__init_args__val=out / "rated/val", trainer__max_steps=size.generated, trainer__val_check_interval=max(1, size.generated // 2),
            )  # fmt: skip
            self.export_of(cli, "reward")
        for name in ("reward_rendered", "reward"):
            if self.stage(f"bench_{name}", f"benchmarking it: {name}"):
                with new_folder(out / f"bench_{name}") as folder:
                    sets = [str(out / "world" / n) for n in BENCHMARKS] + [str(out / "generated")]
                    found = dict(measure(Source(model=str(out / name)), sets, str(folder / "scores"), 48, 1, "cpu"))
                    write_json(folder / "accuracies.json", {n: result["accuracies"] for n, result in found.items()})
        if self.stage("samples/fresh", "sampling fresh videos to align on"):
            self.sample("prompts.txt", "samples/fresh", size.fresh, 2)
        if self.stage("preferred", "the reward model labels their pairs"):
            pairs_from_rewards(Source(model=str(out / "reward")), str(out / "samples/fresh"), str(out / "preferred"), "margin",
                               Weights(), 0.3, 48, 1, "cpu", 1)  # fmt: skip
        for name, data in (("preferred", "preferred"), ("fresh", "samples/fresh")):
            if self.stage(f"latents/{name}", f"encoding: {name}"):
                self.encode(data, f"latents/{name}", "generator")
        self.alignments()
        if self.stage("compared/comparison.json", "everything side by side, on prompts that nothing was trained on"):
            sampling = Sampling(
                num_frames=FRAMES,
                height=SIZE,
                width=SIZE,
                fps=FPS,
                steps=STEPS,
                guidance=2.0,
                batch_size=32,
                seed=self.seed,
            )
            noisy, strengths = str(out / "noisy_reward"), [0.0, 1.0, 3.0, 10.0, 30.0, 100.0]
            with contextlib.redirect_stdout(None):
                compare(
                    str(out / "generator"), str(out / "world/unseen.txt"), str(out / "compared"), sampling, size.judged,
                    str(out / "reward"), str(out / "oracle.json"), {name: Arm(lora=str(out / name)) for name in ALIGNED},
                    {"nrg": Sweep(reward=noisy, strengths=strengths),
                     "nrg-text": Sweep(reward=noisy, strengths=strengths, guide=Guidance(weights={"TA": 1.0}))}, 1, "cpu",
                )  # fmt: skip

    def alignments(self) -> None:
        """All alignment algorithms and the noisy reward: independent of each other, so as many at once as there are cores."""
        todo = [name for name, (_, text) in {**ALIGNED, "noisy_reward": ((), "the reward on noisy latents (Flow-NRG)")}.items()
                if self.stage(name, f"training {text}")]  # fmt: skip
        with _pool(len(todo)) as pool:
            for name, job in [(name, pool.submit(_align, self.out, self.size, self.seed, name)) for name in todo]:
                if error := job.result():
                    raise VideoAlignError(f"training {name} failed: {error}")


ALIGNED: dict[str, tuple[tuple[str, ...], str]] = {
    "control": (("flow_sft",), "SFT on samples that nobody selected (the control)"),
    "sft": (("flow_sft",), "SFT on the preferred samples"),
    "rwr": (("flow_sft", "flow_rwr"), "Flow-RWR"),
    "dpo": (("flow_sft", "flow_dpo"), "Flow-DPO, constant beta"),
    "dpo-time": (("flow_sft", "flow_dpo_time"), "Flow-DPO, beta (1 - t)^2"),
}
"""Arms by name: their experiments, and what they are."""


def _pool(work: int) -> ProcessPoolExecutor:
    """Processes of their own for work that computes."""
    return ProcessPoolExecutor(max(1, min(work, os.cpu_count() or 1)), multiprocessing.get_context("spawn"))


def _align(out: Path, size: DemoSize, seed: int, name: str) -> str | None:
    """Train one of the loop's models; in a process of its own. Returns what went wrong."""
    with _into(out / "logs" / f"{name}.log"):
        torch.set_num_threads(1)
        demo = Demo(out, size, seed, lambda *place: None)
        latents, common = out / "latents", {"model__init_args__generator": out / "generator"}
        if name == "noisy_reward":
            cli = demo.fit("noisy_reward", trainer__max_steps=size.noisy, trainer__val_check_interval=max(1, size.noisy // 2),
                           data__init_args__train=latents / "preferred", data__init_args__val=latents / "preferred", **common)  # fmt: skip
        else:
            train = latents / ("fresh" if name == "control" else "preferred")
            cli = demo.fit(*ALIGNED[name][0], data__init_args__train=train, trainer__max_steps=size.align,
                           trainer__logger__init_args__name=name, **common)  # fmt: skip
        demo.export_of(cli, name)
        return None


@contextlib.contextmanager
def _into(log: Path) -> Iterator[None]:
    """Everything printed goes into a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", buffering=1) as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
        quiet()
        yield


def _generator_track(out: Path, size: DemoSize, seed: int, started: float) -> None:
    """In a process of its own; stages are printed, the rest goes to a log."""
    demo, printed = Demo(out, size, seed, lambda *place: None), sys.stdout
    demo.started = started

    def stage(result: str, text: str) -> bool:
        with contextlib.redirect_stdout(printed):
            return Demo.stage(demo, result, text)

    demo.stage = stage  # type: ignore[method-assign]
    torch.set_num_threads(1)
    with _into(out / "logs" / "generator.log"):
        demo.generator_track()


def demo(
    out: str | Path, seed: int, progress: Callable[[str, int, int], None], size: DemoSize | None = None
) -> dict[str, Any]:
    """Run everything; print the tables and where the report is.

    Args:
        out: folder of all results; finished stages in it are not repeated. seed: of everything. progress: called with what is
            done, how many of how many. size: how much.

    Returns:
        Accuracies by reward model, benchmark and column, and what was compared.
    """
    quiet()
    # Half of the cores compute in each track: threads of one operation that wait for each other's core are slow.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    whole = Demo(out, size or DemoSize(), seed, progress)
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        if whole.stage(
            "world", "rendering the world: rated pairs, two benchmarks, captioned clips, a generator's clips"
        ):
            for place in write_world(whole.out / "world", whole.size.world, seed, pool):
                progress(*place)
        with _pool(1) as other:
            track = other.submit(_generator_track, whole.out, whole.size, seed, whole.started)
            whole.reward_track(pool)
            try:
                track.result()
            except VideoAlignError as error:
                raise VideoAlignError(
                    f"the generator's track failed: {error} (see {whole.out / 'logs/generator.log'})"
                ) from None
    whole.loop()
    return _report(whole)


def _report(whole: Demo) -> dict[str, Any]:
    out = whole.out
    found = {
        name: read_json(out / f"bench_{name}/accuracies.json", "a finished demo")
        for name in ("reward_rendered", "reward")
    }
    ceilings = {name: ceiling(Benchmark(out / "world" / name)) for name in BENCHMARKS}
    ceilings["generated"] = ceiling(Benchmark(out / "generated"))
    for name, best in ceilings.items():
        print(
            f"\nbenchmark: {name} (accuracy; ceiling: a judge that knows the true qualities)\n{table(found['reward'][name], best)}"
        )
        bar_chart(name, found["reward"][name], best).savefig(out / f"{name}.png", dpi=110)
    print(f"\n{(out / 'compared/comparison.md').read_text()}")
    compared = read_json(out / "compared/comparison.json", "a finished demo")
    page = write_page(out, found, ceilings, compared)
    print(f"report         {page}   (open it in a browser)"
          f"\nreward model   {out / 'reward'}   (videoalign score --model {out / 'reward'} --video V.mp4 --prompt \"...\")"
          f"\ngenerator      {out / 'generator'}, adapters {out / 'dpo'}"
          f"\ncurves         tensorboard --logdir {out}   then open http://localhost:6006"
          f"\n{time.time() - whole.started:.0f} seconds")  # fmt: skip
    return {"accuracies": found, "compared": compared}
