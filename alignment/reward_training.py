"""The base of trainings of reward networks: the statistics of rewards are those of the weights that are exported."""

from typing import Any

import torch

from ..datamodules.contracts import NamesBenchmark, offers
from ..models.metrics import RewardMoments
from ..models.reward_statistics import Statistics
from .training import Training


class RewardTraining(Training):
    """A training of :attr:`network`, whose rewards are normalised by their mean and deviation on held-out pairs.

    Checkpoints hold these statistics and the step of their measurement. At the end of training they are measured on the
    last weights, unless a validation has just done so. A subclass sets :attr:`network` and :attr:`moments`, adds the
    rewards of its held-out pairs in ``validation_step``, and says in :meth:`add_rewards` which they are.
    """

    network: Any
    """Network with ``statistics``, which is exported."""
    moments: RewardMoments
    """Moments of the raw rewards of held-out pairs."""
    _measured_at = -1
    """Step at which the statistics were measured; -1 where they never were."""

    def add_rewards(self, batch: dict[str, Any]) -> None:
        """Add the raw rewards of a batch of held-out pairs to :attr:`moments`.

        Args:
            batch: Batch of the validation's DataLoader; one without usable samples adds nothing.
        """
        raise NotImplementedError

    def has_held_out(self) -> bool:
        """Whether the run validates on held-out pairs: the same on every rank, whatever its own share of them.

        A loader that names no benchmark, such as a plain DataLoader, gives held-out pairs.
        """
        first = self._first_loader()
        return first is not None and not (offers(first, NamesBenchmark) and first.benchmark is not None)

    def _first_loader(self) -> Any:
        loaders = self.trainer.val_dataloaders if self.trainer.val_dataloaders else self.trainer.test_dataloaders
        return loaders[0] if isinstance(loaders, list) else loaders

    def statistics_now(self) -> Statistics:
        """Statistics of the latest validation, or the stored ones. Collective: every rank must call it."""
        if self.has_held_out() and not self.trainer.testing and not self.trainer.sanity_checking:
            mean, std = self.moments.compute().tolist()
            self.network.statistics = Statistics(mean, std)
            self._measured_at = self.global_step
        return self.network.statistics

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
            for batch in self._first_loader():
                batch = self.trainer.strategy.batch_to_device(batch)
                with self.trainer.precision_plugin.val_step_context():
                    self.add_rewards(batch)
        self.statistics_now()
        return True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the parameters that train, and the statistics of the rewards with the step of their measurement."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["reward_statistics"] = [self.network.statistics.mean, self.network.statistics.std]
        checkpoint["reward_statistics_step"] = self._measured_at

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the statistics of the rewards."""
        super().on_load_checkpoint(checkpoint)
        self.network.statistics = Statistics(*checkpoint["reward_statistics"])
        self._measured_at = checkpoint.get("reward_statistics_step", -1)  # earlier noisy rewards did not say
