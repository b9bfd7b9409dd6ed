"""Networks and mathematics, built on torch, transformers and diffusers, and independent of Lightning.

The names below are imported at their first use: transformers and peft take seconds, and most commands need neither.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dimensions import DIMENSIONS
    from .frame_sampling import FrameSampling
    from .lora import LoRA
    from .official import load_reward
    from .preference import accuracy_with_ties, accuracy_without_ties
    from .template import Template
    from .video_reward import VideoReward

_HOMES = {
    "DIMENSIONS": "dimensions",
    "FrameSampling": "frame_sampling",
    "LoRA": "lora",
    "Template": "template",
    "VideoReward": "video_reward",
    "accuracy_with_ties": "preference",
    "accuracy_without_ties": "preference",
    "load_reward": "official",
}

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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
