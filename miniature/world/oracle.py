"""The miniature world's judge: how good a clip is, from its pixels and its prompt alone.

It finds the sprite in every frame by matched filters, and reads off what the renderer's flaws did to it. Real video
generation has no such judge: here it tells a better generator from a fooled reward model. Strengths of flaws as measured
are mapped to true ones by renders that went through the same autoencoder, because what a small autoencoder blurs is no
flaw of a generator behind it.

Legend: N clips, T frames, H, W pixels, K shapes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
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
from .sprites import COLOURS, CONTENTS, DIRECTIONS, SHAPES, SIZE, TA_WEIGHTS, TRAVEL, Content, Flaws

FLAWS = ("fade", "stain", "unlike", "freeze", "jump", "uneven")
"""What is measured: three of visual and three of motion quality. ``unlike`` is what no sprite on a plain ground explains,
``uneven`` a path that is no straight walk with a stop."""
BLUR = 0.8
"""Of the templates, pixels: sharp ones take a blurred shape for another."""
BY_PROMPT = {content.prompt: content for content in CONTENTS}

RoundTrip = Callable[[np.ndarray], np.ndarray]
"""uint8 (N, T, H, W, 3) -> the same, through an autoencoder."""


def _templates() -> Tensor:
    """(K, 1, 21, 21) of the shapes, blurred."""
    y, x = np.mgrid[-10:11, -10:11].astype(float)
    inside = [np.clip(sprites.RADIUS + 0.5 - sprites.distance(shape, x, y), 0, 1) for shape in SHAPES]
    kernel = torch.exp(-(torch.arange(-3.0, 4.0) ** 2) / (2 * BLUR**2))
    kernel = kernel / kernel.sum()
    sharp = torch.tensor(np.stack(inside), dtype=torch.float32)[:, None]
    return F.conv2d(F.conv2d(sharp, kernel.view(1, 1, -1, 1), padding=(3, 0)), kernel.view(1, 1, 1, -1), padding=(0, 3))


@dataclass
class Measured:
    """What is seen in clips.

    Attributes:
        flaws: (N, 6) raw strengths, see :data:`FLAWS`. colours, shapes, directions: (N, number) probabilities.
        paths: (N, T, 2) x and y of the sprite's middle, pixels.
    """

    flaws: Tensor
    colours: Tensor
    shapes: Tensor
    directions: Tensor
    paths: Tensor


def measure(videos: np.ndarray) -> Measured:
    """See in uint8 clips (N, T, H, W, 3) what they show and how well."""
    v = torch.from_numpy(np.ascontiguousarray(videos)).float()
    n, frames = v.shape[:2]
    plain = v.amax(-1) - v.amin(-1) < 40  # (N, T, H, W) without colour: ground, stains, white sprites
    level = torch.where(plain, v.mean(-1), torch.nan).transpose(1, 2).flatten(2)  # (N, H, T W)
    # below the median: a white bar that moves along itself fills half of its rows, and stains are lighter too
    level = level.nanquantile(0.35, dim=2)
    level = torch.where(level.isnan(), v.mean(-1).amin((1, 3)), level)
    ground = level[..., None].expand(-1, -1, 3)  # (N, H, 3) rows of a grey ground
    seen = v - ground[:, None, :, None]  # (N, T, H, W, 3)
    grey = seen.mean(-1, keepdim=True)
    tracked = seen - 0.7 * grey  # stains are grey, sprites are not (white ones keep a little)

    # --- where, and which shape -------------------------------------------------------------------------------
    templates = _templates()
    power = templates.square().flatten(1).sum(1)  # (K,)
    maps = F.conv2d(tracked.permute(0, 1, 4, 2, 3).reshape(-1, 1, SIZE, SIZE), templates, padding=10)
    maps = maps.view(n, frames, 3, len(SHAPES), SIZE, SIZE).square().sum(2) / power.view(-1, 1, 1)  # (N, T, K, H, W)
    best, place = maps.flatten(3).max(-1)  # (N, T, K)
    explained = best.sum(1) / tracked.square().flatten(1).sum(1, keepdim=True).clamp(min=1.0)  # (N, K)
    shapes = torch.softmax(explained / 0.02, -1)
    shape = explained.argmax(-1)  # (N,)
    rows = torch.arange(n)
    chosen = maps[rows, :, shape]  # (N, T, H, W)
    place = place[rows, :, shape]  # (N, T)
    paths = _between_pixels(chosen, place)  # (N, T, 2)

    # --- the sprite, and what is left -------------------------------------------------------------------------
    x, y = place % SIZE, place // SIZE
    canvas = torch.zeros(n, frames, SIZE + 20, SIZE + 20)
    window = torch.arange(21)
    canvas[
        rows[:, None, None, None],
        torch.arange(frames)[:, None, None],
        (y[..., None] + window)[..., :, None],
        (x[..., None] + window)[..., None, :],
    ] = templates[shape, 0][:, None].expand(-1, frames, -1, -1)
    mask = canvas[:, :, 10:-10, 10:-10]  # (N, T, H, W) the template in its place
    weight = mask.square().flatten(2).sum(2).clamp(min=1e-3)  # (N, T)
    gains = (seen * mask[..., None]).flatten(2, 3).sum(2) / weight[..., None]  # (N, T, 3)
    colour = gains.median(1).values  # (N, 3): contrast by channel
    towards = torch.tensor(list(COLOURS.values())).float() - ground.mean(1)[:, None]  # (N, colours, 3)
    likeness = F.cosine_similarity(colour[:, None], towards, dim=-1)
    colours = torch.softmax(likeness / 0.03, -1)
    nearest = towards[rows, likeness.argmax(-1)]
    contrast = colour.norm(dim=-1) / nearest.norm(dim=-1)
    outside = torch.where(mask > 0.03, torch.nan, grey[..., 0])  # (N, T, H, W)
    still = outside.nanmedian(1).values.nan_to_num()  # what stays while the sprite moves
    blots = (still / (0.75 * (150 - ground.mean((1, 2)))).view(-1, 1, 1)).clamp(0, 1)
    area = torch.where(blots > 0.25, blots, 0.0).flatten(1).sum(1)
    left = (
        tracked
        - mask[..., None] * ((tracked * mask[..., None]).flatten(2, 3).sum(2) / weight[..., None])[:, :, None, None]
    )
    unlike = left.square().flatten(1).sum(1) / (tracked - left).square().flatten(1).sum(1).clamp(min=1.0)

    # --- how it moves -----------------------------------------------------------------------------------------
    time = torch.linspace(-1, 1, frames)
    slope = (paths * time.view(1, -1, 1)).sum(1) / time.square().sum()  # (N, 2) pixels per half clip
    ways = torch.tensor(list(DIRECTIONS.values())).float()  # (4, 2)
    directions = torch.softmax(slope @ ways.T / 0.7, -1)
    along = ways[(slope @ ways.T).argmax(-1)]  # (N, 2)
    forth = (paths * along[:, None]).sum(-1)  # (N, T)
    sideways = (paths * along.flip(-1)[:, None]).sum(-1)
    travelled = forth.max(1).values - forth.min(1).values
    flaws = torch.stack(
        [
            (1 - contrast) / 0.8,
            ((area / (3 * np.pi)).sqrt() - 2) / 5 * (area > 8),
            unlike,
            (2 - travelled / TRAVEL) / 1.7,
            _leap(sideways) / 8,
            _unevenness(forth) / TRAVEL,
        ],
        1,
    )
    return Measured(flaws, colours, shapes, directions, paths)


def _between_pixels(maps: Tensor, place: Tensor) -> Tensor:
    """(N, T, 2) x, y of the peaks of maps (N, T, H, W) at flat places (N, T), by a parabola through the neighbours."""
    padded = F.pad(maps, (1, 1, 1, 1), mode="replicate").flatten(2)
    wide = SIZE + 2
    middle = (place // SIZE + 1) * wide + place % SIZE + 1

    def at(offset: int) -> Tensor:
        return padded.gather(2, (middle + offset)[..., None])[..., 0]

    found = []
    for step, start in ((1, place % SIZE), (wide, place // SIZE)):
        below, here, above = at(-step), at(0), at(step)
        bend = (below - 2 * here + above).clamp(max=-1e-6)
        found.append(start + (0.5 * (below - above) / bend).clamp(-0.5, 0.5))
    return torch.stack(found, -1)


def _leap(sideways: Tensor) -> Tensor:
    """(N,) distance d of the leaps of (N, T) places, each of which is near c - d, c or c + d: the best c and d."""
    distance = (sideways[:, None] - sideways[:, :, None]).abs()  # (N, c, T)
    far = torch.where(distance > 0.75, distance, torch.nan)
    leap = far.nanmedian(-1, keepdim=True).values.nan_to_num()  # (N, c, 1)
    cost = torch.minimum(distance, (distance - leap).abs()).sum(-1)  # (N, c)
    return leap[..., 0].gather(1, cost.argmin(1, keepdim=True))[:, 0]


def _unevenness(forth: Tensor) -> Tensor:
    """(N,) root mean square distance of (N, T) places from the best steady walk, which may come to a stop."""
    frames = forth.shape[1]
    time = torch.linspace(-1, 1, frames)
    errors = []
    for stop in time[1:]:
        basis = torch.stack([torch.ones(frames), time.clamp(max=float(stop))], 1)
        hat = basis @ torch.linalg.pinv(basis)
        errors.append((forth - forth @ hat.T).square().mean(1))
    return torch.stack(errors).amin(0).sqrt()


@dataclass
class Oracle:
    """True qualities of clips, as far as pixels show them.

    Attributes:
        scale: by flaw, offset and gain that map a measured strength to a true one.
    """

    scale: dict[str, tuple[float, float]] = field(default_factory=lambda: dict.fromkeys(FLAWS, (0.0, 1.0)))

    def __call__(self, videos: np.ndarray, prompts: Sequence[str]) -> Tensor:
        """(N, 3) qualities of VQ, MQ and TA in [0, 1] of uint8 clips (N, T, H, W, 3).

        Raises:
            VideoAlignError: where a prompt is none of the miniature world's, or clips have another size.
        """
        self.check(prompts, videos.shape[1:])
        if len(prompts) != len(videos):
            raise VideoAlignError(f"{len(videos)} clips and {len(prompts)} prompts: there must be one for each")
        found = measure(videos)
        flaws = self.strengths(found)
        contents = [BY_PROMPT[p] for p in prompts]
        right = torch.stack(
            [
                table[torch.arange(len(contents)), [list(names).index(getattr(c, kind)) for c in contents]]
                for kind, names, table in (
                    ("colour", COLOURS, found.colours),
                    ("shape", SHAPES, found.shapes),
                    ("direction", DIRECTIONS, found.directions),
                )
            ],
            1,
        )  # (N, 3)
        alignment = right @ torch.tensor(TA_WEIGHTS, dtype=torch.float32)
        return torch.stack([1 - flaws[:, :3].amax(1), 1 - flaws[:, 3:].amax(1), alignment], 1)

    @staticmethod
    def check(prompts: Sequence[str], shape: tuple[int, ...]) -> None:
        """Refuse prompts and clips (T, H, W, 3) that are none of the miniature world's."""
        if unknown := [p for p in prompts if p not in BY_PROMPT]:
            raise VideoAlignError(
                f"prompt {unknown[0]!r} is none of the miniature world, so its oracle cannot judge it"
            )
        if len(shape) != 4 or shape[1:] != (SIZE, SIZE, 3) or shape[0] < 3:
            raise VideoAlignError(
                f"clips of shape {tuple(shape)}: the oracle judges (T, {SIZE}, {SIZE}, 3), T at least 3"
            )

    def strengths(self, found: Measured) -> Tensor:
        """(N, 6) flaws as true strengths in [0, 1]."""
        offset, gain = torch.tensor([self.scale[name] for name in FLAWS]).T
        return ((found.flaws - offset) * gain).clamp(0, 1)

    @classmethod
    def calibrated(
        cls,
        round_trip: RoundTrip | None = None,
        contents: Sequence[Content] = CONTENTS,
        clips: int = 160,
        seed: int = 0,
    ) -> "Oracle":
        """An oracle to which clean renders are flawless after a round trip, and the worst are worst.

        Args:
            round_trip: what videos to be judged went through. contents: what they show. clips: renders per flaw. seed: of them.
        """
        rng = np.random.default_rng([seed, 77])
        scale = {}
        clean = measure(_rendered([Flaws()] * clips, contents, round_trip, rng)).flaws
        for number, name in enumerate(FLAWS):
            floor = float(clean[:, number].median())
            if name in ("unlike", "uneven"):  # the renderer has no such flaw: far outside of what it makes is bad
                low = float(clean[:, number].quantile(0.95))
                scale[name] = low, 1 / {"unlike": 0.6, "uneven": 0.4}[name]
                continue
            strengths = rng.uniform(0.2, 1, clips)
            flaws = measure(_rendered([Flaws(**{name: s}) for s in strengths], contents, round_trip, rng)).flaws[
                :, number
            ]
            x = flaws.double().numpy() - floor
            scale[name] = floor, float((x @ strengths) / max(x @ x, 1e-9))  # least squares through the clean level
        return cls(scale)

    def save(self, path: str | Path) -> None:
        """Write the calibration."""
        write_json(Path(path), asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> "Oracle":
        """Read it."""
        record = read_json(Path(path), "an oracle's calibration")
        try:
            scale = {name: (float(offset), float(gain)) for name in FLAWS for offset, gain in [record["scale"][name]]}
            if not all(
                isinstance(record["scale"][n], list) and math.isfinite(a) and math.isfinite(b)
                for n, (a, b) in scale.items()
            ):
                raise ValueError("a flaw's row is not a list of two finite numbers")
            return cls(scale)
        except (KeyError, TypeError, ValueError) as error:
            raise VideoAlignError(f"{path} is not the calibration of an oracle ({error})") from None


class OracleJudge:
    """The oracle as a judge of `videoalign compare`.

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
    flaws: Sequence[Flaws], contents: Sequence[Content], round_trip: RoundTrip | None, rng: np.random.Generator
) -> np.ndarray:
    """Clips (N, T, H, W, 3) of any of the contents with these flaws."""
    shown = [contents[i] for i in rng.integers(len(contents), size=len(flaws))]
    videos = np.stack([sprites.render(content, flaw, rng) for content, flaw in zip(shown, flaws)])
    return round_trip(videos) if round_trip else videos


def rank_correlations(oracle: Oracle, videos: np.ndarray, prompts: Sequence[str], true: np.ndarray) -> dict[str, float]:
    """Spearman correlation of the oracle's qualities with the true ones, by dimension.

    Args:
        oracle: calibrated for what the clips went through. videos: uint8 (N, T, H, W, 3). prompts: N. true: (N, 3) qualities.
    """
    found = spearman_corrcoef(oracle(videos, prompts), torch.tensor(true, dtype=torch.float32))
    return dict(zip(DIMENSIONS, found.tolist()))


def autoencoded(generator: Generator, batch_size: int = 32) -> RoundTrip:
    """Clips through a generator's autoencoder and back."""

    def through(videos: np.ndarray) -> np.ndarray:
        found = []
        for some in torch.from_numpy(videos).permute(0, 1, 4, 2, 3).split(batch_size):  # (B, T, 3, H, W)
            found.append(generator.decode(generator.encode_video(some)).permute(0, 1, 3, 4, 2))
        return torch.cat(found).numpy()

    return through
