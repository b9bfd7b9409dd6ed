"""Time, row and column of every token, which Qwen-VL's rotary embeddings turn by."""

import torch
from torch import Tensor, nn


def token_positions(
    backbone: nn.Module, input_ids: Tensor, attention_mask: Tensor, video_grid: Tensor, image_grid: Tensor | None = None
) -> Tensor:
    """Positions of all tokens of a batch, computed once for each layout of text and video in it.

    transformers computes them row by row, which takes a twelfth of a step where videos are small. The two videos of a
    pair have one prompt and mostly one size, so that at most half of the rows are different ones.

    Args:
        backbone: Video-language model without its head.
        input_ids: Token ids (B, L), padded on the right.
        attention_mask: Mask (B, L), 0 at padding.
        video_grid: Number of patches (B, 3) of each video in time, height and width.
        image_grid: Number of patches (B, 3) of each image, where the template shows them.

    Returns:
        Positions (3, B, L) in time, height and width.
    """
    length, config = input_ids.shape[1], backbone.config
    kinds = (input_ids == config.video_token_id) * 2 + (input_ids == config.image_token_id)  # as transformers has them
    grids = {"video_grid_thw": video_grid} | ({} if image_grid is None else {"image_grid_thw": image_grid})
    rows = torch.cat([kinds, attention_mask, *grids.values()], 1)  # (B, 2L + 3) or (B, 2L + 6)
    layouts, number = rows.unique(dim=0, return_inverse=True)
    kinds, mask, *shapes = layouts.split([length, length, *(3 for _ in grids)], 1)
    # of token ids only the number is read
    positions, _ = backbone.get_rope_index(
        kinds, mm_token_type_ids=kinds, attention_mask=mask, **dict(zip(grids, shapes))
    )
    return positions[:, number]
