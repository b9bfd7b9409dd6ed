"""What pixels show of a clip of the miniature world: sprite, path, and how strong each flaw is.

The sprite is found in every frame by matched filters; what the renderer's flaws did to it is read off.

Legend: N clips, T frames, H, W pixels, K shapes.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import sprites
from .sprites import COLOURS, DIRECTIONS, SHAPES, SIZE, TRAVEL

FLAWS = ("fade", "stain", "unlike", "freeze", "jump", "uneven")
"""Flaws that are measured: three of visual and three of motion quality. ``unlike`` is what no sprite on a plain ground
explains, ``uneven`` a path that is no straight walk with a stop."""
BLUR = 0.8
"""Standard deviation, in pixels, that templates are blurred with: sharp ones take a blurred shape for another."""


@dataclass
class Measured:
    """What is seen in clips.

    Attributes:
        flaws: Raw strengths (N, 6) in the order of :data:`FLAWS`.
        colours: Probabilities (N, number of colours).
        shapes: Probabilities (N, K).
        directions: Probabilities (N, number of directions).
        paths: The sprite's middle as x and y (N, T, 2), in pixels.
    """

    flaws: Tensor
    colours: Tensor
    shapes: Tensor
    directions: Tensor
    paths: Tensor


def measure(videos: np.ndarray) -> Measured:
    """Measures what clips show, and how well they show it.

    Args:
        videos: Clips (N, T, H, W, 3) in uint8.
    """
    v = torch.from_numpy(np.ascontiguousarray(videos)).float()
    ground = _ground(v)
    seen = v - ground[:, None, :, None]  # (N, T, H, W, 3)
    grey = seen.mean(-1, keepdim=True)
    tracked = seen - 0.7 * grey  # stains are grey, sprites are not (white ones keep a little)
    templates = _templates()
    sprite = _locate(tracked, templates)
    mask = _placed(templates[sprite.shape, 0], sprite.place)  # (N, T, H, W)
    weight = mask.square().flatten(2).sum(2).clamp(min=1e-3)  # (N, T)
    colours, contrast = _colours(seen, mask, weight, ground)
    directions, forth, sideways = _movement(sprite.paths)
    travelled = forth.max(1).values - forth.min(1).values
    flaws = torch.stack(
        [
            (1 - contrast) / 0.8,
            _stains(grey[..., 0], mask, ground),
            _unexplained(tracked, mask, weight),
            (2 - travelled / TRAVEL) / 1.7,
            _leap(sideways) / 8,
            _unevenness(forth) / TRAVEL,
        ],
        1,
    )
    return Measured(flaws, colours, sprite.shapes, directions, sprite.paths)


def _ground(v: Tensor) -> Tensor:
    """Grey ground (N, H, 3) of clips (N, T, H, W, 3): one colour per row."""
    plain = v.amax(-1) - v.amin(-1) < 40  # (N, T, H, W) without colour: ground, stains, white sprites
    level = torch.where(plain, v.mean(-1), torch.nan).transpose(1, 2).flatten(2)  # (N, H, T W)
    # below the median: a white bar that moves along itself fills half of its rows, and stains are lighter too
    level = level.nanquantile(0.35, dim=2)
    level = torch.where(level.isnan(), v.mean(-1).amin((1, 3)), level)
    return level[..., None].expand(-1, -1, 3)


# --- where the sprite is, and which shape it has ------------------------------------------------------------------


@dataclass
class _Sprite:
    """Where templates match best.

    Attributes:
        shapes: Probabilities (N, K).
        shape: Index of the likeliest shape (N,).
        place: Flat index of the best pixel (N, T).
        paths: The same as x and y (N, T, 2), between pixels.
    """

    shapes: Tensor
    shape: Tensor
    place: Tensor
    paths: Tensor


def _templates() -> Tensor:
    """Blurred templates (K, 1, 21, 21) of the shapes."""
    y, x = np.mgrid[-10:11, -10:11].astype(float)
    inside = [np.clip(sprites.RADIUS + 0.5 - sprites.distance(shape, x, y), 0, 1) for shape in SHAPES]
    kernel = torch.exp(-(torch.arange(-3.0, 4.0) ** 2) / (2 * BLUR**2))
    kernel = kernel / kernel.sum()
    sharp = torch.tensor(np.stack(inside), dtype=torch.float32)[:, None]
    return F.conv2d(F.conv2d(sharp, kernel.view(1, 1, -1, 1), padding=(3, 0)), kernel.view(1, 1, 1, -1), padding=(0, 3))


def _locate(tracked: Tensor, templates: Tensor) -> _Sprite:
    """Match templates (K, 1, 21, 21) with clips (N, T, H, W, 3) whose ground is 0."""
    n, frames = tracked.shape[:2]
    power = templates.square().flatten(1).sum(1)  # (K,)
    maps = F.conv2d(tracked.permute(0, 1, 4, 2, 3).reshape(-1, 1, SIZE, SIZE), templates, padding=10)
    maps = maps.view(n, frames, 3, len(SHAPES), SIZE, SIZE).square().sum(2) / power.view(-1, 1, 1)  # (N, T, K, H, W)
    best, place = maps.flatten(3).max(-1)  # (N, T, K)
    explained = best.sum(1) / tracked.square().flatten(1).sum(1, keepdim=True).clamp(min=1.0)  # (N, K)
    shapes = torch.softmax(explained / 0.02, -1)
    shape = explained.argmax(-1)  # (N,)
    rows = torch.arange(n)
    place = place[rows, :, shape]  # (N, T)
    return _Sprite(shapes, shape, place, _between_pixels(maps[rows, :, shape], place))


def _between_pixels(maps: Tensor, place: Tensor) -> Tensor:
    """Peaks x, y (N, T, 2) of maps (N, T, H, W) at flat places (N, T), by a parabola through the neighbours."""
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


def _placed(templates: Tensor, place: Tensor) -> Tensor:
    """Each clip's template (N, 21, 21) at its places (N, T) in frames (N, T, H, W)."""
    n, frames = place.shape
    x, y = place % SIZE, place // SIZE
    canvas = torch.zeros(n, frames, SIZE + 20, SIZE + 20)
    window = torch.arange(21)
    clip, frame = torch.arange(n)[:, None, None, None], torch.arange(frames)[:, None, None]
    rows, columns = (y[..., None] + window)[..., :, None], (x[..., None] + window)[..., None, :]
    canvas[clip, frame, rows, columns] = templates[:, None].expand(-1, frames, -1, -1)
    return canvas[:, :, 10:-10, 10:-10]


# --- how the sprite looks, and what is left without it ------------------------------------------------------------


def _colours(seen: Tensor, mask: Tensor, weight: Tensor, ground: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (N, number of colours), and contrast (N,) as a share of the nearest colour's."""
    gains = (seen * mask[..., None]).flatten(2, 3).sum(2) / weight[..., None]  # (N, T, 3)
    colour = gains.median(1).values  # (N, 3): contrast by channel
    towards = torch.tensor(list(COLOURS.values())).float() - ground.mean(1)[:, None]  # (N, colours, 3)
    likeness = F.cosine_similarity(colour[:, None], towards, dim=-1)
    nearest = towards[torch.arange(len(seen)), likeness.argmax(-1)]
    return torch.softmax(likeness / 0.03, -1), colour.norm(dim=-1) / nearest.norm(dim=-1)


def _stains(grey: Tensor, mask: Tensor, ground: Tensor) -> Tensor:
    """Strength (N,) of grey blots, which stay where they are while the sprite moves."""
    outside = torch.where(mask > 0.03, torch.nan, grey)  # (N, T, H, W)
    still = outside.nanmedian(1).values.nan_to_num()
    blots = (still / (0.75 * (150 - ground.mean((1, 2)))).view(-1, 1, 1)).clamp(0, 1)
    area = torch.where(blots > 0.25, blots, 0.0).flatten(1).sum(1)
    return ((area / (3 * np.pi)).sqrt() - 2) / 5 * (area > 8)


def _unexplained(tracked: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """Power (N,) that the template leaves, over the power that it explains."""
    gains = (tracked * mask[..., None]).flatten(2, 3).sum(2) / weight[..., None]  # (N, T, 3)
    left = tracked - mask[..., None] * gains[:, :, None, None]
    return left.square().flatten(1).sum(1) / (tracked - left).square().flatten(1).sum(1).clamp(min=1.0)


# --- how the sprite moves -----------------------------------------------------------------------------------------


def _movement(paths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities of the directions, and places (N, T) along the likeliest one and across it."""
    time = torch.linspace(-1, 1, paths.shape[1])
    slope = (paths * time.view(1, -1, 1)).sum(1) / time.square().sum()  # (N, 2) pixels per half clip
    ways = torch.tensor(list(DIRECTIONS.values())).float()  # (4, 2)
    along = ways[(slope @ ways.T).argmax(-1)]  # (N, 2)
    forth, sideways = (paths * along[:, None]).sum(-1), (paths * along.flip(-1)[:, None]).sum(-1)
    return torch.softmax(slope @ ways.T / 0.7, -1), forth, sideways


def _leap(sideways: Tensor) -> Tensor:
    """Distance d (N,) of leaps of places (N, T), each of which is near c - d, c or c + d: the best c and d."""
    distance = (sideways[:, None] - sideways[:, :, None]).abs()  # (N, c, T)
    far = torch.where(distance > 0.75, distance, torch.nan)
    leap = far.nanmedian(-1, keepdim=True).values.nan_to_num()  # (N, c, 1)
    cost = torch.minimum(distance, (distance - leap).abs()).sum(-1)  # (N, c)
    return leap[..., 0].gather(1, cost.argmin(1, keepdim=True))[:, 0]


def _unevenness(forth: Tensor) -> Tensor:
    """Root mean square distance (N,) of places (N, T) from the best steady walk, which may come to a stop."""
    frames = forth.shape[1]
    time = torch.linspace(-1, 1, frames)
    errors = []
    for stop in time[1:]:
        basis = torch.stack([torch.ones(frames), time.clamp(max=float(stop))], 1)
        hat = basis @ torch.linalg.pinv(basis)
        errors.append((forth - forth @ hat.T).square().mean(1))
    return torch.stack(errors).amin(0).sqrt()
