"""An optimizer for small networks that are trained from scratch."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer


class MuonAdamW(Optimizer):
    """Muon (Jordan et al., 2024) for matrices and convolutions, AdamW for everything else. For unsharded parameters.

    A convolution's kernel (out, in, ...) is updated as the matrix (out, in x ...), through a view of the same memory.

    Args:
        params: parameters. lr: of matrices, whose updates are orthogonal. rest_lr: of the others. momentum, betas,
            weight_decay: as the two name them; the others do not decay.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 0.02, rest_lr: float = 2e-3, momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98), weight_decay: float = 0.01,
    ) -> None:  # fmt: skip
        self._params = list(params)
        is_matrix = [p.ndim >= 2 and 1 < len(p) < p.numel() for p in self._params]
        # (parameter, what Muon is given): the parameter itself or its view as a matrix
        self._matrices = [
            (p, p if p.ndim == 2 else nn.Parameter(p.data.view(len(p), -1)))
            for p, matrix in zip(self._params, is_matrix) if matrix
        ]  # fmt: skip
        rest = [p for p, matrix in zip(self._params, is_matrix) if not matrix]
        if not self._matrices or not rest:
            raise ValueError("MuonAdamW wants matrices and other parameters; use AdamW")
        views = [view for _, view in self._matrices]
        self._muon = Muon(views, lr=lr, momentum=momentum, weight_decay=weight_decay, adjust_lr_fn="original")
        self._adam = AdamW(rest, lr=rest_lr, betas=tuple(betas), weight_decay=0.0)
        super().__init__([{"params": views, "lr": lr}, {"params": rest, "lr": rest_lr}], {})
        self._share([*self._muon.param_groups, *self._adam.param_groups])

    def _share(self, groups: list[dict[str, Any]]) -> None:
        """Let the two work on these groups, and on one common state: schedulers and checkpoints see both."""
        self.param_groups = groups
        self._muon.param_groups, self._adam.param_groups = groups[:1], groups[1:]
        self._muon.state = self._adam.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of each."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for parameter, view in self._matrices:
            if view is not parameter:
                view.grad = None if parameter.grad is None else parameter.grad.view_as(view)
        self._muon.step()
        self._adam.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of the parameters, not of their views."""
        for parameter in self._params:
            parameter.grad = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a checkpoint."""
        super().load_state_dict(state_dict)
        self._share(self.param_groups)
