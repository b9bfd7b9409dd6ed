"""How much `videoalign study on-policy` spends, and what is counted as spent.

Spending is counted in evaluations: passes of the generator's transformer on one video. A pass counts 1; with
classifier-free guidance 2; with a backward pass behind it 3 (:data:`~videoalign.models.evaluations.BACKWARD`); a pass
of the noisy reward counts the share of the transformer's blocks that it copies. Autoencoder, text encoder and reward
models are not counted. An algorithm that trains spends its budget before any video is made; a search spends as much on
the judged videos, beyond what plain samples of them cost.
"""

from dataclasses import dataclass

SHARES = {"quarter": 0.25, "half": 0.5, "full": 1.0}
"""Places on the curves over cost, by the names of their checkpoints."""
STEPS, GUIDED = 12, 2
"""Sampling steps of every generator of the world, and passes of a step with the guidance of judged videos."""
PROMPTS, JUDGED_PROMPTS = 24, 8
"""Prompts that the generator is trained on, and those that it is judged by."""
NOISY = 0.5
"""Share of the transformer's blocks in the noisy reward: two of four."""


@dataclass(frozen=True, kw_only=True)
class PolicySize:
    """Budget of each algorithm, and sizes that it is spent in."""

    budget: int = 28_672
    """Evaluations of an algorithm, which are 224 for each judged video: 16 iterations of Flow-GRPO on all steps, and a
    quarter is four of them."""
    noises: int = 16
    """Noises per prompt in comparisons."""
    groups: int = 4
    """Prompts of an on-policy iteration."""
    samples: int = 8
    """Videos of a group."""
    batch: int = 24
    """Pairs, or prompts, of an optimizer step of algorithms that are not on-policy."""

    def of_video(self, share: float = 1.0) -> float:
        """Evaluations that a search may spend on one judged video.

        Args:
            share: Share of the budget.
        """
        return STEPS * GUIDED + share * self.budget / (JUDGED_PROMPTS * self.noises)
