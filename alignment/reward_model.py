"""Training of the reward model on rated pairs (VideoAlign, section 3.2)."""

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.distributed.tensor import DTensor

from .. import VideoAlignError
from ..models import preference
from ..models.dimensions import DIMENSIONS
from ..models.finite import require_finite
from ..models.metrics import Calibration, PreferenceAccuracy, RewardMoments
from ..models.parallelize import shard
from ..models.processor import RewardProcessor
from ..models.video_reward import Statistics, VideoReward
from .export_uses import of_reward
from .parameter_groups import ParameterGroup
from .reward_training import RewardTraining
from .training import Decay

METRICS = {"accuracy": "without_ties", "accuracy_with_ties": "with_ties", "tie_floor": "floor", "margins": "margin"}
"""Entries of a dimension's accuracies by the name under which they are logged."""


class RewardModel(RewardTraining):
    r"""Trains a :class:`~videoalign.models.VideoReward` on pairs with labels in VQ, MQ and TA.

    Every label has a loss, except invalid and missing ones. The losses are summed, and divided by the number of places
    for labels for the gradient (:meth:`~videoalign.models.preference.LabelLosses.slot_mean`) or by the number of labels
    for the log:

    - ``btt``: Bradley-Terry with ties, the paper's choice; ties are evidence.
    - ``bt``: Bradley-Terry; ties are left out, or count as half a win for each side with ``ties: true``.
    - ``reg``: Regression on the videos' scores from 1 to 5.

    Metrics: ``train/loss``, ``train/accuracy/*``, ``train/rewards/margins/*``; at validation ``val/loss``,
    ``val/accuracy/*``, ``val/accuracy_with_ties/*``, ``val/tie_floor/*``, ``val/margins/*``, ``val/tie_probability/*``,
    ``val/calibration/*`` and ``val/num_pairs`` (``test/...`` under ``videoalign test``). Mean and standard deviation of
    the rewards on the validation set are stored for normalisation. If no validation followed the last step, they are
    measured once more when training ends.

    Args:
        network: The reward model.
        loss: Loss on pairs: ``btt``, ``bt`` or ``reg``.
        theta: Tie parameter of ``btt``, above 1; 5 in the paper.
        ties: Whether ties train; if not given, they do under ``btt`` and do not under ``bt``.
        optimizer: Optimizer of the parameters that train; AdamW at 2e-6 in the paper.
        warmup: Share of the steps in which the learning rate rises, in [0, 1).
        decay: Learning rate after warm-up: ``constant``, or falling to zero at the last step, ``linear`` or ``cosine``.
        groups: Learning rates of groups of parameters by name, or all rates of one with a pattern of its parameters'
            names; the optimizer's if not given. Groups that need no pattern: ``language``, which is the language model
            or its adapters, ``vision``, ``merger``, ``tokens`` and ``head``.
        compile: Whether torch.compile compiles the language model's layers, all of them at once and for every number of
            tokens. The vision tower's are not compiled: how frames are packed depends on their sizes.
    """

    own_groups = {
        "head": ("network.head.*",),
        "tokens": ("*.embed_tokens.rows",),
        "merger": ("*.visual.merger.*", "*.visual.deepstack_merger_list.*"),
        "vision": ("*.visual.*",),
        "language": ("*",),
    }

    def __init__(
        self,
        network: VideoReward,
        loss: Literal["btt", "bt", "reg"] = "btt",
        theta: float = 5.0,
        ties: bool | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup: float = 0.05,
        decay: Decay = "constant",
        groups: dict[str, float | ParameterGroup] | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(optimizer, warmup, decay, groups)
        if loss == "btt":
            preference.check_theta(theta)
        elif loss not in ("bt", "reg"):
            raise VideoAlignError(f"model.loss {loss!r} is unknown; choose btt, bt or reg")
        if loss == "reg" and ties is not None:
            raise VideoAlignError(
                "model.ties has no meaning under loss: reg, which reads scores and no labels; remove it"
            )
        self.save_hyperparameters(ignore=["network", "optimizer", "groups"])
        # transformers hands models over in eval mode, where adapters' dropout and checkpointing are off
        self.network, self.loss = network.train(), loss
        if compile:
            for layer in network.backbone.language_model.layers:
                layer.compile(dynamic=True)
        self.ties = loss == "btt" if ties is None else ties
        # bt is btt at theta 1, where a tie has no probability; a reward of reg is read as a bt logit
        self.theta = theta if loss == "btt" else 1.0
        self.accuracy = PreferenceAccuracy(resamples=0)
        self.calibration = Calibration(outcomes=(0, 1, 2) if loss == "btt" else (0, 2))
        self.moments = RewardMoments()

    @property
    def processor(self) -> RewardProcessor:
        """The network's processor, from which the DataModule takes frames, tokens and template."""
        return self.network.processor

    def configure_model(self) -> None:
        """Shard the network under ModelParallelStrategy."""
        if self.device_mesh is not None and not isinstance(self.network.head.weight, DTensor):
            net = self.network
            blocks = [*net.backbone.visual.blocks, *net.backbone.language_model.layers]
            blocks += [net.backbone.get_input_embeddings(), net.head]
            shard(net, blocks, self.device_mesh["data_parallel"])

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Raw rewards (B, 3) of a batch of the network's inputs."""
        return self.network(**inputs)

    def pair_losses(self, rewards: Tensor, labels: Tensor, scores: Tensor) -> preference.LabelLosses:
        """The losses of one batch, one for each label or score.

        Args:
            rewards: Raw rewards (2, N, D) of A and B.
            labels: Labels (N, D), NaN where there is none.
            scores: Scores (2, N, D) of A and B, NaN where there is none.
        """
        margins = rewards[0] - rewards[1]
        if self.loss == "btt":
            return preference.btt_losses(margins, labels, self.theta, self.ties)
        if self.loss == "bt":
            return preference.bt_losses(margins, labels, self.ties)
        return preference.reg_losses(rewards.flatten(0, 1), scores.flatten(0, 1))

    def targets(self, labels: Tensor, scores: Tensor) -> Tensor:
        """Dimensions (D,) in which the loss learns from a pair of these labels (D,) and scores (2, D), NaN for none."""
        nothing = torch.zeros(2, 1, len(labels), device=self.device)
        losses = self.pair_losses(nothing, labels[None].to(self.device), scores[:, None].to(self.device))
        return losses.counted.any(0).cpu()

    def _rewards(self, batch: dict[str, Any]) -> Tensor:
        """Raw rewards (2, N, D) of A and B, computed in one forward."""
        return self(batch["inputs"]).unflatten(0, (2, -1))

    def _masked(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Labels (N, 4) and scores (2, N, 3), NaN for padding and dropped pairs."""
        gone = ~batch["valid"][:, None]
        return batch["labels"].masked_fill(gone, torch.nan), batch["scores"].masked_fill(gone, torch.nan)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of a batch of pairs."""
        if "inputs" not in batch:
            raise VideoAlignError(f"no pair of a batch could be used: {batch['dropped'][-1].reason}")
        rewards, (labels, scores) = self._rewards(batch), self._masked(batch)
        labels = labels[:, : len(DIMENSIONS)]
        losses = self.pair_losses(rewards, labels, scores)
        margins = (rewards[0] - rewards[1]).detach()
        self.step_means.add("loss", *losses)
        decided, right = ~labels.isnan() & (labels != 0), (margins * labels > 0).double()
        for i, name in enumerate(DIMENSIONS):
            self.step_means.add(f"accuracy/{name}", right[:, i], decided[:, i])
            self.step_means.add(f"rewards/margins/{name}", margins[:, i].abs(), batch["valid"])
        dropped = {"vitals/dropped": float(len(batch["dropped"]))}
        self.log_dict(dropped, reduce_fx="sum", on_step=False, on_epoch=True, batch_size=1, sync_dist=True)
        return self.finite(losses.slot_mean(), batch["keys"])

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Collect the metrics of held-out pairs; a benchmark's videos only get rewards, which RewardBench reads."""
        if "inputs" not in batch:
            return {}
        if "benchmark" in batch:
            return {"rewards": self(batch["inputs"])}  # (B, D)
        rewards, (labels, scores), valid = self._rewards(batch), self._masked(batch), batch["valid"]
        if not rewards.isfinite().all():
            seen = {key: rewards[:, place] for place, key in enumerate(batch["keys"])}
            require_finite("the rewards of held-out pairs", seen, "training has diverged: lower model.optimizer's lr")
        margins = rewards[0] - rewards[1]
        per_dimension = labels[:, : len(DIMENSIONS)]
        self.held_out_means.add("loss", *self.pair_losses(rewards, per_dimension, scores))
        self.accuracy.update(margins, labels, valid)
        self.calibration.update(preference.probabilities(margins, self.theta), per_dimension, valid)
        self.moments.update(rewards.flatten(0, 1), valid.repeat(2))
        return {"rewards": rewards}

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Run the validation step on test data."""
        return self.validation_step(batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> Tensor | None:
        """Raw rewards (B, 3) of a batch of videos."""
        return self(batch["inputs"]) if "inputs" in batch else None

    def measured_statistics(self) -> Statistics:
        """Statistics of the latest validation, or the stored ones. Collective: every rank must call it."""
        return self.statistics_now()

    def on_validation_epoch_start(self) -> None:
        """Reset the metrics, to which a sanity check or an interrupted epoch may have added."""
        super().on_validation_epoch_start()
        for metric in (self.accuracy, self.calibration, self.moments):
            metric.reset()

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the held-out pairs. Collective."""
        super().on_validation_epoch_end()
        if not self.has_held_out():
            return
        stage = "test" if self.trainer.testing else "val"
        self.accuracy.scale = torch.tensor(self.statistics_now().std)
        results, reliability = self.accuracy.compute(), self.calibration.compute()  # collective, so equal on all ranks
        for name, row in results.items():
            for metric, key in METRICS.items():
                self.log(f"{stage}/{metric}/{name}", row[key])
        for i, name in enumerate(DIMENSIONS):
            if name in results:
                self.log(f"{stage}/calibration/{name}", reliability.error[i].float())
                if self.loss == "btt":
                    self.log(f"{stage}/tie_probability/{name}", reliability.tie[i].float())
        self.log(f"{stage}/num_pairs", float(max((row["pairs"] for row in results.values()), default=0)))

    def add_rewards(self, batch: dict[str, Any]) -> None:
        """Add the raw rewards of a batch of held-out pairs to the moments."""
        if "inputs" in batch:
            self.moments.update(self._rewards(batch).flatten(0, 1), batch["valid"].repeat(2))

    def uses_of(self, export: Path) -> dict[str, str]:
        """Commands that use the export."""
        return of_reward(export, self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the commit of the backbone too."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["backbone_revision"] = getattr(self.network, "backbone_revision", None)
