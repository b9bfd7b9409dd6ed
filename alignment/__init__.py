"""LightningModules: training of the reward models, and one file per alignment algorithm."""

from ..models.backprop import LastSteps, PredictedEnd, RandomStep
from ..models.flow_losses import ConstantBeta, QuadraticBeta
from .awm import AWM
from .cache_reference import CacheReference
from .context_parallel import ContextParallel
from .diffusion_nft import DiffusionNFT
from .encode import EncodeLatents
from .flow_dpo import FlowDPO
from .flow_grpo import FlowGRPO
from .flow_ipo import FlowIPO
from .flow_rwr import FlowRWR
from .flow_sft import FlowSFT
from .generation import Generate
from .noisy_reward_model import NoisyRewardModel
from .online_dpo import OnlineDPO
from .reward_backprop import RewardBackprop
from .reward_model import RewardModel

__all__ = [
    "AWM",
    "CacheReference",
    "ConstantBeta",
    "ContextParallel",
    "DiffusionNFT",
    "EncodeLatents",
    "FlowDPO",
    "FlowGRPO",
    "FlowIPO",
    "FlowRWR",
    "FlowSFT",
    "Generate",
    "LastSteps",
    "NoisyRewardModel",
    "OnlineDPO",
    "PredictedEnd",
    "QuadraticBeta",
    "RandomStep",
    "RewardBackprop",
    "RewardModel",
]
