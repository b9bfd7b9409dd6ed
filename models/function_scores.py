"""A reward that is a Python function of samples and prompts."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from .. import VideoAlignError
from .registry import Registry
from .scoring import as_rewards

FUNCTIONS: Registry[Callable] = Registry(
    "videoalign.rewards", "reward function", {}, callable, "a function of samples and prompts"
)
"""Reward functions that installed packages offer; any other is named by its import path."""


class FunctionScores:
    """A Python function as a reward.

    The function is called with the samples, the list of their prompts, and ``args``. It returns a number per sample, or
    such numbers by name: a tensor, an array or a list. It is called on every rank with that rank's samples. What holds
    a model on a GPU is better a class of its own, whose ``place`` releases the memory.

    Args:
        function: Import path of the function (``package.module:function``), or the name under which an installed
            package offers it.
        args: Further arguments of the function, by name.
        needs: What the function is given: ``videos`` (B, T, 3, H, W) in uint8, or clean, normalised ``latents`` (B, C,
            F, H, W).
    """

    def __init__(
        self,
        function: str,
        args: Mapping[str, Any] | None = None,
        needs: Literal["videos", "latents"] = "videos",
    ) -> None:
        self.function, self.args, self.needs = function, dict(args or {}), needs

    @property
    def name(self) -> str:
        """The function's path."""
        return f"function {self.function}"

    @cached_property
    def called(self) -> Callable:
        """The function, imported when it is first needed."""
        return FUNCTIONS.find(self.function)

    def check(self, prompts: Sequence[str]) -> None:
        """Import the function; any prompt will do.

        Args:
            prompts: Prompts of all samples that there will be.

        Raises:
            VideoAlignError: Where it cannot be imported, or cannot be called.
        """
        if not callable(self.called):
            raise VideoAlignError(f"{self.name} cannot be called")
        try:
            signature = inspect.signature(self.called)
        except (TypeError, ValueError):  # a builtin function may have none
            return
        try:
            signature.bind(None, [], **self.args)
        except TypeError as error:
            raise VideoAlignError(
                f"{self.name} cannot be called with samples, prompts and args {sorted(self.args)}: {error}"
            ) from None

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Call the function.

        Args:
            videos: Samples as ``needs`` says.
            prompts: Prompt of each sample.

        Returns:
            Numbers by the names that the function gives; ``score`` where it gives none.
        """
        return as_rewards(self.called(videos, list(prompts), **self.args), len(videos))

    def place(self, device: torch.device | None) -> None:
        """A function holds nothing to move.

        Args:
            device: Device that the run computes on; None releases memory.
        """
