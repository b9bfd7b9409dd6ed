"""Flow-RWR: reward-weighted regression of a flow-matching generator (VideoAlign, section 4.2)."""

from typing import Any

import torch
from torch import Tensor

from .. import VideoAlignError
from ..datamodules.contracts import HasPromptScores, require
from ..models.flow_losses import RewardWeights
from .flow_sft import FlowSFT

LEAST = 4
"""Least number of a prompt's samples for statistics of its own: z-scores of two samples are always -1 and 1."""


class FlowRWR(FlowSFT):
    r"""Flow-RWR on all videos, preferred or not:

    .. math::
        L = E\,[\exp(r(x_0, y) / \tau)\,\|v_\theta(x_t, t, y) - v\|^2]

    Weights are scaled to mean 1 over the training set, so that a learning rate of SFT keeps its effect: with equal
    rewards Flow-RWR *is* SFT on all videos (of pairs, those whose rewards differ: see ``data.min_margin``). The paper
    gives exp(r) alone, without temperature, normalisation or clipping.

    Further metrics: ``weights/{mean,max}`` and ``weights/effective_sample_size``, Kish's (1965) effective share of a
    step's videos: 1 where all weights are equal.

    Args:
        rewards: Temperature, normalisation and clipping of the weights.
        **kwargs: Arguments of :class:`FlowSFT`.
    """

    sides = None

    def __init__(self, rewards: RewardWeights = RewardWeights(), **kwargs: Any) -> None:  # noqa: B008  frozen
        super().__init__(**kwargs)
        self.rewards = rewards

    def setup(self, stage: str) -> None:
        """Compute each prompt's mean and standard deviation of rewards, and the mean weight of the training set."""
        super().setup(stage)
        if stage != "fit":
            return
        data = require(self.trainer.datamodule, HasPromptScores, type(self).__name__)
        of_prompt = data.prompt_scores()
        everything = torch.cat(list(of_prompt.values()))
        if everything.isnan().any() or not data.has_rewards():
            raise VideoAlignError(
                "Flow-RWR weighs videos by their rewards, and the latents hold none (or not in every dimension that "
                "data.weights names): `videoalign shards pairs-from-rewards` writes them"
            )
        self.moments = {
            prompt: _moments(scores if len(scores) >= LEAST else everything) for prompt, scores in of_prompt.items()
        }
        weights = torch.cat(
            [self.rewards.raw(self._normalised(prompt, scores)) for prompt, scores in of_prompt.items()]
        )
        self.mean_weight = float(weights.mean())

    def _normalised(self, prompt: str, scores: Tensor) -> Tensor:
        if not self.rewards.normalise:
            return scores
        mean, std = self.moments[prompt]
        return (scores - mean) / std

    def weights(self, batch: dict[str, Any]) -> Tensor:
        """Weights (S, N) of a batch; their mean over the training set is 1."""
        scores = batch["scores"]  # (S, N)
        columns = [self._normalised(prompt, column) for prompt, column in zip(batch["texts"], scores.unbind(1))]
        return self.rewards.raw(torch.stack(columns, 1)) / self.mean_weight

    def loss(
        self, batch: dict[str, Any], errors: Tensor, reference: Tensor | None, t: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses (N,) of a batch, and weights to log; arguments as in :meth:`.FlowSFT.loss`."""
        if not self.trainer.training:  # held-out prompts have no statistics: take the plain error of all videos
            return errors.mean(0), {}
        weights = self.weights(batch)
        return (weights * errors).mean(0), {
            "weights/mean": weights,
            "weights/square": weights.square(),
            "weights/max": weights,
        }

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        """Replace the mean of squared weights by the effective sample size."""
        if "weights/square" in means:
            means["weights/effective_sample_size"] = means["weights/mean"] ** 2 / means.pop("weights/square")
        return means


def _moments(scores: Tensor) -> tuple[float, float]:
    """Mean and standard deviation; the deviation is 1 where all scores are equal."""
    std = float(scores.std(correction=0))
    return float(scores.mean()), std if std > 1e-6 else 1.0
