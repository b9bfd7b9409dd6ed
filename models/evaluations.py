"""What sampling costs, counted in evaluations of the generator's transformer on one video."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from .generator import Generator
from .noisy_reward import NoisyReward

BACKWARD = 3.0
"""Cost of a forward pass with a backward pass behind it, in forward passes: the blocks' activations are computed again
(checkpointing), and the gradient of frozen layers costs about as much as a forward pass."""


class Evaluations:
    """Counts the passes of a generator and its noisy reward during a block.

    A video's pass through the transformer counts 1, so that a step with classifier-free guidance counts 2. A pass of
    the noisy reward counts as the share of the transformer's blocks that it copies. With gradients a pass counts
    :data:`BACKWARD` times. Autoencoder and text encoder are not counted.

    Args:
        generator: The generator.
        reward: Its noisy reward, if there is one.

    Attributes:
        total: Evaluations so far.
    """

    def __init__(self, generator: Generator, reward: NoisyReward | None = None) -> None:
        self.total = 0.0
        self._shares: dict[nn.Module, float] = {net: 1.0 for net in (generator.transformer, generator.other) if net}
        if reward:
            copied, whole = (len(getattr(net, generator.blocks)) for net in (reward.trunk, generator.transformer))
            self._shares[reward.trunk] = copied / whole

    def __enter__(self) -> Self:
        self._hooks = [net.register_forward_pre_hook(self._count, with_kwargs=True) for net in self._shares]
        return self

    def __exit__(self, *why: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _count(self, net: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        videos = len(next(given for given in (*args, *kwargs.values()) if isinstance(given, Tensor)))
        self.total += videos * self._shares[net] * (BACKWARD if torch.is_grad_enabled() else 1.0)
