"""Flow-DPO: direct preference optimisation of a flow-matching generator (VideoAlign, section 4.2, Eq. 8)."""

from typing import Any

from torch import Tensor

from ..models.flow_losses import BetaSchedule, ConstantBeta, dpo_losses, implicit_rewards
from .flow_sft import FlowSFT


class FlowDPO(FlowSFT):
    r"""Flow-DPO:

    .. math::
        L = -E \ln\sigma\Big(-\tfrac{\beta_t}{2}\big[(e_w - e^\text{ref}_w) - (e_l - e^\text{ref}_l)\big]\Big)

    with e the *mean* squared error of the velocity, in fp32, and the same t and noise for both videos of a pair. At
    step 0 policy and reference are equal, so that the loss is ln 2 and every margin 0.

    Further metrics: ``rewards/{chosen,rejected,margins,accuracies}``, implicit rewards in units of beta under TRL's
    names; equal rewards count as half an accurate pair.

    Args:
        beta: Schedule of beta over time; if not given, the paper's constant 500.
        **kwargs: Arguments of :class:`FlowSFT`.
    """

    needs_reference = True
    sides = (0, 1)

    def __init__(self, beta: BetaSchedule | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.beta = beta or ConstantBeta(500.0)

    def losses(self, rewards: Tensor) -> Tensor:
        """Losses (N,) of implicit rewards (2, N)."""
        return dpo_losses(rewards)

    def loss(
        self, batch: dict[str, Any], errors: Tensor, reference: Tensor, t: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses (N,) of a batch, and implicit rewards to log; arguments as in :meth:`.FlowSFT.loss`."""
        rewards = implicit_rewards(errors, reference, self.beta(t))
        margins = rewards[0] - rewards[1]
        return self.losses(rewards), {
            "rewards/chosen": rewards[0],
            "rewards/rejected": rewards[1],
            "rewards/margins": margins,
            "rewards/accuracies": (margins > 0).float() + 0.5 * (margins == 0),
        }
