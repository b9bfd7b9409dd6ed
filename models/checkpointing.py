"""Which activations a generator's blocks keep for the backward pass, and which are computed again.

Attention is half of a step's time at a video's length (32,760 tokens of Wan2.1 at 81 frames of 480 x 832) and its
outputs are a small part of the activations. Keeping them leaves out the most expensive part of the second forward pass.
"""

from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Checkpointing = bool | Literal["attention"]
"""Whether blocks' activations are computed again in the backward pass: no, all of them, or all but attention's outputs
(``attention``)."""

_OPS = torch.ops.aten
ATTENTION = (
    _OPS._scaled_dot_product_flash_attention.default,
    _OPS._scaled_dot_product_efficient_attention.default,
    _OPS._scaled_dot_product_cudnn_attention.default,
    _OPS._scaled_dot_product_flash_attention_for_cpu.default,
)
"""What torch's scaled_dot_product_attention calls, on GPUs and on CPUs. Other kernels (``memory.attention``: flash) are
computed again."""


def _kept(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_kept)


def _but_attention(block: nn.Module, *args: Any) -> Any:
    return checkpoint(block.__call__, *args, use_reentrant=False, context_fn=_contexts)


def enable_checkpointing(network: nn.Module, which: Checkpointing) -> None:
    """Let a diffusers model compute its blocks' activations again in the backward pass.

    Args:
        network: The model.
        which: Whether, and which.
    """
    if which == "attention":
        network.enable_gradient_checkpointing(_but_attention)
    elif which:
        network.enable_gradient_checkpointing()
