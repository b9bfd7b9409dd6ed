"""LightningModules: training of the reward models, and one file per alignment algorithm."""

from ..models.backprop import LastSteps, PredictedEnd, RandomStep
from ..models.flow_losses import ConstantBeta, QuadraticBeta
from .cache_reference import CacheReference
from .context_parallel import ContextParallel
from .encode import EncodeLatents
from .flow_dpo import FlowDPO
from .flow_ipo import FlowIPO
from .flow_rwr import FlowRWR
from .flow_sft import FlowSFT
from .generation import Generate
from .noisy_reward_model import NoisyRewardModel
from .reward_backprop import RewardBackprop
from .reward_model import RewardModel

__all__ = [
    "CacheReference",
    "ConstantBeta",
    "ContextParallel",
    "EncodeLatents",
    "FlowDPO",
    "FlowIPO",
    "FlowRWR",
    "FlowSFT",
    "Generate",
    "LastSteps",
    "NoisyRewardModel",
    "PredictedEnd",
    "QuadraticBeta",
    "RandomStep",
    "RewardBackprop",
    "RewardModel",
]
