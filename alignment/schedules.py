"""Learning rates over the steps of a run."""

import math
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_schedule(
    optimizer: Optimizer, steps: int | float, warmup: float, decay: Literal["constant", "cosine", "linear"]
) -> LambdaLR:
    """A linear rise over the first ``warmup * steps`` steps, then a constant rate or a decay to zero at ``steps``."""
    rise = warmup * steps if math.isfinite(steps) else 0

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / (rise + 1)
        progress = min((step - rise) / max(steps - rise, 1), 1.0)
        return {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[decay]

    return LambdaLR(optimizer, factor)
