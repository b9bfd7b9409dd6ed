"""An optimizer for small networks that are trained from scratch."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from ... import VideoAlignError


class MuonAdamW(Optimizer):
    """Muon (Jordan et al., 2024) for matrices and convolutions, AdamW for everything else.

    It serves unsharded parameters only. A convolution's kernel (out, in, ...) is updated as the matrix (out, in x ...),
    through a view of the same memory.

    Args:
        params: Parameters to train, or groups of them. It makes two groups of its own, ``matrices`` and ``rest``, so
            that groups with rates of their own are refused.
        lr: Learning rate of matrices, whose updates are orthogonal.
        rest_lr: Learning rate of all other parameters.
        momentum: Momentum of Muon.
        betas: Coefficients of AdamW's running averages.
        weight_decay: Weight decay of matrices; the other parameters do not decay.
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
        # pairs of a parameter and what Muon is given in its place: itself, or a view as a matrix
        self._views = [(p, p if p.ndim == 2 else nn.Parameter(p.data.view(len(p), -1))) for p in matrices]
        self._muon = Muon(
            [v for _, v in self._views], lr=lr, momentum=momentum, weight_decay=weight_decay, adjust_lr_fn="original"
        )
        self._adam = AdamW(rest, lr=rest_lr, betas=tuple(betas), weight_decay=0.0)
        # schedulers, clipping and checkpoints see the parameters themselves
        super().__init__(
            [
                {**self._muon.param_groups[0], "params": matrices, "name": "matrices"},
                {**self._adam.param_groups[0], "params": rest, "name": "rest"},
            ],
            {},
        )

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
        for inner, group in zip((self._muon, self._adam), self.param_groups):
            inner.param_groups[0].update(
                {name: value for name, value in group.items() if name not in ("params", "name")}
            )
        self._adam.state = self.state
        for parameter, view in self._views:
            if parameter.data_ptr() != view.data_ptr():
                raise RuntimeError("a parameter's memory was replaced after its optimizer was made")
            if view is not parameter:
                view.grad = None if parameter.grad is None else parameter.grad.view_as(view)
            if parameter in self.state:
                self._muon.state[view] = self.state[parameter]
        self._muon.step()
        self._adam.step()
        for parameter, view in self._views:
            if view in self._muon.state:
                self.state[parameter] = self._muon.state[view]
            if view is not parameter:
                view.grad = None
        return loss
