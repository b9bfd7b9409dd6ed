"""The parts of VideoReward that belong to its reward tokens: their embeddings, and the head that reads their states.

Legend: B videos, L tokens, K reward tokens per video (3 separate or 1 shared), E the hidden size, D = 3 dimensions.
"""

import torch
from torch import Tensor, nn

from .dimensions import DIMENSIONS


class TokenRows(nn.Module):
    """A frozen embedding matrix with a few new rows that train on their own.

    Only the rows are parameters of the optimizer: no gradient, copy or moment of the whole matrix is ever made.

    Args:
        base: Embedding of the backbone.
        ids: Vocabulary ids of the new rows; they need not exist in ``base``.
    """

    def __init__(self, base: nn.Embedding, ids: list[int]) -> None:
        super().__init__()
        self.base = base
        self.register_buffer("ids", torch.tensor(ids), persistent=False)
        # Start from rows of the matrix's own scale: a mean of all rows plus noise of their spread.
        with torch.no_grad():
            spread, centre = base.weight.float().std(0), base.weight.float().mean(0)
            rows = centre + spread * torch.randn(len(ids), base.embedding_dim)  # drawn with the run's seed
        self.rows = nn.Parameter(rows)  # (K, E), fp32

    @property
    def weight(self) -> Tensor:
        """The backbone's matrix, for code that asks for its dtype or device."""
        return self.base.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embed token ids (B, L) to (B, L, E)."""
        own = input_ids[..., None] == self.ids  # (B, L, K)
        is_own = own.any(-1)
        embedded = self.base(input_ids.masked_fill(is_own, 0))
        # one matrix product instead of an indexed write: the same graph whether or not a batch holds each token
        rows = (own.to(self.rows.dtype) @ self.rows).to(embedded.dtype)
        return torch.where(is_own[..., None], rows, embedded)


class RewardHead(nn.Module):
    """Bias-free linear map from reward tokens to rewards, in fp32 whatever the backbone's precision.

    bf16 rewards near 3 come in steps of 1/64 and make ties that nobody predicted.

    Args:
        hidden: Width E of the states.
        rows: 3 (one row per dimension) or 1 (one row for all tokens, as in the released weights).
    """

    def __init__(self, hidden: int, rows: int = len(DIMENSIONS)) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, hidden) * hidden**-0.5)  # drawn with the run's seed

    def forward(self, states: Tensor) -> Tensor:
        """Rewards (B, D), fp32, of states (B, K, E) at K = D separate tokens or K = 1 shared one."""
        with torch.autocast(states.device.type, enabled=False):
            return (states.float() * self.weight.float()).sum(-1)  # broadcasts over K = 1 and over one row
