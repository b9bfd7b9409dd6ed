"""A generator's module that keeps other policies beside the one that trains, as no more than the tensors that train.

The behaviour policy is the one that samples. It may trail the policy, and stays as it was while an iteration's updates
change the policy.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import VideoAlignError
from ..models.number_checks import at_least, positive
from ..models.parallelize import dealt_like, gathered, shard_again
from .flow_sft import FlowSFT


class Trailing:
    """A policy that trails the one that trains: at the end of iteration i it moves by all but a share of the way.

    The share is min(``decay``, ``rise`` (i - ``after``)), and 0 before iteration ``after``.

    Args:
        decay: Largest share that is kept, in [0, 1).
        rise: Share by which it rises with each iteration, from 0 on; it is ``decay`` at once if not given.
        after: Iteration from which on anything is kept.
        where: What stands before the names of these three in YAML, for messages.
    """

    def __init__(self, decay: float, rise: float | None = None, after: int = 0, where: str = "") -> None:
        if not 0 <= decay < 1:
            raise VideoAlignError(f"{where}decay is a share in [0, 1), got {decay}")
        positive(where, rise=rise)
        at_least(0, where, after=after)
        self.decay, self.rise, self.after = decay, rise, after
        self.tensors: dict[str, Tensor] = {}
        """Its tensors by name, once there was an iteration."""

    def share(self, iteration: int) -> float:
        """Share that is kept at the end of an iteration.

        Args:
            iteration: Number of the iteration.
        """
        passed = iteration - self.after
        if passed < 0:
            return 0.0
        return self.decay if self.rise is None else min(self.decay, self.rise * passed)

    @torch.no_grad()
    def follow(self, iteration: int, policy: Mapping[str, Tensor]) -> None:
        """Move towards the policy, as an iteration begins.

        It happens here and not at the end of the one before, because callbacks save their checkpoints in between.

        Args:
            iteration: Number of the iteration that begins.
            policy: A copy of the tensors of the policy.
        """
        share = self.share(iteration - 1) if self.tensors and iteration else 0.0
        if not share:
            self.tensors = dict(policy)
            return
        for name, value in policy.items():
            self.tensors[name].lerp_(value, 1 - share)


class KeepsPolicies(FlowSFT):
    """Keeps the behaviour policy; base of on-policy training.

    Args:
        old_decay: Largest share of the behaviour policy that is kept after an iteration, in [0, 1); with 0 each
            iteration samples from the policy as it is.
        old_rise: Share by which that rises with each iteration, from 0 on; it is ``old_decay`` at once if not given.
        old_after: Iteration from which on anything of the behaviour policy is kept; before it the share is 0.
        **kwargs: Arguments of :class:`FlowSFT`.
    """

    def __init__(
        self, old_decay: float = 0.0, old_rise: float | None = None, old_after: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.trailing = {"behaviour": Trailing(old_decay, old_rise, old_after, "model.old_")}
        """Policies that trail the one that trains, by name."""

    @contextlib.contextmanager
    def as_tensors(self, values: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """The transformer with other tensors in place of those that train, for a ``with`` block without gradients.

        No graph of the policy may be alive: its tensors are exchanged, and come back bit for bit.

        Args:
            values: All tensors that train, by name; with none of them the policy's own stay.
        """
        own = self.kept() if values else {}
        trained = self.trained() if values else {}
        with torch.no_grad():
            try:
                _assign(trained, values)
                yield self.policy
            finally:
                shard_again(self.policy)
                _assign(trained, own)

    def as_old(self) -> contextlib.AbstractContextManager[nn.Module]:
        """The behaviour policy for the time of a ``with`` block, as in :meth:`as_tensors`."""
        return self.as_tensors(self.trailing["behaviour"].tensors)

    def kept(self) -> dict[str, Tensor]:
        """A copy of the tensors that train, as they are now."""
        shard_again(self.policy)
        return {name: parameter.detach().clone() for name, parameter in self.trained().items()}

    def follow(self, iteration: int) -> None:
        """Move the policies that trail the one that trains, as an iteration begins.

        Args:
            iteration: Number of the iteration that begins.
        """
        for one in self.trailing.values():
            one.follow(iteration, self.kept())

    def on_train_start(self) -> None:
        """Bring what a checkpoint held to the device: Lightning reads it before it moves the module there."""
        super().on_train_start()
        trained = self.trained()
        self.take_further(
            {p: {n: t.to(trained[n].device) for n, t in of.items()} for p, of in self.further_tensors().items()}
        )

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def further_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Tensors by name that checkpoints keep besides those that train: another policy's, each under its own name."""
        return {name: one.tensors for name, one in self.trailing.items()}

    def take_further(self, found: dict[str, dict[str, Tensor]]) -> None:
        """Take tensors of a checkpoint back.

        Args:
            found: What :meth:`further_tensors` gave, on this module's devices.
        """
        for name, one in self.trailing.items():
            one.tensors = found[name]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the behaviour policy, from which a resumed run samples the iteration again. Collective if sharded."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["algorithm"] = type(self).__name__
        checkpoint["further_tensors"] = {
            policy: gathered(tensors) for policy, tensors in self.further_tensors().items()
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the behaviour policy back.

        Raises:
            VideoAlignError: If the checkpoint is of another model, or of no such training.
        """
        if (other := checkpoint.get("algorithm", type(self).__name__)) != type(self).__name__:
            raise VideoAlignError(
                f"the checkpoint is of {other}, and this run trains by {type(self).__name__}: go on with its own "
                "recipe, or begin anew from its exported adapters"
            )
        super().on_load_checkpoint(checkpoint)
        trained, further = self.trained(), checkpoint.get("further_tensors")
        want = sorted(self.further_tensors())
        if further is None or sorted(further) != want:
            kept = ", ".join(sorted(further or {})) or "nothing"
            raise VideoAlignError(
                f"besides the policy the checkpoint keeps {kept}, and this run needs {', '.join(want)}: continue with "
                "the options of the checkpoint's run (of AWM, model.kl_average keeps the average)"
            )
        self.take_further(
            {p: {n: dealt_like(t, trained[n]) for n, t in tensors.items()} for p, tensors in further.items()}
        )


def _assign(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
