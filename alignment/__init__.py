"""LightningModules: training of the reward model, and one file per alignment algorithm."""

from .captioning import Captioning
from .reward_model import RewardModel

__all__ = ["Captioning", "RewardModel"]
