"""Searches and guidance of `videoalign study on-policy`, each at the evaluations that a share of the budget allows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...commands.arms import Arm
from ...models.evaluations import BACKWARD
from ...models.guidance import Guidance
from ...models.particles import Particles
from ...models.search import BestOfN
from .policy_recipes import Values
from .policy_size import GUIDED, NOISY, SHARES, STEPS, PolicySize

REWARD = "noisy_reward"
"""Folder of the noisy reward, which searches and guides."""
PLAIN = "plain"
"""Name of the arm whose videos are the base's, rated by the noisy reward."""
_CANDIDATE = STEPS * GUIDED
_READ = 5
"""Readings of the noisy reward by particles: after each fifth of the steps."""


@dataclass(frozen=True)
class Way:
    """A way of sampling that needs no training.

    Attributes:
        text: Its name for people.
        each: Evaluations of one candidate.
        arm: Makes the arm of a number of candidates and a setting.
        strengths: Strengths that tuning tries; empty where there is nothing to choose.
        of: Name of the way whose tuned strength it takes, if it has no trials of its own.
        least: Least number of candidates.
    """

    text: str
    each: float
    arm: Callable[[int, float], Arm]
    strengths: tuple[float, ...] = ()
    of: str = ""
    least: int = 1

    def candidates(self, size: PolicySize, share: float) -> int:
        """Candidates of a video that a share of the budget allows, but at least :attr:`least`.

        Args:
            size: Budget and sizes.
            share: Share of the budget.
        """
        return max(self.least, int(size.of_video(share) // self.each))


def _guided(count: int, strength: float) -> Arm:
    # a search needs two candidates: one alone is a plain guided sample
    chosen = {"search": BestOfN(candidates=count)} if count > 1 else {}
    return Arm(noisy_reward=REWARD, guide=Guidance(strength=strength), **chosen)


WAYS: dict[str, Way] = {
    "best-of-n": Way(
        "best of N",
        _CANDIDATE + NOISY,
        lambda n, _: Arm(noisy_reward=REWARD, search=BestOfN(candidates=n)),
        least=2,
    ),
    "smc": Way(
        "SMC",
        _CANDIDATE + _READ * NOISY,
        lambda n, strength: Arm(noisy_reward=REWARD, search=Particles(candidates=n, strength=strength)),
        (1.0, 3.0, 10.0, 30.0),
        least=2,
    ),
    "nrg": Way(
        "Flow-NRG",
        # the first step, from pure noise, is not guided
        _CANDIDATE + (STEPS - 1) * BACKWARD * NOISY,
        lambda _, strength: _guided(1, strength),
        (10.0, 30.0, 100.0, 300.0),
    ),
    "nrg-best": Way(
        "Flow-NRG + best of N",
        _CANDIDATE + (STEPS - 1) * BACKWARD * NOISY + NOISY,
        lambda n, strength: _guided(n, strength),
        of="nrg",
    ),
}
"""Ways by name. Flow-NRG alone cannot spend the whole budget; the best of several guided samples does."""


def arms(size: PolicySize, share: str, tuned: Mapping[str, Values]) -> dict[str, Arm]:
    """Arms at a share of the budget.

    Args:
        size: Budget and sizes.
        share: One of :data:`.policy_size.SHARES`.
        tuned: Chosen settings by name.
    """
    found = {}
    for name, way in WAYS.items():
        if name == "nrg" and share != "full":
            continue  # the same videos at any share
        strength = tuned[way.of or name]["strength"] if way.strengths or way.of else 0.0
        found[name] = way.arm(way.candidates(size, SHARES[share]), strength)
    return found


def trials(size: PolicySize) -> dict[str, list[tuple[Values, Arm]]]:
    """Settings that tuning tries with their arms, at the whole budget, by name.

    Args:
        size: Budget and sizes.
    """
    return {
        name: [({"strength": s}, way.arm(way.candidates(size, 1.0), s)) for s in way.strengths]
        for name, way in WAYS.items()
        if way.strengths
    }
