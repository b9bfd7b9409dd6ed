r"""Rectified flow: the path from data to noise, its velocity, and the laws that training times are drawn from.

t = 0 is data, t = 1 is noise (VideoAlign, section 4.1):

.. math:: x_t = (1 - t)\, x_0 + t\, x_1, \qquad v = x_1 - x_0

Sampling integrates from 1 to 0. A library with the opposite sign or another unit of time is converted where it is
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
    """(N,) times with ones appended, to multiply ``like`` (N, ...)."""
    return t.view(-1, *[1] * (like.ndim - 1))


def interpolate(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t of (N, ...) data and noise at times (N,)."""
    t = expand(t, data).to(data.dtype)
    return (1 - t) * data + t * noise


def squared_error(velocity: Tensor, data: Tensor, noise: Tensor) -> Tensor:
    """(N,) squared error of a velocity, in fp32, the *mean* over all elements of a sample.

    The paper prints a sum (``norm().pow(2)``); its authors' code, and every suite that names a beta, takes the mean.
    With 2 million elements the two differ by that factor in beta.
    """
    return (velocity.float() - (noise.float() - data.float())).square().flatten(1).mean(1)


@dataclass(frozen=True, kw_only=True)
class TimeLaw:
    """What training times are drawn from."""

    law: Literal["uniform", "logit_normal"] = "uniform"
    """Uniform in (0, 1), the paper's choice, or the sigmoid of a normal variable (Esser et al., 2024)."""
    mean: float = 0.0
    """Of the normal variable."""
    std: float = 1.0
    """Of the normal variable."""
    shift: float = 1.0
    """t -> s t / (1 + (s - 1) t) afterwards: above 1 more of the noisy times, as samplers of large videos use."""

    def __post_init__(self) -> None:
        if self.law not in ("uniform", "logit_normal"):
            raise VideoAlignError(f"times.law {self.law!r} is unknown; choose uniform or logit_normal")
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf and 0 < self.shift < math.inf):
            raise VideoAlignError(f"times: mean must be finite, std and shift positive, got {self}")

    def __call__(self, u: Tensor) -> Tensor:
        """Uniform variables (N,) as times."""
        if self.law == "logit_normal":
            inside = u.double().clamp(1e-9, 1 - 1e-9)
            u = torch.sigmoid(self.mean + self.std * torch.special.ndtri(inside)).to(u.dtype)
        return self.shift * u / (1 + (self.shift - 1) * u)

    def to_dict(self) -> dict:
        """As plain JSON values."""
        return asdict(self)


def draw_seed(*what: object) -> int:
    """A seed of what a draw belongs to, such as (seed, epoch, key): the same on every rank, worker and resumption."""
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:8], "little") >> 1


def draw(seeds: Tensor, shape: torch.Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """Uniform variables (N,) and noise (N, *shape), each sample's from its own seed, so that no rank matters.

    Args:
        seeds: (N,) int64. shape: of one sample. device: numbers differ between kinds of devices, not between two of one.
    """
    uniform, noise = [], []
    for seed in seeds.tolist():
        generator = torch.Generator(device).manual_seed(seed)
        uniform.append(torch.rand((), generator=generator, device=device))
        noise.append(torch.randn(shape, generator=generator, device=device))
    return torch.stack(uniform), torch.stack(noise)
