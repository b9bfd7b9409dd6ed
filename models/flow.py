r"""Rectified flow: the path from data to noise, its velocity, and the distributions of training times.

t = 0 is data, t = 1 is noise (VideoAlign, section 4.1):

.. math:: x_t = (1 - t)\, x_0 + t\, x_1, \qquad v = x_1 - x_0

Sampling integrates from 1 to 0. Libraries with the opposite sign or another unit of time are converted where they are
called (:mod:`.generator`), nowhere else.

Legend: N samples; C, F, H, W channels, frames, height and width of latents.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor

from .. import VideoAlignError

TIMES = 1000
"""Number of time steps that diffusers' schedulers and transformers divide [0, 1] into."""
_PIECE = 1 << 15
"""Number of values that a GPU draws at once, fewer than the threads that any but an embedded one runs.

With more values than threads the numbers depend on the GPU's model (pytorch/pytorch#143086)."""


def expand(t: Tensor, like: Tensor) -> Tensor:
    """Times (N,) in the shape (N, 1, ...), which broadcasts over ``like`` (N, ...)."""
    return t.view(-1, *[1] * (like.ndim - 1))


def interpolate(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    r"""The point :math:`x_t` on the path between data and noise.

    Args:
        data: Samples (N, ...) at t = 0.
        noise: Noise (N, ...) at t = 1.
        t: Times (N,) in [0, 1].
    """
    t = expand(t, data).to(data.dtype)
    return (1 - t) * data + t * noise


def squared_error(velocity: Tensor, data: Tensor, noise: Tensor, clean_frames: int = 0) -> Tensor:
    """Squared error (N,) of a velocity, in fp32: the *mean* over all elements of a sample that are noised.

    The paper prints a sum (``norm().pow(2)``). Its authors' code, and every suite that names a beta, takes the mean.
    With 2 million elements the two differ by that factor in beta.

    Args:
        velocity: Predicted velocity (N, ...).
        data: Samples (N, ...) at t = 0.
        noise: Noise (N, ...) at t = 1.
        clean_frames: Number of first frames of latents (N, C, F, H, W) that are given and not noised.
    """
    error = velocity.float() - (noise.float() - data.float())
    return (error[:, :, clean_frames:] if clean_frames else error).square().flatten(1).mean(1)


@dataclass(frozen=True, kw_only=True)
class TimeLaw:
    """Distribution of the training times t in (0, 1)."""

    law: Literal["uniform", "logit_normal"] = "uniform"
    """``uniform`` over (0, 1), the paper's choice, or ``logit_normal``, the sigmoid of a normal variable (Esser et al.,
    2024)."""
    mean: float = 0.0
    """Mean of the normal variable under ``logit_normal``. Values above 0 give more times near the noise at t = 1."""
    std: float = 1.0
    """Standard deviation of the normal variable under ``logit_normal``, above 0."""
    shift: float = 1.0
    """Factor s > 0 of the map t -> s t / (1 + (s - 1) t), applied last. Values above 1 give more times near the noise,
    as samplers of large videos use; 1 changes nothing."""
    lowest: float = 0.0
    """Smallest time in [0, 1]. The distribution between ``lowest`` and ``highest`` is that of the law there."""
    highest: float = 1.0
    """Largest time in [0, 1]. Of a generator with two experts, one trains on the times of its own interval alone."""

    def __post_init__(self) -> None:
        if self.law not in ("uniform", "logit_normal"):
            raise VideoAlignError(f"times.law {self.law!r} is unknown; choose uniform or logit_normal")
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf and 0 < self.shift < math.inf):
            raise VideoAlignError(f"times: mean must be finite, std and shift positive, got {self}")
        if not 0 <= self.lowest < self.highest <= 1:
            raise VideoAlignError(f"times: 0 <= lowest < highest <= 1 is needed, got {self}")

    def within(self, lowest: float, highest: float) -> "TimeLaw":
        """This law, restricted to a smaller interval of times.

        Args:
            lowest: Smallest time.
            highest: Largest time.

        Raises:
            VideoAlignError: If no time is left.
        """
        low, high = max(lowest, self.lowest), min(highest, self.highest)
        if low >= high:
            raise VideoAlignError(
                f"times from {self.lowest:g} to {self.highest:g} are outside of those that this transformer works at, "
                f"{lowest:g} to {highest:g}: change times.lowest and times.highest, or the expert"
            )
        return replace(self, lowest=low, highest=high)

    def _below(self, t: float) -> float:
        """Probability of times below t under the whole law: the inverse of the map from uniform variables."""
        u = t / (self.shift - (self.shift - 1) * t)
        if self.law == "logit_normal" and 0 < u < 1:
            u = NormalDist(self.mean, self.std).cdf(math.log(u / (1 - u)))
        return u

    def __call__(self, u: Tensor) -> Tensor:
        """Map uniform variables (N,) in [0, 1) to times (N,)."""
        if (self.lowest, self.highest) == (0, 1):
            return self._times(u)
        low, high = self._below(self.lowest), self._below(self.highest)
        return self._times(low + (high - low) * u).clamp(self.lowest, self.highest)

    def _times(self, u: Tensor) -> Tensor:
        if self.law == "logit_normal":
            inside = u.double().clamp(1e-9, 1 - 1e-9)
            u = torch.sigmoid(self.mean + self.std * torch.special.ndtri(inside)).to(u.dtype)
        return self.shift * u / (1 + (self.shift - 1) * u)

    def to_dict(self) -> dict:
        """Settings as plain JSON values; those of the interval where it is not the whole one."""
        settings = asdict(self)
        if (self.lowest, self.highest) == (0, 1):  # as caches of earlier releases state them
            del settings["lowest"], settings["highest"]
        return settings


def draw_seed(*what: object) -> int:
    """Derive a seed from what a draw belongs to, such as (seed, epoch, key), so that no rank or resumption changes it.

    Args:
        what: Values whose ``repr`` identifies the draw.

    Returns:
        A whole number in [0, 2**63).
    """
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:8], "little") >> 1


def draw(seeds: Tensor, shape: torch.Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw a uniform variable and noise for each sample from its own seed, so that ranks do not matter.

    Args:
        seeds: Seeds (N,) of the samples, int64.
        shape: Shape of one sample's noise.
        device: Device to draw on. A CPU and a GPU give different numbers, GPUs of any model the same.

    Returns:
        Uniform variables (N,) in [0, 1) and standard normal noise (N, *shape).
    """
    uniform, noise = [], []
    for seed in seeds.tolist():
        generator = torch.Generator(device).manual_seed(seed)
        uniform.append(torch.rand((), generator=generator, device=device))
        noise.append(normal(shape, generator))
    return torch.stack(uniform), torch.stack(noise)


def normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard normal noise of a shape on the generator's device, the same on GPUs of any model.

    Args:
        shape: Shape of the noise.
        generator: What draws it.
    """
    device, count = generator.device, math.prod(shape)
    piece = _PIECE if device.type == "cuda" else count
    sizes = [min(piece, count - first) for first in range(0, count, piece)]
    return torch.cat([torch.randn(size, generator=generator, device=device) for size in sizes]).view(*shape)
