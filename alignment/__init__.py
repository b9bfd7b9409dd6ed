"""LightningModules: training of the reward model, and one file per alignment algorithm."""

from ..models.flow_losses import ConstantBeta, QuadraticBeta
from .autoencoding import Autoencoding
from .captioning import Captioning
from .encode import EncodeLatents
from .flow_dpo import FlowDPO
from .flow_ipo import FlowIPO
from .flow_rwr import FlowRWR
from .flow_sft import FlowSFT
from .generate import Generate
from .noisy_reward import NoisyRewardModel
from .optimizers import MuonAdamW
from .reference import CacheReference
from .reward_model import RewardModel

__all__ = [
    "Autoencoding",
    "CacheReference",
    "Captioning",
    "ConstantBeta",
    "EncodeLatents",
    "FlowDPO",
    "FlowIPO",
    "FlowRWR",
    "FlowSFT",
    "Generate",
    "MuonAdamW",
    "NoisyRewardModel",
    "QuadraticBeta",
    "RewardModel",
]
