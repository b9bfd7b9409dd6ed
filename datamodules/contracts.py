"""Contracts between modules, DataModules and callbacks: what each asks of another through the Trainer, as Protocols.

Lightning hands these objects to each other untyped, as ``trainer.datamodule``, ``trainer.lightning_module`` and
``pl_module``. A class of a user's own fulfils a contract by having its attributes; it inherits from nothing here.
:func:`.fulfilment.require` checks a contract in ``setup``, before the first batch, and gives the partner its type.

Lightning sets up the DataModule first, then the callbacks, then the module. So whatever a DataModule or a callback asks
of the module must exist after the module's ``__init__``, while the DataModule may create what it offers in its
``setup``.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..models.scoring import ScoresVideos
from .fulfilment import OFFERED_BY, missing, offered_by, offers, require  # noqa: F401  for those who ask
from .rollout_contracts import DrawsGroups, HasRewards, RollsOut, ShowsRollout  # noqa: F401

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..models.family import Encoded
    from ..models.generator import Generator
    from ..models.lora import LoRA
    from ..models.metrics import Calibration
    from ..models.processor import RewardProcessor
    from ..models.reward_statistics import Statistics
    from .benchmark import Benchmark
    from .parts import Parts
    from .video_pair import VideoPair

# --- what a module offers ---------------------------------------------------------------------------------------------


@offered_by("a module whose network reads videos and prompts (RewardModel or a subclass)")
class HasProcessor(Protocol):
    """A module whose network reads videos and prompts: RewardModel, Captioning.

    VideoPairs, VideoList and Captions ask it, because frames, tokens and template must be those of the network.
    """

    @property
    def processor(self) -> RewardProcessor:
        """Turns decoded frames and prompts into the network's inputs."""


@offered_by("a module that scores pairs (RewardModel or a subclass)")
class ScoresPairs(HasProcessor, Protocol):
    """A module that scores held-out pairs: RewardModel.

    The callback ExamplePairs asks it, and calls the module itself for raw rewards (B, 3) of the processor's inputs.
    """

    @property
    def theta(self) -> float:
        """Tie parameter; 1 where a tie has no probability."""

    def has_held_out(self) -> bool:
        """Whether the run validates on held-out pairs; the same on every rank."""

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        """Raw rewards (B, 3)."""


@offered_by("a module that learns from rated pairs (RewardModel, NoisyRewardModel or a subclass)")
class LearnsFromRatings(Protocol):
    """A module that says which ratings it learns from: RewardModel, NoisyRewardModel.

    VideoPairs and LatentPairs ask it before training, because a loss without targets teaches nothing and fails nowhere.
    """

    def targets(self, labels: Tensor, scores: Tensor) -> Tensor:
        """Dimensions (D,) in which the loss learns from a pair of these labels (D,) and scores (2, D), NaN for none."""


@offered_by("a module that measures the statistics of its rewards (RewardModel or a subclass)")
class MeasuresStatistics(Protocol):
    """A module that measures mean and standard deviation of its rewards: RewardModel.

    The callback RewardBench asks it, because the overall reward sums normalised rewards. The validation step must
    return the ``rewards`` of a benchmark's videos.
    """

    def measured_statistics(self) -> Statistics:
        """Statistics of the latest validation, or the stored ones. Collective: every rank must call it."""


@offered_by("a module that calibrates probabilities on held-out pairs (RewardModel, NoisyRewardModel or a subclass)")
class HasCalibration(Protocol):
    """A module that collects predicted probabilities at validation: RewardModel, NoisyRewardModel.

    The callback ReliabilityDiagram asks it.
    """

    @property
    def calibration(self) -> Calibration:
        """Metric of predicted against observed outcomes."""


@offered_by("a network that is saved as a folder (VideoReward or NoisyReward)")
class RewardNetwork(Protocol):
    """A reward network that is saved as a folder: VideoReward, NoisyReward."""

    @property
    def record(self) -> str:
        """Name of the file that marks a folder as a saved network."""

    def save_pretrained(self, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
        """Write the folder.

        Args:
            folder: Folder to write.
            state: Full tensors by name, where the network's own are sharded.
        """


@offered_by("a network with a backbone of its own (VideoReward, which RewardModel trains)")
class HasBackbone(RewardNetwork, Protocol):
    """A network whose ``save_pretrained`` takes ``backbone=True`` and copies its backbone: VideoReward.

    The callback ExportReward asks it where its option ``backbone`` is set.
    """

    @property
    def backbone(self) -> nn.Module:
        """The video-language model under the head."""


@offered_by("a module that trains a reward network (RewardModel, NoisyRewardModel or a subclass)")
class HasRewardNetwork(Protocol):
    """A module that trains a reward network: RewardModel, NoisyRewardModel.

    The callback ExportReward asks it.
    """

    @property
    def network(self) -> RewardNetwork:
        """The network that is written when training ends."""


@offered_by("a module that holds a generator (FlowSFT, NoisyRewardModel, EncodeLatents or a subclass)")
class HasGenerator(Protocol):
    """A module that holds a generator: FlowSFT and its subclasses, NoisyRewardModel, EncodeLatents, Generate.

    LatentPairs and ReferenceDraws ask it, because latents fit only the autoencoder that encoded them. EncodeList asks
    it for the sizes of video that the autoencoder takes.
    """

    @property
    def generator(self) -> Generator:
        """The pipeline in this package's terms."""


@offered_by("a module that aligns a generator (FlowSFT or a subclass)")
class AlignsGenerator(HasGenerator, Protocol):
    """A module that trains a policy against a reference: FlowSFT and its subclasses.

    The callbacks SideBySide, HeldOutPrompts and WinRate ask it, to sample both from the same noise.
    """

    @property
    def name(self) -> str:
        """Folder or hub id of the pipeline; its text encoder is loaded from there."""

    def as_reference(self) -> AbstractContextManager[nn.Module]:
        """The reference's transformer for the time of a ``with`` block, without gradients."""


@offered_by("a module that trains a generator's transformer (FlowSFT or a subclass)")
class TrainsTransformer(HasGenerator, Protocol):
    """A module that trains a generator's transformer: FlowSFT and its subclasses.

    The callback ExportGenerator asks it.
    """

    @property
    def name(self) -> str:
        """Folder or hub id of the pipeline that training started from."""

    @property
    def lora(self) -> LoRA | None:
        """Settings of the LoRA adapters; None where all weights train."""

    @property
    def policy(self) -> nn.Module:
        """The transformer that is trained."""


@offered_by("a module with a reference (FlowSFT or a subclass)")
class HasReferenceErrors(HasGenerator, Protocol):
    """A module that can train with cached reference errors: FlowSFT and its subclasses.

    LatentPairs asks it where its option ``reference`` is set, because errors of other settings would be wrong.
    """

    def reference_made(self) -> dict[str, Any]:
        """Settings that the reference's errors depend on besides the latents, as plain values."""


@offered_by("a module whose predict_step returns samples of a set (EncodeLatents, Generate or a subclass)")
class DescribesSamples(Protocol):
    """A module that states what the samples of its predict_step depend on: EncodeLatents, Generate.

    EncodeList and Prompts ask it, because an interrupted run goes on only with the settings that it began with.
    """

    def making(self) -> dict[str, Any]:
        """Settings that the samples depend on, as plain values."""


@offered_by("a module whose predict_step returns samples of a set (EncodeLatents, Generate or a subclass)")
class HasExtraFiles(Protocol):
    """A module whose set holds files besides its samples: EncodeLatents, Generate.

    The callback WriteParts asks it when the set is complete. ``predict_step`` must return (key, members, record) of
    each sample.
    """

    def extra_files(self) -> dict[str, bytes]:
        """Content of further files by name; empty where the set needs none."""


# --- what a DataModule offers -----------------------------------------------------------------------------------------


@offered_by("a DataModule of held-out pairs (VideoPairs or a subclass)")
class HasExamples(Protocol):
    """A DataModule that decodes held-out pairs for pictures: VideoPairs.

    The callbacks ExamplePairs and RewardReport ask it.
    """

    def examples(self, count: int) -> Sequence[VideoPair]:
        """The first held-out pairs, the same ones at every call.

        Args:
            count: Number of pairs.
        """

    def find_pairs(self, keys: Sequence[str]) -> Sequence[VideoPair]:
        """Held-out pairs by their keys, in that order."""


@offered_by("a DataModule with benchmarks (VideoPairs or a subclass)")
class HasBenchmarks(Protocol):
    """A DataModule that validates on benchmarks: VideoPairs.

    The callback RewardBench asks it. Batches of a benchmark's videos must carry its name under ``benchmark``, the
    videos' places in :attr:`Benchmark.keys <videoalign.datamodules.benchmark.Benchmark>` under ``numbers``, and a mask
    under ``valid``.
    """

    @property
    def benchmarks(self) -> Mapping[str, Benchmark]:
        """Benchmarks by name; empty where the configuration names none."""


@offered_by("a DataModule of latents (LatentPairs or a subclass)")
class HasNullPrompt(Protocol):
    """A DataModule that knows the empty prompt's embedding: LatentPairs.

    FlowSFT asks it where its option ``null_share`` is set.
    """

    @property
    def null(self) -> Encoded:
        """The empty prompt, encoded."""


@offered_by("a DataModule of latents (LatentPairs or a subclass)")
class HasPromptScores(Protocol):
    """A DataModule that knows the rewards of its whole training set: LatentPairs.

    FlowRWR asks it, to normalise rewards within each prompt.
    """

    def prompt_scores(self) -> Mapping[str, Tensor]:
        """Weighted rewards (M,) of all training samples of each prompt."""

    def has_rewards(self) -> bool:
        """Whether every training sample has rewards; pairs with labels alone have scores, but no rewards."""


@offered_by("a DataModule of videos to encode (EncodeList or a subclass)")
class EncodesVideos(Protocol):
    """A DataModule of videos that become latents: EncodeList.

    EncodeLatents asks it.
    """

    @property
    def kind(self) -> str:
        """Kind of the set of videos: ``pairs`` or ``videos``."""

    @property
    def precision(self) -> str:
        """Name of the dtype of latents on disk."""


@offered_by("a DataModule whose samples have prompts to encode (EncodeList, Prompts or a subclass)")
class HasPrompts(Protocol):
    """A DataModule that knows the prompts of a predict run before its first batch: EncodeList, Prompts.

    EncodeLatents asks it where ``memory.text_first`` is set, Generate also to refuse prompts that are too long.
    """

    def all_prompts(self) -> Sequence[str]:
        """Texts of the prompts of the whole set, in order, with or without repetitions."""


@offered_by("a DataModule of reference draws (ReferenceDraws or a subclass)")
class SavesReference(Protocol):
    """A DataModule that writes a cache of reference errors: ReferenceDraws.

    CacheReference asks it.
    """

    def save(self, errors: Mapping[tuple[int, int], Sequence[float]], made: dict[str, Any]) -> None:
        """Write the cache.

        Args:
            errors: Errors (S,) by (sample, draw).
            made: Settings that they depend on besides the latents.
        """


@offered_by("a DataModule that writes a set (EncodeList, Prompts or a subclass)")
class HasParts(Protocol):
    """A DataModule whose samples become a set: EncodeList, Prompts.

    The callback WriteParts asks it.
    """

    @property
    def parts(self) -> Parts:
        """The set under construction."""

    @property
    def allowed_drops(self) -> int:
        """Largest number of samples that may be unusable."""


# --- what a DataModule is given ---------------------------------------------------------------------------------------


class AugmentsPairs(Protocol):
    """A change of training pairs after which their ratings still hold: a symmetry of what raters see.

    VideoPairs calls it with every training pair that it decodes; in YAML it is an object under ``augment``. Both videos
    must be changed alike, but for what no rater looks at. Whatever it draws must come from ``rng``, so that a pair
    is the same on any number of ranks and workers and after resuming. Workers are sent a copy, so it must be
    picklable.
    """

    def __call__(
        self, videos: tuple[Tensor, Tensor], prompt: str, rng: random.Random
    ) -> tuple[tuple[Tensor, Tensor], str]:
        """Change a pair.

        Args:
            videos: Frames of A and B, uint8 (T, 3, H, W), sampled and resized; they must not be written to.
            prompt: Text that both were generated from.
            rng: Random numbers of (seed, epoch, key).

        Returns:
            Frames of A and B in new tensors, uint8 (T', 3, H', W'), and the prompt that fits them.
        """


# --- what a module is given -------------------------------------------------------------------------------------------

# the networks' package has the contract, because it is where rewards are asked
offered_by("a reward that rates samples (VideoRewardScores, NoisyRewardScores, FunctionScores, HTTPScores)")(
    ScoresVideos
)


# --- what a loader offers ---------------------------------------------------------------------------------------------


@offered_by("a loader that names its benchmark (ShardLoader)")
class NamesBenchmark(Protocol):
    """A validation loader that tells a benchmark's videos from held-out pairs: ShardLoader.

    RewardModel asks it; any other loader counts as one of held-out pairs.
    """

    @property
    def benchmark(self) -> str | None:
        """Name of the benchmark; None for held-out pairs."""
