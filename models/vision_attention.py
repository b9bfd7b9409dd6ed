"""Attention over many frames at once in the Qwen-VL vision towers.

The towers attend within each frame (or window), and transformers runs one SDPA call per frame and layer: hundreds of
small kernels for a batch. With the boundaries of all frames one call is enough, because most frames of a batch have the
same number of patches.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface

NAME = "videoalign_sdpa_flash"
"""Name of the attention function. transformers gives boundaries only to functions with "flash" in their names."""
Alike = list[tuple[int, Tensor | None]]
"""Lengths of segments, and the places of the tokens of all segments of each length; None where they are all tokens."""
_SEEN = WeakTensorKeyDictionary()
"""What was read off boundaries, while they live. A tower hands the same tensor to all of its layers."""


def alike(boundaries: Tensor) -> Alike:
    """Segments of a packed sequence, by their lengths; read off the device once for all layers of a tower.

    Args:
        boundaries: Boundaries (segments + 1,) of the segments in a sequence of S tokens.

    Returns:
        Each length that occurs, and the places (segments of this length * length,) of their tokens in S, or None where
        all segments have one length.
    """
    if boundaries not in _SEEN:
        lengths = boundaries.diff()
        distinct = torch.unique(lengths).tolist()
        of_token = torch.repeat_interleave(lengths, lengths)  # (S,) length of the segment that a token is in
        places = [(of_token == length).nonzero().squeeze(1) for length in distinct] if distinct[1:] else [None]
        _SEEN[boundaries] = list(zip(distinct, places))
    return _SEEN[boundaries]


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
    tokens = torch.stack([query[0], key[0], value[0]]).transpose(1, 2)  # (3, S, heads, size)

    def attend(x: Tensor, length: int) -> Tensor:
        q, k, v = x.unflatten(1, (-1, length)).transpose(2, 3)  # each (segments, heads, length, size)
        return F.scaled_dot_product_attention(q, k, v, scale=scaling, dropout_p=dropout).transpose(1, 2).flatten(0, 1)

    out = torch.empty_like(tokens[0])
    for length, places in alike(cu_seq_lens_q):
        if places is None:
            return attend(tokens, length)[None], None
        out = out.index_copy(0, places, attend(tokens[:, places], length))
    return out[None], None


AttentionInterface.register(NAME, batched_sdpa)


def batch_vision_attention(tower: nn.Module) -> None:
    """Let a Qwen-VL vision tower attend to all frames in one call, with the same outputs.

    Args:
        tower: Vision tower to change.
    """
    tower.config._attn_implementation = NAME
