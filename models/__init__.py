"""Networks and mathematics: torch, transformers and diffusers. Knows nothing of Lightning."""

from .lora import LoRA
from .official import load_reward
from .preference import DIMENSIONS, accuracy_with_ties, accuracy_without_ties
from .sampling import FrameSampling
from .template import Template
from .video_reward import VideoReward

__all__ = [
    "DIMENSIONS",
    "FrameSampling",
    "LoRA",
    "Template",
    "VideoReward",
    "accuracy_with_ties",
    "accuracy_without_ties",
    "load_reward",
]
