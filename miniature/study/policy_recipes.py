"""The algorithms of `videoalign study on-policy`: what each trains on, what its optimizer step costs, what is tuned."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ... import VideoAlignError
from ...commands.comparison import OWN_VIEW
from ...models.evaluations import BACKWARD
from .paper_claims import RM
from .policy_size import NOISY, PROMPTS, SHARES, STEPS, PolicySize

Values = Mapping[str, float]
"""Settings of a trial: learning rate ``lr``, or ``strength`` of a search."""

PASSES = 2
"""Times of each sample in an optimizer step of the on-policy algorithms but for GRPO."""
WINDOW = 4
"""Stochastic steps of MixGRPO."""
OLD, REFERENCE = 1.0, 1.0
"""Evaluations of a sample by the behaviour policy and by the reference."""


@dataclass(frozen=True)
class Recipe:
    """An algorithm that trains.

    Attributes:
        text: Its name for people.
        experiments: Names of its files in experiments/sprites.
        step: Evaluations of one optimizer step, with all that is sampled for it; of an on-policy algorithm it is an
            iteration. Where it depends on what is drawn, the most that it can be.
        rates: Learning rates that tuning tries, ascending.
        reads: What it learns from: ``pairs`` of the base's samples, which cost something, ``prompts``, on which it
            samples by itself, or ``seeds`` of the pairs alone.
        own: Whose ratings are its own reward: the reward model's, or the noisy reward's.
    """

    text: str
    experiments: tuple[str, ...]
    step: Callable[[PolicySize], float]
    rates: tuple[float, ...]
    reads: str = "pairs"
    own: str = RM

    @property
    def on_policy(self) -> bool:
        """Whether an epoch is an iteration that samples groups."""
        return self.reads == "prompts"


def _grouped(each: float, of_pair: float = 0.0) -> Callable[[PolicySize], float]:
    """Evaluations of an iteration: ``each`` for training on a sample, ``of_pair`` on each group's pair."""
    return lambda size: size.groups * (size.samples * (STEPS + each) + of_pair)


def _batched(each: float) -> Callable[[PolicySize], float]:
    """Evaluations of a step: ``each`` for a pair or prompt."""
    return lambda size: size.batch * each


_WIDE, _PAIRED, _GRADIENT = (5e-4, 1.5e-3, 4.5e-3, 1.35e-2), (1.5e-4, 5e-4, 1.5e-3, 4.5e-3), (3e-4, 1e-3, 3e-3, 1e-2)
"""Of three rates the highest was best for six of ten algorithms, so all got a fourth, which is best for none."""
RECIPES: dict[str, Recipe] = {
    "sft": Recipe("SFT", ("flow_sft",), _batched(BACKWARD), _WIDE),
    "rwr": Recipe("Flow-RWR", ("flow_sft", "flow_rwr"), _batched(2 * BACKWARD), _WIDE),
    "dpo": Recipe("Flow-DPO (offline)", ("flow_sft", "flow_dpo"), _batched(2 * (BACKWARD + REFERENCE)), _PAIRED),
    "online-dpo": Recipe(
        "Flow-DPO (online)", ("on_policy",), _grouped(0, PASSES * 2 * (BACKWARD + REFERENCE)), _PAIRED, "prompts"
    ),
    "nft": Recipe(
        "DiffusionNFT", ("on_policy", "nft"), _grouped(PASSES * (OLD + REFERENCE + BACKWARD)), _WIDE, "prompts"
    ),
    "awm": Recipe("AWM", ("on_policy", "awm"), _grouped(PASSES * (OLD + REFERENCE + BACKWARD)), _WIDE, "prompts"),
    "grpo": Recipe(
        "Flow-GRPO (all steps)", ("on_policy", "grpo"), _grouped((STEPS - 1) * (OLD + BACKWARD)), _WIDE, "prompts"
    ),
    "grpo-mix": Recipe(
        "MixGRPO (window)", ("on_policy", "grpo", "grpo_mix"), _grouped(WINDOW * (OLD + BACKWARD)), _WIDE, "prompts"
    ),
    # every other step is one of flow matching; the last step that may be drawn is the last but one
    "prfl": Recipe(
        "PRFL",
        ("flow_sft", "prfl"),
        _batched((STEPS - 2 + BACKWARD + NOISY * BACKWARD + BACKWARD) / 2),
        _GRADIENT,
        own=OWN_VIEW,
    ),
    "draft": Recipe("DRaFT-1", ("flow_sft", "draft"), _batched(STEPS - 1 + BACKWARD), _GRADIENT, "seeds"),
}
"""Algorithms by name."""
OF_POOL = (RM, OWN_VIEW)
"""Whose ratings may be an algorithm's own reward."""


def before(recipe: Recipe, fresh: int) -> float:
    """Evaluations before the first step: the samples that pairs were made of.

    Args:
        recipe: The algorithm.
        fresh: Videos per prompt among them.
    """
    return float(PROMPTS * fresh * STEPS) if recipe.reads == "pairs" else 0.0


def steps_of(name: str, size: PolicySize, fresh: int) -> dict[str, int]:
    """Optimizer steps after which the shares of the budget are spent, never more than them.

    Args:
        name: Name of the algorithm.
        size: Budget and sizes.
        fresh: Videos per prompt among the samples that pairs are made of.

    Raises:
        VideoAlignError: Where a share buys no step, or no more than a smaller share.
    """
    recipe = RECIPES[name]
    left = {share: part * size.budget - before(recipe, fresh) for share, part in SHARES.items()}
    found = {share: int(rest // recipe.step(size)) for share, rest in left.items()}
    if min(found.values()) < 1 or len({*found.values()}) < len(found):
        raise VideoAlignError(
            f"a budget of {size.budget} evaluations gives {name} the steps {found}, of {recipe.step(size):g} "
            f"evaluations each, after {before(recipe, fresh):g} for its pairs: it must be larger"
        )
    return found


def spent(name: str, size: PolicySize, fresh: int) -> dict[str, float]:
    """Evaluations at each share, by the rule.

    Args:
        name: Name of the algorithm.
        size: Budget and sizes.
        fresh: Videos per prompt among the samples that pairs are made of.
    """
    recipe = RECIPES[name]
    return {share: before(recipe, fresh) + n * recipe.step(size) for share, n in steps_of(name, size, fresh).items()}
