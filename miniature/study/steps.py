"""What one seed's units do: the commands of this package, called on paths inside the seed's folder."""

import math
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from ...callbacks.checkpoint_io import read_checkpoint
from ...commands.benchmarking import measure
from ...commands.generating import generate
from ...commands.lightning_cli import run
from ...commands.preference_pairs import pairs_from_rewards
from ...commands.reward_judge import RewardJudge
from ...datamodules.frames import encode_frames
from ...datamodules.judgements import Weights
from ...datamodules.parallel import pool
from ...datamodules.shards import ShardSet
from ...models.files import new_folder, write_json
from ...models.frame_sampling import FrameSampling
from ...models.generator_folder import load_generator
from ...models.renames import move
from ..networks.pipelines import make_generator
from ..networks.qwen import make_qwen
from ..world.oracle import Oracle, autoencoded, rank_correlations
from ..world.rated_samples import rate_benchmark, rate_pairs
from ..world.rendered_sets import GENERATED, held_out_clips, write_world
from ..world.sprites import FPS, FRAMES, SCENES, SIZE
from .configured import Settings, arguments
from .loop_size import LoopSize

FRAME_SAMPLING, PATCH = FrameSampling(fps=8.0, min_pixels=0), 16
"""Frame sampling of experiments/sprites: the clips' own frame rate and size, in patches that are merged by two. A whole
picture is one token, so that the language model compares places along time only."""
CLIPS = {"num_frames": FRAMES, "height": SIZE, "width": SIZE, "fps": FPS, "steps": 12}
"""Options of sampling that every generator of the world shares."""

DESCRIBED = 0.94
"""Share of wrong sentences that a backbone knows from true ones on held-out clips, from which on it is good enough. The
best reach 0.99, and seeds are to lie within 0.05 of each other."""
START = 10_000
"""What is added to a seed for other random weights."""
HELD_OUT = 3
"""Prompts, of the generator's 24, whose rated clips validate the reward model and never train it."""


class Steps:
    """Everything that a unit of one seed can do; each method leaves one result in the seed's folder.

    Args:
        out: Folder of all results.
        size: How much is trained and sampled.
        seed: Seed of world, weights and training.
        place: Folder of this seed under ``out``, if it is not ``out`` itself.
    """

    def __init__(self, out: Path, size: LoopSize, seed: int, place: str = "") -> None:
        self.out, self.size, self.seed = out, size, seed
        self.place = f"{place}/" if place else ""
        self.folder = out / place

    # --- trainings --------------------------------------------------------------------------------------------

    def settings(self, result: str, settings: Settings, export: bool = True) -> Settings:
        """Settings of a training with those that every unit has: seeds, and where its curves and its result go.

        Args:
            result: Name of the result, and of the run in TensorBoard.
            settings: The unit's own settings, which override the common ones.
            export: Whether a callback exports the result; else the module writes it to ``out``.
        """
        common = {
            "seed_everything": self.seed,
            "trainer.logger.init_args.save_dir": self.folder / "tensorboard",
            "trainer.logger.init_args.name": result,
            "data.init_args.seed": self.seed,
        }
        return {**common, **settings, **({} if export else {"model.init_args.out": self.folder / result})}

    def fit(self, result: str, experiments: Sequence[str], settings: Settings, export: bool = True) -> None:
        """Train; a run that was stopped goes on.

        Args:
            result: Folder of the trained model.
            experiments: Names of files in experiments/sprites.
            settings: All settings, see :meth:`settings`.
            export: Whether a callback exports the result; else the module writes it itself.
        """
        runs, steps = self.folder / "tensorboard" / result, settings.get("trainer.max_steps", math.inf)
        checkpoints = sorted(runs.glob("*/checkpoints/last.ckpt"), key=os.path.getmtime)
        # a checkpoint of the last step would be exported as it is, without the validation that follows it
        if checkpoints and read_checkpoint(checkpoints[-1], mmap=True)["global_step"] < steps:
            settings = {**settings, "ckpt_path": checkpoints[-1]}
        cli = run(arguments(experiments, settings))
        if export:
            (self.folder / result).parent.mkdir(parents=True, exist_ok=True)
            move(Path(cli.trainer.log_dir) / "export", self.folder / result)
            shutil.rmtree(Path(cli.trainer.log_dir) / "checkpoints", ignore_errors=True)

    def teach(self, result: str, experiments: Sequence[str], settings: Settings) -> None:
        """Caption pre-training from random weights, and from other ones while held-out clips are described badly.

        Some random weights learn colours and directions, but no shapes, and more steps do not mend it. If none of
        ``size.starts`` reaches :data:`DESCRIBED`, the best is kept.

        Args:
            result: Folder of the trained model.
            experiments: Names of files in experiments/sprites.
            settings: All settings, see :meth:`settings`.
        """
        tries, found = self.folder / f"{result}-starts", {}
        shutil.rmtree(tries, ignore_errors=True)  # of a unit that was stopped
        for start in range(self.size.starts):
            place = f"{result}-starts/{start}"
            changed = {**settings, "model.init_args.out": self.folder / place}
            if start:
                seed = self.seed + START * start
                self.random_qwen(f"{place}-random", seed=seed)
                random = self.folder / f"{place}-random"
                changed |= {"model.init_args.backbone": random, "seed_everything": seed, "data.init_args.seed": seed}
            metrics = run(arguments(experiments, changed)).trainer.callback_metrics
            found[place] = float(metrics.get("val/describes", 1.0))  # nothing is held out of a set of a few clips
            print(f"random weights {start + 1} of at most {self.size.starts}: val/describes {found[place]:.3f}")
            if found[place] >= DESCRIBED:
                break
        move(self.folder / max(found, key=found.__getitem__), self.folder / result)
        shutil.rmtree(tries)

    # --- videos, latents, pairs, benchmarks -------------------------------------------------------------------

    def encode(self, result: str, data: str, generator: str = "generator") -> None:
        """Encode a set as latents.

        Args:
            result: Folder of the latents.
            data: Set of videos or pairs.
            generator: Pipeline whose autoencoder encodes.
        """
        settings = {
            "model.init_args.generator": self.folder / generator,
            "data.init_args.data": self.folder / data,
            "data.init_args.out": self.folder / result,
        }
        given = [f"--{key}={value}" for key, value in settings.items()]
        run(["predict", "--config", "experiments/sprites/encode.yaml", *given])

    def sample(self, result: str, prompts: str, samples: int, draw: int, cfg_scale: float = 1.0) -> None:
        """Sample videos of the generator before alignment.

        Args:
            result: Folder of the videos.
            prompts: File of prompts in the world's folder.
            samples: Videos per prompt.
            draw: Number of this draw: every draw has noise of its own.
            cfg_scale: Classifier-free guidance scale; 1 turns it off, because guided samples would teach the guidance.
        """
        generator = {"generator": str(self.folder / "generator"), **CLIPS, "cfg_scale": cfg_scale}
        data = {
            "prompts": str(self.folder / "world" / prompts),
            "out": str(self.folder / result),
            "samples": samples,
            "batch_size": 32,
            "seed": 1000 * self.seed + draw,
        }
        generate(generator, data, "cpu", 1)

    def prefer(
        self, result: str, samples: str, mode: str, weights: Weights, margin: float, judge: str = "reward"
    ) -> None:
        """Label pairs of samples by a reward model.

        Args:
            result: Folder of the pairs.
            samples: Set of videos.
            mode: Which pairs of a prompt's videos: ``best-worst`` or ``margin``.
            weights: Weights of the dimensions in the comparison.
            margin: Least difference of the weighted rewards, at least 0, in standard deviations.
            judge: Folder of the reward model.
        """
        model = RewardJudge(model=str(self.folder / judge), batch_size=48, device="cpu")
        data, out = str(self.folder / samples), str(self.folder / result)
        pairs_from_rewards(model, data, out, mode, weights, margin)
        shutil.rmtree(self.folder / f"{result}.rewards")  # should the pairs be made again, it is by another judge

    def bench(self, result: str, model: str, sets: Iterable[str]) -> None:
        """Measure the accuracies of a reward model by benchmark and column.

        Args:
            result: Folder of ``accuracies.json`` and of the rewards.
            model: Folder of the reward model.
            sets: Folders of the benchmarks.
        """
        with new_folder(self.folder / result) as folder:
            data = [str(self.folder / name) for name in sets]
            judge = RewardJudge(model=str(self.folder / model), batch_size=48, device="cpu")
            found = dict(measure(judge, data, str(folder / "scores")))
            write_json(folder / "accuracies.json", {name: result["accuracies"] for name, result in found.items()})

    # --- steps of the miniature world alone -------------------------------------------------------------------

    def render(self) -> None:
        """Render the world."""
        with pool(min(os.cpu_count() or 1, 8)) as workers:  # everything else waits for it
            for _ in write_world(self.folder / "world", self.size.world, self.seed, workers):
                pass

    def decode(self, name: str) -> None:
        """Decode a set of the world once, into frames.

        Args:
            name: Set of the world.
        """
        shards = ShardSet(self.folder / "world" / name)
        for _ in encode_frames(shards, self.folder / "frames" / name, FRAME_SAMPLING, 2 * PATCH, None):
            pass

    def random_qwen(self, result: str = "random", patch: int = PATCH, seed: int | None = None) -> None:
        """Write a miniature Qwen2-VL with random weights.

        Args:
            result: Folder of the model.
            patch: Side of its vision patches in pixels.
            seed: Seed of the weights; this seed's own if not given.
        """
        prompts = [scene.prompt for scene in SCENES]
        make_qwen(self.folder / result, corpus=prompts, patch=patch, seed=self.seed if seed is None else seed)

    def random_wan(self) -> None:
        """Write a miniature Wan pipeline with random weights."""
        prompts = [scene.prompt for scene in SCENES]
        make_generator(self.folder / "random_wan", "wan", prompts, hidden=128, layers=4, max_tokens=16, seed=self.seed)

    def calibrate(self) -> None:
        """Calibrate the oracle on renders that went through the generator's autoencoder."""
        eyes = autoencoded(load_generator(str(self.folder / "encoder"), parts=("vae", "transformer")))
        oracle = Oracle.calibrated(eyes, GENERATED, self.size.calibrated, self.seed)
        oracle.save(self.folder / "oracle.json")

    def check_oracle(self) -> None:
        """Measure how well the oracle ranks renders of known quality, with and without the autoencoder."""
        eyes = autoencoded(load_generator(str(self.folder / "encoder"), parts=("vae", "transformer")))
        videos, prompts, true = held_out_clips(self.size.checked, self.seed)
        plain = Oracle.calibrated(None, GENERATED, self.size.calibrated, self.seed)
        oracle = Oracle.load(self.folder / "oracle.json")
        found = {
            "renders": rank_correlations(plain, videos, prompts, true),
            "behind the autoencoder": rank_correlations(oracle, eyes(videos), prompts, true),
        }
        write_json(self.folder / "oracle_check.json", found)

    def rate(self) -> None:
        """Let annotators rate pairs of generated videos, and shuffle half as many rendered pairs in."""
        samples, rendered = ShardSet(self.folder / "samples/rated"), ShardSet(self.folder / "world/train")
        oracle, count = Oracle.load(self.folder / "oracle.json"), self.size.rated
        with new_folder(self.folder / "rated") as out:
            rate_pairs(samples, oracle, out, count, HELD_OUT, rendered, count // 2, self.seed)

    def rate_unseen(self) -> None:
        """Let annotators rate pairs of generated videos of unseen prompts: a benchmark."""
        samples, oracle = ShardSet(self.folder / "samples/benchmark"), Oracle.load(self.folder / "oracle.json")
        rate_benchmark(samples, oracle, self.folder / "generated", self.size.benchmark_pairs, self.seed)
