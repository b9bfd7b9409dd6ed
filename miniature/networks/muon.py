"""An optimizer for small networks that are trained from scratch."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from ... import VideoAlignError

COEFFICIENTS, ITERATIONS = (3.4445, -4.775, 2.0315), 5
"""The quintic iteration of Muon, whose slope at zero is as large as possible."""


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices (N, a, b) whose singular values become about 1, from 0.7 to 1.2, by Newton-Schulz iterations.

    torch's Muon does the same in bfloat16, which takes 3 to 14 times as long where a processor emulates it.

    Args:
        matrices: Updates of N parameters of one shape.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT  # (N, a, a)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class MuonAdamW(Optimizer):
    """Muon (Jordan et al., 2024) for matrices and convolutions, AdamW for everything else.

    It serves unsharded parameters only. A convolution's kernel (out, in, ...) is updated as the matrix (out, in x ...).

    Args:
        params: Parameters to train, or groups of them. It makes two groups of its own, ``matrices`` and ``rest``, so
            that groups with rates of their own are refused.
        lr: Learning rate of matrices, whose updates are orthogonal.
        rest_lr: Learning rate of all other parameters.
        momentum: Momentum of Muon.
        betas: Coefficients of AdamW's running averages.
        weight_decay: Weight decay of matrices; the other parameters do not decay.

    Raises:
        ValueError: A setting is outside its range, as with torch's own optimizers.
    """

    def __init__(
        self,
        params: Iterable[Tensor | dict[str, Any]],
        lr: float = 0.02,
        rest_lr: float = 2e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.01,
    ) -> None:
        for name, value in {"learning rate": lr, "rest_lr": rest_lr, "weight_decay": weight_decay}.items():
            if not 0.0 <= value < math.inf:  # false for NaN, too
                raise ValueError(f"Invalid {name}: {value}")
        for name, value in {"momentum": momentum, "beta 1": betas[0], "beta 2": betas[1]}.items():
            if not 0.0 <= value < 1.0:
                raise ValueError(f"Invalid {name}: {value}")
        every = []
        for given in params:
            if isinstance(given, dict) and "lr" in given:
                raise VideoAlignError(f"model.groups: MuonAdamW has no rates by group, such as {given.get('name')}'s")
            every += given["params"] if isinstance(given, dict) else [given]
        matrices = [p for p in every if p.ndim >= 2 and 1 < len(p) < p.numel()]
        known = {id(p) for p in matrices}
        rest = [p for p in every if id(p) not in known]
        if not matrices or not rest:
            raise ValueError("MuonAdamW wants matrices and other parameters; use AdamW")
        self._adam = AdamW(rest, lr=rest_lr, betas=tuple(betas), weight_decay=0.0)
        own = {"params": matrices, "name": "matrices", "lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([own, {**self._adam.param_groups[0], "params": rest, "name": "rest"}], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step of both optimizers.

        Args:
            closure: Computes the loss once more, as for every optimizer.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group, rest = self.param_groups
        by_shape: dict[tuple[int, int], list[Tensor]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape.setdefault(parameter.flatten(1).shape, []).append(parameter)
        for alike in by_shape.values():
            self._orthogonal_step(alike, **{k: group[k] for k in ("lr", "momentum", "weight_decay")})
        # schedulers, clipping and checkpoints see this optimizer's groups and state
        self._adam.param_groups[0].update({k: v for k, v in rest.items() if k not in ("params", "name")})
        self._adam.state = self.state
        self._adam.step()
        return loss

    def _orthogonal_step(self, alike: Sequence[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        """Muon's step of parameters that are matrices (a, b) of one shape."""
        updates = []
        for parameter in alike:
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            average = state["momentum_buffer"]
            average.lerp_(parameter.grad, 1 - momentum)
            updates.append(parameter.grad.lerp(average, momentum).flatten(1))  # Nesterov's momentum
        stacked = orthogonal(torch.stack(updates))  # (N, a, b)
        rate = lr * max(1.0, stacked.shape[1] / stacked.shape[2]) ** 0.5
        for parameter, update in zip(alike, stacked):
            parameter.mul_(1 - lr * weight_decay).add_(update.view_as(parameter), alpha=-rate)
