"""A search among candidates of videos with a generator and its noisy reward."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import VideoAlignError
from .candidates import Candidates
from .family import Condition
from .finite import by_name, require_finite
from .free_memory import free_memory, peak_of
from .generator import Generator
from .guidance import Guidance, steering
from .noisy_reward import NoisyReward
from .search import Chosen, Search

_HELD = 12
"""Latents that a waiting candidate takes memory for: itself, its velocity, moments and noise, its solver's memory."""
Found = tuple[Tensor, Chosen]
"""Latents (1, C, F, H, W), and what was chosen."""


class Searcher:
    """Searches videos one after the other.

    Args:
        search: Kind of search, and its settings.
        generator: The generator.
        reward: Its noisy reward.
        guide: Guidance by the same reward, if any.
        steps: Number of scheduler steps.
        scales: Further arguments of :class:`~videoalign.models.candidates.Candidates`: scales and shift.
    """

    def __init__(
        self,
        search: Search,
        generator: Generator,
        reward: NoisyReward,
        guide: Guidance,
        steps: int,
        scales: Mapping[str, Any],
    ) -> None:
        search.check(steps)
        self.search, self.generator, self.reward, self.guide = search, generator, reward, guide
        self.steps, self.scales = steps, scales
        self._fits: set[tuple[int, ...]] = set()

    def __call__(self, condition: Condition, null: Condition | None, seed: int, noise: Tensor, key: str) -> Found:
        """Search a video.

        Args:
            condition: Prompt, and image, of the video, with a batch size of 1.
            null: Condition of the empty prompt, with a batch size of 1, for classifier-free guidance.
            seed: Seed of the video.
            noise: Noise (1, C, F, H, W) of the video, which says how large it is.
            key: Key of the video, for messages.

        Returns:
            Latents (1, C, F, H, W), and what was chosen.

        Raises:
            VideoAlignError: Where a reward is not finite.
        """
        noises = self.search.noises(seed, noise.shape[1:], noise.device)
        path = self._candidates(condition, null, noises)

        def reward(x: Tensor, t: float) -> Tensor:
            rewards = torch.cat([self._rewards(part, t, path.rows(len(part))) for part in x.split(path.at_once)])
            names = [f"{key}, candidate {k}, t = {t:.3f}" for k in range(len(x))]
            require_finite("the noisy reward's views of candidates", by_name(names, rewards), "look at its weights")
            return self.search.scalar(rewards)

        chosen = self.search(path, reward, seed)
        if not isinstance(chosen, Chosen) or not 0 <= chosen.row < len(path.x) or not math.isfinite(chosen.reward):
            raise VideoAlignError(
                f"search ({type(self.search).__name__}) chose {chosen} among {len(path.x)} candidates of {key}; it "
                "gives a Chosen, with the number of one and its finite reward"
            )
        return path.x[chosen.row : chosen.row + 1].float(), chosen

    def _candidates(self, condition: Condition, null: Condition | None, noises: Tensor) -> Candidates:
        def steer(condition: Condition) -> Any:
            return steering(self.reward, self.guide, condition)

        steered = steer if self.guide.strength > 0 else None
        return Candidates(
            self.generator,
            condition,
            noises,
            self.steps,
            null=null,
            steer=steered,
            at_once=self.search.at_once,
            **self.scales,
        )

    @torch.no_grad()
    def _rewards(self, x: Tensor, t: float, condition: Condition) -> Tensor:
        return self.reward.normalise(self.reward(x, torch.full((len(x),), t, device=x.device), condition))

    def check_memory(self, condition: Condition, null: Condition | None, noise: Tensor) -> None:
        """Refuse more candidates than memory, from one candidate's velocity; once for each size of videos.

        Args:
            condition: Prompts, and images, of a batch.
            null: Condition of the empty prompt, with a batch size of 1.
            noise: Noise (B, C, F, H, W) of the batch.

        Raises:
            VideoAlignError: Says how much is needed, how much is free, and how many would fit.
        """
        if noise.shape[1:] in self._fits:
            return
        one = self._candidates(rows(condition, [0]), null, noise[:1])
        active = max(peak_of(lambda: one.velocity(0), noise.device), 1)
        held = _HELD * noise[0].numel() * 4
        count, free = self.search.candidates, free_memory(noise.device)
        at_once = min(self.search.at_once or count, count)
        need, most = at_once * active + count * held, math.floor((free - count * held) / active)
        if need > free:
            remedy = f"set search.at_once to {most} or less" if most >= 1 else "take fewer candidates"
            raise VideoAlignError(
                f"a search with {count} candidates, {at_once} of them computed at once, needs about {_gb(need)} GB "
                f"beside the weights ({_gb(active)} GB for a velocity, {_gb(held)} GB for a candidate that waits), but "
                f"{_gb(free)} GB are free on {noise.device}: {remedy}"
            )
        self._fits.add(tuple(noise.shape[1:]))


def rows(condition: Condition, which: Sequence[int]) -> Condition:
    """Some samples of a batch's condition.

    Args:
        condition: Prompts, and images, of the batch.
        which: Numbers of the samples.
    """
    return {name: part[list(which)] for name, part in condition.items()}


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g}"
