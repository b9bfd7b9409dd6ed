"""Training of the reward model on rated pairs (VideoAlign, section 3.2)."""

from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.distributed.tensor import DTensor

from .. import VideoAlignError
from ..models import preference
from ..models.metrics import Calibration, PreferenceAccuracy, RewardMoments
from ..models.parallelize import shard
from ..models.preference import DIMENSIONS
from ..models.processor import RewardProcessor
from ..models.video_reward import Statistics, VideoReward
from .training import Decay, Training


class RewardModel(Training):
    r"""Trains a :class:`~videoalign.models.VideoReward` on pairs with labels VQ, MQ and TA.

    Losses, of every label that counts (invalid and missing ones never do). What is minimised is their sum over the
    places for labels (:meth:`~videoalign.models.preference.LabelLosses.slot_mean`), what is logged their mean:

    - ``btt``: Bradley-Terry with ties, the paper's choice; ties are evidence.
    - ``bt``: Bradley-Terry; ties are left out, or count as half a win for each side with ``ties: true``.
    - ``reg``: regression on the videos' 1-5 scores.

    Logged: ``train/loss``, ``train/accuracy/*``, ``train/rewards/margins/*``; at validation ``val/loss``,
    ``val/accuracy/*``, ``val/accuracy_with_ties/*``, ``val/tie_floor/*``, ``val/margins/*``, ``val/tie_probability/*``,
    ``val/calibration/*`` and ``val/num_pairs`` (``test/...`` under ``videoalign test``). Mean and standard deviation of the rewards on the validation set are
    kept for normalisation; after the last step they are measured anew if validation was not.

    Args:
        network: the reward model.
        loss: ``btt``, ``bt`` or ``reg``. theta: tie parameter of ``btt``, above 1; 5 in the paper.
        ties: whether ties train; by default they do under ``btt`` and do not under ``bt``.
        optimizer: of the parameters that train. AdamW at 2e-6 in the paper.
        warmup: share of the steps in which the learning rate rises. decay: what it does afterwards.
    """

    def __init__(
        self,
        network: VideoReward,
        loss: Literal["btt", "bt", "reg"] = "btt",
        theta: float = 5.0,
        ties: bool | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup: float = 0.05,
        decay: Decay = "constant",
    ) -> None:
        super().__init__(optimizer, warmup, decay)
        if loss == "btt":
            preference.check_theta(theta)
        elif loss not in ("bt", "reg"):
            raise VideoAlignError(f"model.loss {loss!r} is unknown; choose btt, bt or reg")
        if loss == "reg" and ties is not None:
            raise VideoAlignError(
                "model.ties has no meaning under loss: reg, which reads scores and no labels; remove it"
            )
        self.save_hyperparameters(ignore=["network", "optimizer"])
        # transformers hands models over in eval mode, where adapters' dropout and checkpointing are off
        self.network, self.loss = network.train(), loss
        self.ties = loss == "btt" if ties is None else ties
        # bt is btt at theta 1, where a tie has no probability; a reward from regression is read as a bt logit.
        self.theta = theta if loss == "btt" else 1.0
        self.accuracy = PreferenceAccuracy(resamples=0)
        self.calibration = Calibration(outcomes=(0, 1, 2) if loss == "btt" else (0, 2))
        self.moments = RewardMoments()
        self._measured_at = -1

    @property
    def processor(self) -> RewardProcessor:
        """Frames, tokens and template of the network, for the DataModule."""
        return self.network.processor

    def configure_model(self) -> None:
        """Shard under ModelParallelStrategy."""
        if self.device_mesh is not None and not isinstance(self.network.head.weight, DTensor):
            net = self.network
            blocks = [
                *net.backbone.visual.blocks,
                *net.backbone.language_model.layers,
                net.backbone.get_input_embeddings(),
                net.head,
            ]
            shard(net, blocks, self.device_mesh["data_parallel"])

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Raw rewards (B, 3) of a batch of the network's inputs."""
        return self.network(**inputs)

    def pair_losses(self, rewards: Tensor, labels: Tensor, scores: Tensor) -> preference.LabelLosses:
        """The losses of one batch, each of a label or score.

        Args:
            rewards: (2, N, D) of A and B.
            labels: (N, D), NaN where there is none.
            scores: (2, N, D), NaN where there is none.
        """
        margins = rewards[0] - rewards[1]
        if self.loss == "btt":
            return preference.btt_losses(margins, labels, self.theta, self.ties)
        if self.loss == "bt":
            return preference.bt_losses(margins, labels, self.ties)
        return preference.reg_losses(rewards.flatten(0, 1), scores.flatten(0, 1))

    def _rewards(self, batch: dict[str, Any]) -> Tensor:
        """(2, N, D): A and B in one forward."""
        return self(batch["inputs"]).unflatten(0, (2, -1))

    def _masked(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Labels (N, 4) and scores (2, N, 3) with padding and dropped pairs as missing."""
        gone = ~batch["valid"]
        return (
            batch["labels"].masked_fill(gone[:, None], torch.nan),
            batch["scores"].masked_fill(gone[:, None], torch.nan),
        )

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """One batch of pairs."""
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
        self.log(
            "data/dropped",
            float(len(batch["dropped"])),
            reduce_fx="sum",
            on_step=False,
            on_epoch=True,
            batch_size=1,
            sync_dist=True,
        )
        return self.finite(losses.slot_mean(), batch["keys"])

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Held-out pairs enter the metrics; videos of a benchmark only get rewards, for the ``RewardBench`` callback."""
        if "inputs" not in batch:
            return {}
        if "benchmark" in batch:
            return {"rewards": self(batch["inputs"])}  # (B, D)
        rewards, (labels, scores), valid = self._rewards(batch), self._masked(batch), batch["valid"]
        margins = rewards[0] - rewards[1]
        per_dimension = labels[:, : len(DIMENSIONS)]
        self.held_out_means.add("loss", *self.pair_losses(rewards, per_dimension, scores))
        self.accuracy.update(margins, labels, valid)
        self.calibration.update(preference.probabilities(margins, self.theta), per_dimension, valid)
        self.moments.update(rewards.flatten(0, 1), valid.repeat(2))
        return {"rewards": rewards}

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """As validation."""
        return self.validation_step(batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> Tensor | None:
        """Raw rewards (B, 3) of a batch of videos."""
        return self(batch["inputs"]) if "inputs" in batch else None

    def measured_statistics(self) -> Statistics:
        """Statistics of the validation pairs seen last, or the stored ones. Collective: every rank must call it."""
        if self.has_held_out() and not self.trainer.testing and not self.trainer.sanity_checking:
            mean, std = self.moments.compute().tolist()
            self.network.statistics = Statistics(mean, std)
            self._measured_at = self.global_step
        return self.network.statistics

    def on_validation_epoch_start(self) -> None:
        """Forget what the sanity check or an interrupted epoch left."""
        super().on_validation_epoch_start()
        for metric in (self.accuracy, self.calibration, self.moments):
            metric.reset()

    def on_validation_epoch_end(self) -> None:
        """Log what the held-out pairs say. Collective."""
        super().on_validation_epoch_end()
        if not self.has_held_out():
            return
        stage = "test" if self.trainer.testing else "val"
        self.accuracy.scale = torch.tensor(self.measured_statistics().std)
        results, reliability = self.accuracy.compute(), self.calibration.compute()  # collective, so equal on all ranks
        for name, row in results.items():
            self.log_dict(
                {
                    f"{stage}/accuracy/{name}": row["without_ties"],
                    f"{stage}/accuracy_with_ties/{name}": row["with_ties"],
                    f"{stage}/tie_floor/{name}": row["floor"],
                    f"{stage}/margins/{name}": row["margin"],
                }
            )
        for i, name in enumerate(DIMENSIONS):
            if name in results:
                self.log(f"{stage}/calibration/{name}", reliability.error[i].float())
                if self.loss == "btt":
                    self.log(f"{stage}/tie_probability/{name}", reliability.tie[i].float())
        self.log(f"{stage}/num_pairs", float(max((row["pairs"] for row in results.values()), default=0)))

    def has_held_out(self) -> bool:
        """Whether held-out pairs were given: the same on every rank, whatever this one's share of them is."""
        loaders = self.trainer.val_dataloaders if self.trainer.val_dataloaders else self.trainer.test_dataloaders
        loaders = loaders if isinstance(loaders, list) else [loaders]
        return loaders[0] is not None and loaders[0].collate.benchmark is None

    def on_train_end(self) -> None:
        """Measure the statistics of the last weights, unless a checkpoint was written with them already."""
        self.measure_last_weights()

    def measure_last_weights(self) -> bool:
        """Measure the statistics on the held-out pairs again, if they are those of an earlier step. Collective.

        Returns:
            Whether anything was measured; the same on every rank.
        """
        if self._measured_at == self.global_step or not self.trainer.val_dataloaders or not self.has_held_out():
            return False
        self.eval()
        self.moments.reset()
        with torch.no_grad():
            for batch in self.trainer.val_dataloaders[0]:
                if "inputs" not in batch:
                    continue
                batch = self.trainer.strategy.batch_to_device(batch)
                with self.trainer.precision_plugin.val_step_context():
                    self.moments.update(self._rewards(batch).flatten(0, 1), batch["valid"].repeat(2))
        self.measured_statistics()
        return True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what trains and the statistics."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["reward_statistics"] = [self.network.statistics.mean, self.network.statistics.std]
        checkpoint["reward_statistics_step"] = self._measured_at

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the statistics."""
        super().on_load_checkpoint(checkpoint)
        self.network.statistics = Statistics(*checkpoint["reward_statistics"])
        self._measured_at = checkpoint["reward_statistics_step"]
