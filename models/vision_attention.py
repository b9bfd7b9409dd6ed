"""Attention over many frames at once in the Qwen-VL vision towers.

The towers attend within each frame (or window), and transformers runs one SDPA call per frame and layer: hundreds of
small kernels for a batch. With the boundaries of all frames one call is enough, because most frames of a batch have the
same number of patches.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "videoalign_sdpa_flash"
"""Name of the attention function. transformers gives boundaries only to functions with "flash" in their names."""


def batched_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """SDPA within segments of a packed sequence, one call per distinct segment length.

    Args:
        module: Attention layer of the tower; not used.
        query: Queries (1, heads, S, head size) of the S tokens of all segments, one segment after another.
        key: Keys, in the same shape.
        value: Values, in the same shape.
        attention_mask: Not used: segments take the place of a mask.
        scaling: Scale of the scores; 1 / sqrt(head size) if not given.
        dropout: Dropout probability on the attention weights.
        cu_seq_lens_q: Boundaries (segments + 1,) of the segments in S.
        kwargs: Further arguments of transformers' attention functions; not used.

    Returns:
        Outputs (1, S, heads, head size), and None in the place of attention weights.
    """
    lengths = cu_seq_lens_q.diff()
    tokens = torch.stack([query[0], key[0], value[0]]).transpose(1, 2)  # (3, S, heads, size)

    def attend(x: Tensor, length: int) -> Tensor:
        q, k, v = x.unflatten(1, (-1, length)).transpose(2, 3)  # each (segments, heads, length, size)
        return F.scaled_dot_product_attention(q, k, v, scale=scaling, dropout_p=dropout).transpose(1, 2).flatten(0, 1)

    distinct = torch.unique(lengths).tolist()
    if len(distinct) == 1:
        return attend(tokens, distinct[0])[None], None
    of_token = torch.repeat_interleave(lengths, lengths)  # (S,) length of the segment that a token is in
    out = torch.empty_like(tokens[0])
    for length in distinct:
        where = (of_token == length).nonzero().squeeze(1)
        out = out.index_copy(0, where, attend(tokens[:, where], length))
    return out[None], None


AttentionInterface.register(NAME, batched_sdpa)


def batch_vision_attention(tower: nn.Module) -> None:
    """Let a Qwen-VL vision tower attend to all frames in one call, with the same outputs.

    Args:
        tower: Vision tower to change.
    """
    tower.config._attn_implementation = NAME
