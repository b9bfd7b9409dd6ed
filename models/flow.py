r"""Rectified flow: the path from data to noise, its velocity, and the distributions of training times.

t = 0 is data, t = 1 is noise (VideoAlign, section 4.1):

.. math:: x_t = (1 - t)\, x_0 + t\, x_1, \qquad v = x_1 - x_0

Sampling integrates from 1 to 0. Libraries with the opposite sign or another unit of time are converted where they are
called (:mod:`.generator`), nowhere else.

Legend: N samples; C, F, H, W channels, frames, height and width of latents.
"""

import hashlib
import math
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from .. import VideoAlignError


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


def squared_error(velocity: Tensor, data: Tensor, noise: Tensor) -> Tensor:
    """Squared error (N,) of a velocity, in fp32: the *mean* over all elements of a sample.

    The paper prints a sum (``norm().pow(2)``). Its authors' code, and every suite that names a beta, takes the mean.
    With 2 million elements the two differ by that factor in beta.

    Args:
        velocity: Predicted velocity (N, ...).
        data: Samples (N, ...) at t = 0.
        noise: Noise (N, ...) at t = 1.
    """
    return (velocity.float() - (noise.float() - data.float())).square().flatten(1).mean(1)


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

    def __post_init__(self) -> None:
        if self.law not in ("uniform", "logit_normal"):
            raise VideoAlignError(f"times.law {self.law!r} is unknown; choose uniform or logit_normal")
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf and 0 < self.shift < math.inf):
            raise VideoAlignError(f"times: mean must be finite, std and shift positive, got {self}")

    def __call__(self, u: Tensor) -> Tensor:
        """Map uniform variables (N,) in [0, 1) to times (N,)."""
        if self.law == "logit_normal":
            inside = u.double().clamp(1e-9, 1 - 1e-9)
            u = torch.sigmoid(self.mean + self.std * torch.special.ndtri(inside)).to(u.dtype)
        return self.shift * u / (1 + (self.shift - 1) * u)

    def to_dict(self) -> dict:
        """Settings as plain JSON values."""
        return asdict(self)


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
        device: Device to draw on. Kinds of devices give different numbers; two devices of one kind give the same.

    Returns:
        Uniform variables (N,) in [0, 1) and standard normal noise (N, *shape).
    """
    uniform, noise = [], []
    for seed in seeds.tolist():
        generator = torch.Generator(device).manual_seed(seed)
        uniform.append(torch.rand((), generator=generator, device=device))
        noise.append(torch.randn(shape, generator=generator, device=device))
    return torch.stack(uniform), torch.stack(noise)
