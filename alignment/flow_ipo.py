"""Flow-IPO: the identity-preference loss (Azar et al., 2023) on the errors of Flow-DPO."""

from typing import Any

from torch import Tensor

from .. import VideoAlignError
from ..models.flow_losses import ipo_losses
from .flow_dpo import FlowDPO


class FlowIPO(FlowDPO):
    r"""Flow-IPO, :math:`L = E\,(r_w - r_l - m)^2` with the implicit rewards r of :class:`FlowDPO`.

    The loss is least at margin m and pulls larger margins back, while DPO widens them as long as it trains.

    Args:
        margin: Target m of the margin of implicit rewards.
        **kwargs: Arguments of :class:`FlowDPO`.
    """

    def __init__(self, margin: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not margin > 0:
            raise VideoAlignError(f"model.margin must be positive, got {margin}")
        self.margin = margin

    def losses(self, rewards: Tensor) -> Tensor:
        """Losses (N,) of implicit rewards (2, N)."""
        return ipo_losses(rewards, self.margin)
