"""Loading the video-language model that a reward model is built on."""

import json
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from .. import VideoAlignError
from .files import check_readable
from .hub import resolved
from .patch_projection import project_patches
from .vision_attention import batch_vision_attention
from .whole import load_whole

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Model types, as ``config.json`` names them, whose inputs this package prepares."""
PROCESSOR_FILES = ("*.json", "*.jinja", "*.txt")
"""Files of a tokenizer and of preprocessing."""
FILES = (*PROCESSOR_FILES, "*.safetensors")
"""Files of a backbone that are read."""


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
    folder = resolved(backbone, "folder of a backbone", parts=FILES, now=["config.json"])
    check_readable(folder)
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise VideoAlignError(
            f"backbone {str(backbone)!r} is no model folder ({str(error).splitlines()[0][:160]})"
        ) from None
    if config.model_type not in FAMILIES:
        raise VideoAlignError(
            f"backbone {backbone}: model type {config.model_type!r} is not one of {', '.join(FAMILIES)}"
        )
    model = load_whole(
        AutoModelForImageTextToText,
        resolved(backbone, "folder of a backbone", parts=FILES),
        f"backbone {backbone}",
        ignore_mismatched_sizes=True,
        dtype=getattr(torch, dtype),
        attn_implementation=attention,
    )
    project_patches(model.model.visual)
    if attention == "sdpa":
        batch_vision_attention(model.model.visual)
    return model
