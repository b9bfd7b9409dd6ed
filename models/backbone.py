"""Loading the video-language model that a reward model is built on."""

import json
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from .. import VideoAlignError
from .files import check_readable
from .vision_attention import batch_vision_attention
from .whole import load_whole

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Model types, as ``config.json`` names them, whose inputs this package prepares."""


def load_backbone(backbone: str | Path, attention: str = "sdpa", dtype: str = "float32") -> nn.Module:
    """Load a video-language model with its language-modelling head; its ``model`` attribute gives hidden states.

    Args:
        backbone: Folder or hub id of the model.
        attention: ``sdpa`` (which attends to all frames of a batch at once), ``eager`` or ``flash_attention_2``.
        dtype: Dtype of the weights: ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        VideoAlignError: Where there is no such model, it is of another family, or its files are not whole
            (see :func:`.whole.load_whole`).
    """
    check_readable(backbone)
    try:
        config = AutoConfig.from_pretrained(backbone)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise VideoAlignError(
            f"backbone {str(backbone)!r} is neither a model folder nor a hub id that could be reached "
            f"({str(error).splitlines()[0][:160]})"
        ) from None
    if config.model_type not in FAMILIES:
        raise VideoAlignError(
            f"backbone {backbone}: model type {config.model_type!r} is not one of {', '.join(FAMILIES)}"
        )
    model = load_whole(
        AutoModelForImageTextToText,
        backbone,
        f"backbone {backbone}",
        ignore_mismatched_sizes=True,
        dtype=getattr(torch, dtype),
        attn_implementation=attention,
    )
    if attention == "sdpa":
        batch_vision_attention(model.model.visual)
    return model
