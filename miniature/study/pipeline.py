"""The closed loop of the miniature world as units of work: from rendered clips to aligned and guided generators.

Every unit leaves a folder or file; what a command of this package does, a unit does by that command's code and YAML
(:mod:`.steps`). `videoalign demo` runs them once, `videoalign paper` for several seeds, with more units that build on
these.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from ...callbacks.prompt_sampler import Sampling
from ...commands.arms import VIDEOS, Arm, Sweep, compare, plan, sample_arm
from ...commands.reward_judge import RewardJudge
from ...datamodules.judgements import Weights
from ...models.guidance import Guidance
from ..world.oracle import OracleJudge
from .configured import Settings
from .seed_units import SeedUnits
from .steps import CLIPS
from .units import Unit

BENCHMARKS = ("recent", "older")
ALIGNED: dict[str, tuple[tuple[str, ...], str, str]] = {
    "control": (("flow_sft",), "fresh", "SFT on samples that nobody selected (the control)"),
    "sft": (("flow_sft",), "preferred", "SFT on the preferred samples"),
    "rwr": (("flow_sft", "flow_rwr"), "preferred", "Flow-RWR"),
    "dpo": (("flow_sft", "flow_dpo"), "preferred", "Flow-DPO, constant beta"),
    "dpo-time": (("flow_sft", "flow_dpo_time"), "preferred", "Flow-DPO, beta (1 - t)^2"),
}
"""Arms by name: their experiments, the latents that they train on, and a description."""
MOTION, MOTION_ONLY = "dpo-motion", Weights(VQ=0.0, MQ=1.0, TA=0.0)
"""One more arm of the demo: Flow-DPO on pairs that are labelled by motion quality alone."""
MOTION_MARGIN, MOTION_BETA = 1.0, 10.0
"""Its least difference of motion quality, in deviations, and its beta. Few samples of the base move well, so that it
has three times as many, twice the steps, and a weaker pull to the base than the other arms."""


class Loop(SeedUnits):
    """The units of one seed.

    It takes the arguments of :class:`.steps.Steps`.
    """

    # --- comparisons ------------------------------------------------------------------------------------------

    def comparison(
        self,
        name: str,
        text: str,
        arms: Mapping[str, Arm],
        sweeps: Mapping[str, Sweep] | None = None,
        samples: int | None = None,
        held_out: Mapping[str, str] | None = None,
    ) -> list[Unit]:
        """Units of `videoalign compare` on prompts that only the caption pre-training saw.

        Each unit but the last samples one arm; the last one judges.

        Args:
            name: Folder of the comparison.
            text: Description for people.
            arms: Ways of sampling by name, as :func:`.compare` takes them, with names of units in place of folders.
            sweeps: Guidance at several strengths, by name, with names of units in place of folders.
            samples: Noises per prompt; the size's ``judged`` if not given.
            held_out: Names of further judges, and folders of their reward models.
        """
        samples = samples or self.size.judged
        sampling = Sampling(**CLIPS, cfg_scale=2.0, batch_size=32, seed=self.seed)
        place = self.folder / name
        generator, prompts = str(self.folder / "generator"), str(self.folder / "world/unseen.txt")
        arms = {key: self._placed(arm) for key, arm in arms.items()}
        sweeps = {key: self._placed(sweep) for key, sweep in (sweeps or {}).items()}
        units = []
        for key, arm in plan(arms, sweeps)[0].items():
            folders = [Path(v).relative_to(self.folder) for v in (arm.lora, arm.noisy_reward, arm.generator) if v]
            needs = ["generator", "world", *(self.made_by(str(folder)) for folder in folders)]
            args = (place, key, arm, generator, prompts, sampling, samples, "cpu")
            units.append(self.unit(f"{name}/{VIDEOS}/{key}", f"{text}: sampling {key}", 5, needs, sample_arm, *args))
        models = {"reward model": "reward", **(held_out or {})}
        judges = {"oracle": OracleJudge(str(self.folder / "oracle.json"))}
        for judge, folder in models.items():
            judges[judge] = RewardJudge(model=str(self.folder / folder), batch_size=32, device="cpu")
        needs = [*(unit.name.removeprefix(self.place) for unit in units), *models.values(), "oracle.json", "world"]
        args = (generator, prompts, str(place), sampling, judges, samples, arms, sweeps, None, "cpu")
        cost = 2 + 0.6 * len(units)
        return [*units, self.unit(f"{name}/comparison.json", f"{text}: judging", cost, needs, compare, *args)]

    def made_by(self, folder: str) -> str:
        """Name of the unit that makes a folder: its own, unless a unit makes several.

        Args:
            folder: Folder of adapters, a noisy reward or a pipeline, relative to the seed's.
        """
        return folder

    def _placed(self, arm: Any) -> Any:
        """An arm or sweep whose names of units have become folders."""
        folders = ((key, getattr(arm, key, None)) for key in ("lora", "noisy_reward", "generator"))
        return replace(arm, **{key: str(self.folder / name) for key, name in folders if name})

    # --- the units --------------------------------------------------------------------------------------------

    def base(self, whole: bool = True) -> list[Unit]:
        """Everything that alignment needs: world, reward model, generator, and samples of it with their labels.

        Args:
            whole: Whether to include what no alignment needs: benchmarks of the reward models, the check of the oracle,
                and samples that nobody selected.
        """
        units = [*self._reward_units(), *self._generator_units(), *self._rating_units(), *self._preference_units()]
        spare = ("bench_", "generated", "oracle_check", "samples/benchmark", "latents/fresh")
        return [u for u in units if whole or not u.name.removeprefix(self.place).startswith(spare)]

    def _reward_units(self) -> list[Unit]:
        """The world, and a reward model that is trained on its rendered pairs."""
        size, folder = self.size, self.folder
        taught = self.captioned("backbone", "caption pre-training, the stand-in for pre-trained weights")
        world = "rendering the world: rated pairs, two benchmarks, captioned clips, a generator's clips"
        rendered = {
            "trainer.val_check_interval": max(1, size.reward // 2),
            "data.init_args.benchmarks": {name: str(folder / "world" / name) for name in BENCHMARKS},
        }
        return [
            self.unit("world", world, 80, (), self.render),
            *(
                self.unit(f"frames/{name}", f"decoding the clips once: {name}", cost, ("world",), self.decode, name)
                for name, cost in (("train", 40), ("captions", 12))
            ),
            self.unit("random", "making a miniature Qwen2-VL with random weights", 1, (), self.random_qwen),
            replace(taught, run=partial(self.teach, *taught.run.args[:3])),  # it writes its result itself
            self.reward_model(
                "reward_rendered",
                "training the reward model on rated pairs (Bradley-Terry with ties, separate tokens)",
                rendered,
            ),
        ]

    def _generator_units(self) -> list[Unit]:
        """The generator, and the oracle, which is calibrated behind the generator's autoencoder."""
        size, folder, unit = self.size, self.folder, self.unit
        calibrating = "calibrating the oracle on renders behind that autoencoder"
        checking = "how well the oracle ranks renders of known quality"
        autoencoder = {
            "model.init_args.generator": folder / "random_wan",
            "data.init_args.data": folder / "world/clips",
            "trainer.max_steps": size.autoencoder,
        }
        generator = {
            "model.init_args.generator": folder / "encoder",
            "data.init_args.train": folder / "latents/clips",
            "trainer.max_steps": size.generator,
        }
        clips = ("latents/clips", "world/clips", "encoder")
        return [
            unit("random_wan", "making a miniature Wan pipeline with random weights", 2, (), self.random_wan),
            self.training(
                "encoder",
                "training the generator's autoencoder",
                0.7 * size.autoencoder,
                ("random_wan", "world"),
                ("autoencoder",),
                autoencoder,
                export=False,
            ),
            unit("oracle.json", calibrating, 15, ("encoder",), self.calibrate),
            unit("oracle_check.json", checking, 10, ("oracle.json", "encoder"), self.check_oracle),
            unit("latents/clips", "encoding the clips", 45, ("encoder",), self.encode, *clips),
            self.training(
                "generator",
                "training the generator by flow matching, from scratch",
                0.43 * size.generator,
                ("latents/clips",),
                ("generator",),
                generator,
            ),
        ]

    def _rating_units(self) -> list[Unit]:
        """Samples of the generator, ratings of them, and a reward model that knows both."""
        size, folder = self.size, self.folder
        draws = (
            ("rated", "prompts.txt", size.samples),
            ("benchmark", "unseen.txt", size.benchmark),
            ("fresh", "prompts.txt", size.fresh),
        )
        rated, rated_needs = "annotators rate pairs of generated videos", ("samples/rated", "oracle.json", "world")
        unseen = "annotators rate pairs of generated videos of unseen prompts: a benchmark"
        sets = (*(f"world/{name}" for name in BENCHMARKS), "generated")
        settings = {
            "model.init_args.network.init_args.folder": folder / "reward_rendered",
            "data.init_args.train": folder / "rated/train",
            "data.init_args.val": folder / "rated/val",
            "trainer.max_steps": size.generated,
            "trainer.val_check_interval": max(1, size.generated // 2),
        }
        return [
            *(
                self.sampling(f"samples/{name}", f"sampling videos: {name}", 0.6 * count, prompts, count, draw)
                for draw, (name, prompts, count) in enumerate(draws)
            ),
            self.unit("rated", rated, 5, rated_needs, self.rate),
            self.unit("generated", unseen, 4, ("samples/benchmark", "oracle.json"), self.rate_unseen),
            self.training(
                "reward",
                "training the reward model on, with rated pairs of generated videos",
                0.4 * size.generated,
                ("reward_rendered", "rated"),
                ("reward_generated",),
                settings,
            ),
            *(
                self.benchmarking(
                    f"bench_{name}", name, sets, f"benchmarking a reward model: {name}", needs=("generated", "world")
                )
                for name in ("reward_rendered", "reward")
            ),
        ]

    def _preference_units(self) -> list[Unit]:
        """Labelled pairs as latents, and the reward on noisy latents."""
        sets = (("preferred", "preferred"), ("fresh", "samples/fresh"), ("rated_val", "rated/val"))
        return [
            self.labelling("preferred", "the reward model labels pairs of fresh samples", "samples/fresh"),
            *(self.encoding(name, data) for name, data in sets),
            self.noisy_reward("noisy_reward", "training the reward on noisy latents (Flow-NRG)"),
        ]

    # --- trainings that occur in several places ---------------------------------------------------------------

    def captioned(self, result: str, text: str, settings: Settings | None = None) -> Unit:
        """A backbone that has learnt to describe clips, from the loop's random weights alone.

        Args:
            result: Folder of the backbone.
            text: Description for people.
            settings: Settings that override experiments/sprites/captions.yaml.
        """
        settings = {
            "model.init_args.backbone": self.folder / "random",
            "data.init_args.data": self.folder / "frames/captions",
            "data.init_args.held_out": min(240, self.size.world.captions // 8),
            "trainer.max_steps": self.size.captions,
            **(settings or {}),
        }
        cost = 0.42 * self.size.captions
        return self.training(result, text, cost, ("random", "frames/captions"), ("captions",), settings, export=False)

    def reward_model(self, result: str, text: str, settings: Settings, backbone: str = "backbone") -> Unit:
        """A reward model on rendered pairs.

        Args:
            result: Folder of the trained model.
            text: Description for people.
            settings: Settings that override experiments/sprites/reward_btt.yaml and that benchmarks are not scored.
            backbone: Folder of the backbone to start from.
        """
        folder = self.folder
        settings = {
            "trainer.max_steps": self.size.reward,
            "model.init_args.network.init_args.backbone": folder / backbone,
            "data.init_args.train": folder / "frames/train",
            "data.init_args.val": folder / "world/val",
            "data.init_args.benchmarks": {},
            **settings,
        }
        needs, cost = (backbone, "frames/train", "world"), 0.4 * settings["trainer.max_steps"]
        return self.training(result, text, cost, needs, ("reward_btt",), settings)

    def on_latents(self, latents: str, settings: Settings) -> Settings:
        """Settings of a training that starts from the generator and reads latents.

        Args:
            latents: Name of the latents.
            settings: Settings that override the rest.
        """
        return {
            "trainer.max_steps": self.size.align,
            "model.init_args.generator": self.folder / "generator",
            "data.init_args.train": self.folder / f"latents/{latents}",
            **settings,
        }

    def noisy_reward(self, result: str, text: str, settings: Settings | None = None) -> Unit:
        """A reward on noisy latents, validated on pairs that annotators rated.

        Args:
            result: Folder of the trained model.
            text: Description for people.
            settings: Settings that override experiments/sprites/noisy_reward.yaml.
        """
        own = {
            "trainer.max_steps": self.size.noisy,
            "trainer.val_check_interval": max(1, self.size.noisy // 2),
            "data.init_args.val": self.folder / "latents/rated_val",
            **(settings or {}),
        }
        needs, cost = ("generator", "latents/preferred", "latents/rated_val"), 0.3 * self.size.noisy
        return self.training(result, text, cost, needs, ("noisy_reward",), self.on_latents("preferred", own))

    def alignments(self) -> list[Unit]:
        """Every algorithm with the settings of its file in experiments/sprites, and Flow-DPO for motion alone."""
        count, steps = 3 * self.size.fresh, 2 * self.size.align
        motion = {
            "trainer.max_steps": steps,
            "model.init_args.beta.init_args.beta": MOTION_BETA,
            "data.init_args.weights": asdict(MOTION_ONLY),
        }
        labels = "the reward model labels pairs by motion quality alone"
        return [
            *(self._alignment(name, *arm) for name, arm in ALIGNED.items()),
            self.sampling("samples/many", "sampling videos: many", 0.6 * count, "prompts.txt", count, 7),
            self.labelling("preferred_mq", labels, "samples/many", "margin", MOTION_ONLY, MOTION_MARGIN, cost=12),
            self.encoding("preferred_mq", "preferred_mq", cost=20),
            self._alignment(MOTION, ALIGNED["dpo"][0], "preferred_mq", "Flow-DPO for motion alone", motion),
        ]

    def _alignment(
        self, result: str, experiments: Sequence[str], latents: str, text: str, settings: Settings | None = None
    ) -> Unit:
        settings = self.on_latents(latents, settings or {})
        needs, cost = ("generator", f"latents/{latents}"), 0.38 * settings["trainer.max_steps"]
        return self.training(result, f"training {text}", cost, needs, experiments, settings)


def shown_sweeps() -> dict[str, Sweep]:
    """Sweeps of guidance in the demo: even weights, and text alignment alone."""
    strengths = [0.0, 1.0, 3.0, 10.0, 30.0, 100.0]
    return {
        "nrg": Sweep(noisy_reward="noisy_reward", strengths=strengths),
        "nrg-text": Sweep(noisy_reward="noisy_reward", strengths=[0.0, 3.0, 30.0], guide=Guidance(weights={"TA": 1.0})),
    }
