"""The miniature world's judge: how good a clip is, from its pixels and its prompt alone.

Real video generation has no such judge: here it tells a better generator from a fooled reward model. Strengths of flaws
as measured (:mod:`.measurement`) are mapped to true ones by renders that went through the same autoencoder, because
what a small autoencoder blurs is no flaw of a generator behind it.

Legend: N clips, T frames, H, W pixels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef

from ... import VideoAlignError
from ...callbacks.prompt_sampler import Sampling
from ...datamodules.encode_list import clips_of
from ...datamodules.shards import ShardSet
from ...models.dimensions import DIMENSIONS
from ...models.files import read_json, write_json
from ...models.generator import Generator
from . import sprites
from .measurement import FLAWS, Measured, measure
from .sprites import BY_PROMPT, COLOURS, DIRECTIONS, FRAMES, SCENES, SHAPES, SIZE, TA_WEIGHTS, Flaws, Scene

RoundTrip = Callable[[np.ndarray], np.ndarray]
"""uint8 (N, T, H, W, 3) -> the same, through an autoencoder."""


@dataclass
class Oracle:
    """True qualities of clips, as far as pixels show them.

    Attributes:
        scale: Offset and gain of each flaw, which map a measured strength to a true one.
    """

    scale: dict[str, tuple[float, float]] = field(default_factory=lambda: dict.fromkeys(FLAWS, (0.0, 1.0)))

    def __call__(self, videos: np.ndarray, prompts: Sequence[str]) -> Tensor:
        """Qualities (N, 3) of VQ, MQ and TA in [0, 1].

        Args:
            videos: Clips (N, T, H, W, 3) in uint8.
            prompts: One prompt per clip.

        Raises:
            VideoAlignError: Where a prompt is none of the miniature world's, or clips have another size.
        """
        self.check(prompts, videos.shape[1:])
        if len(prompts) != len(videos):
            raise VideoAlignError(f"{len(videos)} clips and {len(prompts)} prompts: there must be one for each")
        found = measure(videos)
        flaws = self.strengths(found)
        alignment = self._right(found, [BY_PROMPT[p] for p in prompts]) @ torch.tensor(TA_WEIGHTS, dtype=torch.float32)
        return torch.stack([1 - flaws[:, :3].amax(1), 1 - flaws[:, 3:].amax(1), alignment], 1)

    @staticmethod
    def _right(found: Measured, scenes: Sequence[Scene]) -> Tensor:
        """Probabilities (N, 3) that colour, shape and direction are those of the scenes."""

        def of_scene(attribute: str, names: Sequence[str], probabilities: Tensor) -> Tensor:
            chosen = [names.index(getattr(scene, attribute)) for scene in scenes]
            return probabilities[torch.arange(len(scenes)), chosen]

        colours = of_scene("colour", list(COLOURS), found.colours)
        shapes = of_scene("shape", SHAPES, found.shapes)
        return torch.stack([colours, shapes, of_scene("direction", list(DIRECTIONS), found.directions)], 1)

    @staticmethod
    def check(prompts: Sequence[str], shape: tuple[int, ...]) -> None:
        """Refuse what is none of the miniature world's.

        Args:
            prompts: Prompts of the clips.
            shape: Shape (T, H, W, 3) of one clip.

        Raises:
            VideoAlignError: What cannot be judged, and why.
        """
        if unknown := [p for p in prompts if p not in BY_PROMPT]:
            raise VideoAlignError(
                f"prompt {unknown[0]!r} is none of the miniature world, so its oracle cannot judge it"
            )
        if len(shape) != 4 or shape[1:] != (SIZE, SIZE, 3) or shape[0] < 3:
            raise VideoAlignError(
                f"clips of shape {tuple(shape)}: the oracle judges (T, {SIZE}, {SIZE}, 3), T at least 3"
            )

    def strengths(self, found: Measured) -> Tensor:
        """True strengths (N, 6) of flaws, in [0, 1].

        Args:
            found: What is seen in the clips.
        """
        offset, gain = torch.tensor([self.scale[name] for name in FLAWS]).T
        return ((found.flaws - offset) * gain).clamp(0, 1)

    @classmethod
    def calibrated(
        cls,
        round_trip: RoundTrip | None = None,
        scenes: Sequence[Scene] = SCENES,
        clips: int = 160,
        seed: int = 0,
    ) -> "Oracle":
        """An oracle to which clean renders are flawless after a round trip, and the worst are worst.

        Args:
            round_trip: Autoencoder that the videos to be judged went through; None for renders.
            scenes: Scenes that they show.
            clips: Renders per flaw.
            seed: Seed of the renders.
        """
        rng = np.random.default_rng([seed, 77])
        scale = {}
        clean = measure(_rendered([Flaws()] * clips, scenes, round_trip, rng)).flaws
        for number, name in enumerate(FLAWS):
            floor = float(clean[:, number].median())
            if name in ("unlike", "uneven"):  # the renderer has no such flaw: what is far from its clips is bad
                low = float(clean[:, number].quantile(0.95))
                scale[name] = low, 1 / {"unlike": 0.6, "uneven": 0.4}[name]
                continue
            strengths = rng.uniform(0.2, 1, clips)
            flawed = _rendered([Flaws(**{name: s}) for s in strengths], scenes, round_trip, rng)
            x = measure(flawed).flaws[:, number].double().numpy() - floor
            scale[name] = floor, float((x @ strengths) / max(x @ x, 1e-9))  # least squares through the clean level
        return cls(scale)

    def save(self, path: str | Path) -> None:
        """Write the calibration as JSON.

        Args:
            path: File to write.
        """
        write_json(Path(path), asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> "Oracle":
        """Read a calibration.

        Args:
            path: File that :meth:`save` wrote.

        Raises:
            VideoAlignError: Where the file is no calibration.
        """
        record = read_json(Path(path), "an oracle's calibration")
        try:
            scale = {name: (float(offset), float(gain)) for name in FLAWS for offset, gain in [record["scale"][name]]}
            lists = all(isinstance(record["scale"][name], list) for name in FLAWS)
            if not lists or not all(math.isfinite(value) for pair in scale.values() for value in pair):
                raise ValueError("a flaw's row is not a list of two finite numbers")
            return cls(scale)
        except (KeyError, TypeError, ValueError) as error:
            raise VideoAlignError(f"{path} is not the calibration of an oracle ({error})") from None


class _Calibrated:
    """An oracle of a file.

    Args:
        calibration: JSON file of the oracle's calibration.
    """

    def __init__(self, calibration: str) -> None:
        self.calibration = calibration

    @property
    def name(self) -> str:
        """The calibration's file."""
        return f"oracle of {self.calibration}"

    @cached_property
    def oracle(self) -> Oracle:
        """The calibrated oracle, read when it is first needed."""
        return Oracle.load(self.calibration)


class OracleScores(_Calibrated):
    """The oracle as a reward of generated videos.

    Args:
        calibration: JSON file of the oracle's calibration.
    """

    needs: Literal["videos", "latents"] = "videos"

    def check(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that are not the miniature world's.

        Args:
            prompts: Prompts of all samples that there will be.

        Raises:
            VideoAlignError: Where a prompt is none of the world's, or the calibration cannot be read.
        """
        self.oracle.check(prompts, (FRAMES, SIZE, SIZE, 3))

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Judge videos.

        Args:
            videos: Videos (B, T, 3, H, W), uint8.
            prompts: Prompt of each video.

        Returns:
            Qualities (B,) in [0, 1] under VQ, MQ and TA.
        """
        clips = videos.permute(0, 1, 3, 4, 2).cpu().numpy()
        return dict(zip(DIMENSIONS, self.oracle(clips, prompts).unbind(1)))

    def place(self, device: torch.device | None) -> None:
        """The oracle computes on the CPU and holds nothing to move.

        Args:
            device: Device that the run computes on; None releases memory.
        """


class OracleJudge(_Calibrated):
    """The oracle as a judge of `videoalign compare`.

    Args:
        calibration: JSON file of the oracle's calibration.
    """

    def check(self, prompts: Sequence[str], sampling: Sampling) -> None:
        """Refuse prompts and videos that are not the miniature world's."""
        self.oracle.check(prompts, (sampling.num_frames, sampling.height, sampling.width, 3))

    def rate_set(self, videos: ShardSet, keys: Sequence[str], folder: Path) -> dict[str, Tensor]:
        """Qualities by dimension; they are computed in a moment, so that nothing is kept in ``folder``."""
        by_key = {content.key: content for content in videos.contents()}
        contents = [by_key[key] for key in keys]
        qualities = self.oracle(clips_of(contents), [content.record["prompt"] for content in contents])
        return dict(zip(DIMENSIONS, qualities.unbind(1)))


def _rendered(
    flaws: Sequence[Flaws], scenes: Sequence[Scene], round_trip: RoundTrip | None, rng: np.random.Generator
) -> np.ndarray:
    """Clips (N, T, H, W, 3) of any of the scenes with these flaws."""
    shown = [scenes[i] for i in rng.integers(len(scenes), size=len(flaws))]
    videos = np.stack([sprites.render(scene, flaw, rng) for scene, flaw in zip(shown, flaws)])
    return round_trip(videos) if round_trip else videos


def rank_correlations(oracle: Oracle, videos: np.ndarray, prompts: Sequence[str], true: np.ndarray) -> dict[str, float]:
    """Spearman correlation of the oracle's qualities with the true ones, by dimension.

    Args:
        oracle: Oracle that is calibrated for what the clips went through.
        videos: Clips (N, T, H, W, 3) in uint8.
        prompts: One prompt per clip.
        true: True qualities (N, 3).
    """
    found = spearman_corrcoef(oracle(videos, prompts), torch.tensor(true, dtype=torch.float32))
    return dict(zip(DIMENSIONS, found.tolist()))


def autoencoded(generator: Generator, batch_size: int = 32) -> RoundTrip:
    """A function that sends clips through a generator's autoencoder and back.

    Args:
        generator: Generator whose autoencoder is used.
        batch_size: Clips per forward.
    """

    def through(videos: np.ndarray) -> np.ndarray:
        found = []
        for some in torch.from_numpy(videos).permute(0, 1, 4, 2, 3).split(batch_size):  # (B, T, 3, H, W)
            found.append(generator.decode(generator.encode_video(some)).permute(0, 1, 3, 4, 2))
        return torch.cat(found).numpy()

    return through
