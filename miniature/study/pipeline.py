"""The closed loop of the miniature world as units of work: from rendered clips to aligned and guided generators.

Every unit leaves a folder or file; what a command of this package does, a unit does by that command's code and YAML. `videoalign demo` runs them once,
`videoalign paper` for several seeds, with more units that build on these.
"""

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ... import VideoAlignError
from ...callbacks.checkpoint_io import read_checkpoint
from ...callbacks.prompt_sampler import Sampling
from ...commands.arms import VIDEOS, Arm, Sweep, compare, plan, sample_arm
from ...commands.benchmarking import measure
from ...commands.generating import generate
from ...commands.lightning_cli import run
from ...commands.preference_pairs import pairs_from_rewards
from ...commands.reward_judge import RewardJudge
from ...datamodules.frames import encode_frames
from ...datamodules.latents import Weights
from ...datamodules.parallel import pool
from ...datamodules.shards import ShardSet
from ...models.files import new_folder, read_json, write_json
from ...models.frame_sampling import FrameSampling
from ...models.generator_folder import load_generator
from ...models.guidance import Guidance
from ...models.renames import move
from ..networks.pipelines import make_generator
from ..networks.qwen import make_qwen
from ..world.oracle import Oracle, OracleJudge, autoencoded, rank_correlations
from ..world.rated_samples import rate_benchmark, rate_pairs
from ..world.rendered_sets import GENERATED, WorldSize, held_out_clips, write_world
from ..world.sprites import CONTENTS, FPS, FRAMES, SIZE
from .units import Unit

FRAME_SAMPLING, FACTOR = FrameSampling(fps=8.0, min_pixels=0), 16
"""Of experiments/sprites: the clips' own frame rate and size, in patches of 8 pixels merged by two."""
BENCHMARKS = ("recent", "older")
STEPS = 12
"""Of the sampler."""


@dataclass(frozen=True, kw_only=True)
class LoopSize:
    """How long everything is trained and how much is sampled; the defaults take about eleven minutes on two cores."""

    world: WorldSize = field(default_factory=WorldSize)
    """What is rendered."""
    captions: int = 800
    """Steps of caption pre-training."""
    reward: int = 800
    """Steps of the reward model."""
    generated: int = 250
    """Further steps on pairs of generated clips."""
    autoencoder: int = 400
    """Steps of the autoencoder."""
    generator: int = 1000
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
    """Noises per prompt in a comparison."""


def begin(out: Path, made: dict[str, Any]) -> None:
    """Refuse a folder that was begun with other sizes, or another seed: what is in it already could not stand beside the rest.

    Args:
        out: folder of all results. made: what decides them; kept in the folder's ``size.json``.
    """
    record, made = out / "size.json", json.loads(json.dumps(made))
    if not record.exists():
        write_json(record, made)
    elif (found := read_json(record, "a folder of results")) != made:
        other = ", ".join(
            f"{key} {found.get(key)}, here {made.get(key)}"
            for key in {**found, **made}
            if found.get(key) != made.get(key)
        )
        raise VideoAlignError(f"{out} was begun otherwise ({record}: {other}); name another --out")


ALIGNED: dict[str, tuple[tuple[str, ...], str, str]] = {
    "control": (("flow_sft",), "fresh", "SFT on samples that nobody selected (the control)"),
    "sft": (("flow_sft",), "preferred", "SFT on the preferred samples"),
    "rwr": (("flow_sft", "flow_rwr"), "preferred", "Flow-RWR"),
    "dpo": (("flow_sft", "flow_dpo"), "preferred", "Flow-DPO, constant beta"),
    "dpo-time": (("flow_sft", "flow_dpo_time"), "preferred", "Flow-DPO, beta (1 - t)^2"),
}
"""Arms by name: their experiments, latents, and what they are."""


class Loop:
    """The units of one seed.

    Args:
        out: folder of all results. size: how much. seed: of world, weights and training. place: folder of this seed under
            ``out``, if it is not ``out`` itself.
    """

    def __init__(self, out: Path, size: LoopSize, seed: int, place: str = "") -> None:
        self.out, self.size, self.seed = out, size, seed
        self.place = f"{place}/" if place else ""
        self.folder = out / place

    # --- what a unit consists of ------------------------------------------------------------------------------

    def unit(
        self, result: str, text: str, cost: float, needs: Iterable[str], run: Any, *args: Any, **kwargs: Any
    ) -> Unit:
        """A unit with names relative to this seed's folder; ``run`` is called with the arguments."""
        needs = tuple(self.place + need for need in needs)
        return Unit(self.place + result, text, partial(run, *args, **kwargs), needs, cost)

    def fit(self, result: str, experiments: Iterable[str], export: bool = True, **settings: Any) -> None:
        """Run experiments/sprites with paths inside the folder; ``__`` in a name stands for a dot.

        Args:
            result: name of the run in TensorBoard. export: its export becomes the folder of that name.
        """
        if not export:
            settings["model__init_args__out"] = self.folder / result
        logs = self.folder / "tensorboard"
        given = {
            "seed_everything": self.seed,
            "trainer.logger.init_args.save_dir": logs,
            "trainer.logger.init_args.name": result,
            "data.init_args.seed": self.seed,
        }
        checkpoints = sorted((logs / result).glob("*/checkpoints/last.ckpt"), key=os.path.getmtime)
        steps = settings.get("trainer__max_steps", math.inf)
        # of a run that was stopped; one at the last step would be exported as it is, without the validation that follows it
        if checkpoints and read_checkpoint(checkpoints[-1], mmap=True)["global_step"] < steps:
            given["ckpt_path"] = checkpoints[-1]
        given |= {name.replace("__", "."): value for name, value in settings.items()}
        configs = [part for name in experiments for part in ("--config", f"experiments/sprites/{name}.yaml")]
        cli = run(["fit", *configs, *(f"--{key}={value}" for key, value in given.items())])
        if export:
            (self.folder / result).parent.mkdir(parents=True, exist_ok=True)
            move(Path(cli.trainer.log_dir) / "export", self.folder / result)
            shutil.rmtree(Path(cli.trainer.log_dir) / "checkpoints", ignore_errors=True)

    def align(self, result: str, experiments: Iterable[str], latents: str, **settings: Any) -> None:
        """Train an alignment algorithm, or another one that stands on the generator, on a set of latents."""
        settings = {"trainer__max_steps": self.size.align, **settings}
        self.fit(
            result,
            experiments,
            model__init_args__generator=self.folder / "generator",
            data__init_args__train=self.folder / f"latents/{latents}",
            **settings,
        )

    def encode(self, result: str, data: str, generator: str = "generator") -> None:
        """A set as latents."""
        run(
            [
                "predict",
                "--config",
                "experiments/sprites/encode.yaml",
                f"--model.init_args.generator={self.folder / generator}",
                f"--data.init_args.data={self.folder / data}",
                f"--data.init_args.out={self.folder / result}",
            ]
        )

    def sample(self, result: str, prompts: str, samples: int, draw: int, cfg_scale: float = 1.0) -> None:
        """Videos of the base generator; without guidance, because guided ones would teach the guidance."""
        generate(
            {
                "generator": str(self.folder / "generator"),
                "num_frames": FRAMES,
                "height": SIZE,
                "width": SIZE,
                "fps": FPS,
                "steps": STEPS,
                "cfg_scale": cfg_scale,
            },
            {
                "prompts": str(self.folder / "world" / prompts),
                "out": str(self.folder / result),
                "samples": samples,
                "batch_size": 32,
                "seed": 1000 * self.seed + draw,
            },
            "cpu",
            1,
        )

    def prefer(
        self, result: str, samples: str, mode: str, weights: Weights, margin: float, judge: str = "reward"
    ) -> None:
        """Pairs of samples that a reward model labels."""
        model = RewardJudge(model=str(self.folder / judge), batch_size=48, device="cpu")
        data, out = str(self.folder / samples), str(self.folder / result)
        pairs_from_rewards(model, data, out, mode, weights, margin)
        shutil.rmtree(self.folder / f"{result}.rewards")  # should the pairs be made again, it is by another judge

    def bench(self, result: str, model: str, sets: Iterable[str]) -> None:
        """Accuracies of a reward model by benchmark and column."""
        with new_folder(self.folder / result) as folder:
            data = [str(self.folder / name) for name in sets]
            judge = RewardJudge(model=str(self.folder / model), batch_size=48, device="cpu")
            found = dict(measure(judge, data, str(folder / "scores")))
            write_json(folder / "accuracies.json", {name: result["accuracies"] for name, result in found.items()})

    def comparison(
        self,
        name: str,
        text: str,
        arms: Mapping[str, Arm],
        sweeps: Mapping[str, Sweep] | None = None,
        samples: int | None = None,
    ) -> list[Unit]:
        """Units of `videoalign compare` on prompts that no training but the captions' saw: one samples each arm, the last one judges.

        Args:
            name: folder of what is found. arms, sweeps: see :func:`.compare.compare`, with names of units in the place of folders.
        """
        samples = samples or self.size.judged
        sampling = Sampling(
            num_frames=FRAMES,
            height=SIZE,
            width=SIZE,
            fps=FPS,
            steps=STEPS,
            cfg_scale=2.0,
            batch_size=32,
            seed=self.seed,
        )
        place = self.folder / name
        generator, prompts = str(self.folder / "generator"), str(self.folder / "world/unseen.txt")
        arms = {key: self._placed(arm) for key, arm in arms.items()}
        sweeps = {key: self._placed(sweep) for key, sweep in (sweeps or {}).items()}
        units = []
        for key, arm in plan(arms, sweeps)[0].items():
            needs = [
                "generator",
                "world",
                *(str(Path(v).relative_to(self.folder)) for v in (arm.lora, arm.noisy_reward, arm.generator) if v),
            ]
            units.append(
                self.unit(
                    f"{name}/{VIDEOS}/{key}",
                    f"{text}: sampling {key}",
                    5,
                    needs,
                    sample_arm,
                    place,
                    key,
                    arm,
                    generator,
                    prompts,
                    sampling,
                    samples,
                    "cpu",
                )
            )
        judges = {
            "oracle": OracleJudge(str(self.folder / "oracle.json")),
            "reward model": RewardJudge(model=str(self.folder / "reward"), batch_size=32, device="cpu"),
        }
        needs = [*(unit.name.removeprefix(self.place) for unit in units), "reward", "oracle.json", "world"]
        units.append(
            self.unit(
                f"{name}/comparison.json",
                f"{text}: judging",
                2 + 0.6 * len(units),
                needs,
                compare,
                generator,
                prompts,
                str(place),
                sampling,
                judges,
                samples,
                arms,
                sweeps,
                device="cpu",
            )
        )
        return units

    def _placed(self, arm: Any) -> Any:
        """An arm or sweep whose names of units have become folders."""
        names = {
            key: str(self.folder / value)
            for key in ("lora", "noisy_reward", "generator")
            if (value := getattr(arm, key, None))
        }
        return replace(arm, **names)

    # --- the units --------------------------------------------------------------------------------------------

    def base(self, whole: bool = True) -> list[Unit]:
        """Everything that an alignment stands on: world, reward model, generator, and what it samples.

        Args:
            whole: with what no alignment needs: benchmarks of the reward models, the oracle's check, unselected samples.
        """
        size, unit, folder = self.size, self.unit, self.folder
        units = [
            unit(
                "world",
                "rendering the world: rated pairs, two benchmarks, captioned clips, a generator's clips",
                80,
                (),
                self._world,
            ),
            # the reward model
            *(
                unit(f"frames/{name}", f"decoding the clips once: {name}", cost, ("world",), self._frames, name)
                for name, cost in (("train", 40), ("captions", 12))
            ),
            unit("random", "making a miniature Qwen2-VL with random weights", 1, (), self._qwen),
            unit(
                "backbone",
                "caption pre-training, the stand-in for pre-trained weights",
                0.25 * size.captions,
                ("random", "frames/captions"),
                self.fit,
                "backbone",
                ("captions",),
                False,
                model__init_args__backbone=folder / "random",
                data__init_args__data=folder / "frames/captions",
                trainer__max_steps=size.captions,
            ),
            self.reward_model(
                "reward_rendered",
                "training the reward model on rated pairs (Bradley-Terry with ties, separate tokens)",
                trainer__val_check_interval=max(1, size.reward // 2),
                data__init_args__benchmarks={n: str(folder / "world" / n) for n in BENCHMARKS},
            ),
            # the generator
            unit("random_wan", "making a miniature Wan pipeline with random weights", 2, (), self._wan),
            unit(
                "encoder",
                "training the generator's autoencoder",
                0.4 * size.autoencoder,
                ("random_wan", "world"),
                self.fit,
                "encoder",
                ("autoencoder",),
                False,
                model__init_args__generator=folder / "random_wan",
                data__init_args__data=folder / "world/clips",
                trainer__max_steps=size.autoencoder,
            ),
            unit(
                "oracle.json",
                "calibrating the oracle on renders behind that autoencoder",
                15,
                ("encoder",),
                self._oracle,
            ),
            unit(
                "oracle_check.json",
                "how well the oracle ranks renders of known quality",
                10,
                ("oracle.json", "encoder"),
                self._oracle_check,
            ),
            unit(
                "latents/clips",
                "encoding the clips",
                45,
                ("encoder",),
                self.encode,
                "latents/clips",
                "world/clips",
                "encoder",
            ),
            unit(
                "generator",
                "training the generator by flow matching, from scratch",
                0.24 * size.generator,
                ("latents/clips",),
                self.fit,
                "generator",
                ("generator",),
                model__init_args__generator=folder / "encoder",
                data__init_args__train=folder / "latents/clips",
                trainer__max_steps=size.generator,
            ),
            *(
                unit(
                    f"samples/{name}",
                    f"sampling videos: {name}",
                    6,
                    ("generator", "world"),
                    self.sample,
                    f"samples/{name}",
                    prompts,
                    count,
                    draw,
                )
                for draw, (name, prompts, count) in enumerate(
                    (
                        ("rated", "prompts.txt", size.samples),
                        ("benchmark", "unseen.txt", size.samples),
                        ("fresh", "prompts.txt", size.fresh),
                    )
                )
            ),
            unit(
                "rated",
                "annotators rate pairs of generated videos",
                5,
                ("samples/rated", "oracle.json", "world"),
                self._rated,
            ),
            unit(
                "generated",
                "annotators rate pairs of generated videos of unseen prompts: a benchmark",
                4,
                ("samples/benchmark", "oracle.json"),
                self._generated,
            ),
            unit(
                "reward",
                "training the reward model on, with rated pairs of generated videos",
                0.27 * size.generated,
                ("reward_rendered", "rated"),
                self.fit,
                "reward",
                ("reward_generated",),
                model__init_args__network__init_args__folder=folder / "reward_rendered",
                data__init_args__train=folder / "rated/train",
                data__init_args__val=folder / "rated/val",
                trainer__max_steps=size.generated,
                trainer__val_check_interval=max(1, size.generated // 2),
            ),
            *(
                unit(
                    f"bench_{name}",
                    f"benchmarking a reward model: {name}",
                    8,
                    (name, "generated", "world"),
                    self.bench,
                    f"bench_{name}",
                    name,
                    (*(f"world/{b}" for b in BENCHMARKS), "generated"),
                )
                for name in ("reward_rendered", "reward")
            ),
            # what to align on
            unit(
                "preferred",
                "the reward model labels pairs of fresh samples",
                5,
                ("reward", "samples/fresh"),
                self.prefer,
                "preferred",
                "samples/fresh",
                "margin",
                Weights(),
                0.3,
            ),
            *(
                unit(
                    f"latents/{name}",
                    f"encoding: {name}",
                    7,
                    (data.split("/val")[0], "generator"),
                    self.encode,
                    f"latents/{name}",
                    data,
                )
                for name, data in (("preferred", "preferred"), ("fresh", "samples/fresh"), ("rated_val", "rated/val"))
            ),
            self.noisy_reward("noisy_reward"),
        ]
        return [
            u
            for u in units
            if whole
            or not u.name.removeprefix(self.place).startswith(
                ("bench_", "generated", "oracle_check", "samples/benchmark", "latents/fresh")
            )
        ]

    def reward_model(self, result: str, text: str, **settings: Any) -> Unit:
        """A reward model on rendered pairs; settings of experiments/sprites/reward_btt.yaml."""
        folder, steps = self.folder, settings.pop("trainer__max_steps", self.size.reward)
        return self.unit(
            result,
            text,
            0.27 * steps,
            ("backbone", "frames/train", "world"),
            self.fit,
            result,
            ("reward_btt",),
            trainer__max_steps=steps,
            model__init_args__network__init_args__backbone=folder / "backbone",
            data__init_args__train=folder / "frames/train",
            data__init_args__val=folder / "world/val",
            **settings,
        )

    def noisy_reward(
        self, result: str, text: str = "training the reward on noisy latents (Flow-NRG)", **settings: Any
    ) -> Unit:
        """A reward on noisy latents; validated on pairs that annotators rated."""
        size = self.size
        return self.unit(
            result,
            text,
            0.12 * size.noisy,
            ("generator", "latents/preferred", "latents/rated_val"),
            self.align,
            result,
            ("noisy_reward",),
            "preferred",
            trainer__max_steps=size.noisy,
            trainer__val_check_interval=max(1, size.noisy // 2),
            data__init_args__val=self.folder / "latents/rated_val",
            **settings,
        )

    def alignments(self) -> list[Unit]:
        """Every algorithm as experiments/sprites has it."""
        return [
            self.alignment(name, experiments, latents, text) for name, (experiments, latents, text) in ALIGNED.items()
        ]

    def alignment(self, result: str, experiments: Iterable[str], latents: str, text: str, **settings: Any) -> Unit:
        """One algorithm on one set of latents."""
        return self.unit(
            result,
            f"training {text}",
            0.25 * self.size.align,
            ("generator", f"latents/{latents}"),
            self.align,
            result,
            experiments,
            latents,
            **settings,
        )

    # --- what has no command of its own -----------------------------------------------------------------------

    def _world(self) -> None:
        with pool(min(os.cpu_count() or 1, 8)) as workers:  # everything else waits for it
            for _ in write_world(self.folder / "world", self.size.world, self.seed, workers):
                pass

    def _frames(self, name: str) -> None:
        for _ in encode_frames(
            ShardSet(self.folder / "world" / name), self.folder / "frames" / name, FRAME_SAMPLING, FACTOR, None
        ):
            pass

    def _qwen(self) -> None:
        make_qwen(self.folder / "random", corpus=[content.prompt for content in CONTENTS], seed=self.seed)

    def _wan(self) -> None:
        prompts = [content.prompt for content in CONTENTS]
        make_generator(self.folder / "random_wan", "wan", prompts, hidden=128, layers=4, max_tokens=16, seed=self.seed)

    def _oracle(self) -> None:
        eyes = autoencoded(load_generator(str(self.folder / "encoder"), parts=("vae", "transformer")))
        Oracle.calibrated(eyes, GENERATED, seed=self.seed).save(self.folder / "oracle.json")

    def _oracle_check(self) -> None:
        eyes = autoencoded(load_generator(str(self.folder / "encoder"), parts=("vae", "transformer")))
        videos, prompts, true = held_out_clips(400, self.seed)
        plain, oracle = Oracle.calibrated(None, GENERATED, seed=self.seed), Oracle.load(self.folder / "oracle.json")
        write_json(
            self.folder / "oracle_check.json",
            {
                "renders": rank_correlations(plain, videos, prompts, true),
                "behind the autoencoder": rank_correlations(oracle, eyes(videos), prompts, true),
            },
        )

    def _rated(self) -> None:
        folder, count = self.folder, self.size.rated
        with new_folder(folder / "rated") as out:
            rate_pairs(
                ShardSet(folder / "samples/rated"),
                Oracle.load(folder / "oracle.json"),
                out,
                count,
                count // 9,
                ShardSet(folder / "world/train"),
                count,
                self.seed,
            )

    def _generated(self) -> None:
        oracle = Oracle.load(self.folder / "oracle.json")
        rate_benchmark(
            ShardSet(self.folder / "samples/benchmark"), oracle, self.folder / "generated", self.size.rated, self.seed
        )


def shown_sweeps() -> dict[str, Sweep]:
    """Guidance as the demo shows it: even weights, and text alignment alone."""
    strengths = [0.0, 1.0, 3.0, 10.0, 30.0, 100.0]
    return {
        "nrg": Sweep(noisy_reward="noisy_reward", strengths=strengths),
        "nrg-text": Sweep(noisy_reward="noisy_reward", strengths=[0.0, 3.0, 30.0], guide=Guidance(weights={"TA": 1.0})),
    }
