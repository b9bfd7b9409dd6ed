"""What a loss finds to learn from in a set of rated pairs: told before a training that teaches nothing."""

from collections.abc import Iterable, Iterator

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from .. import VideoAlignError
from ..models.dimensions import DIMENSIONS
from .contents import Content, Contents
from .contracts import LearnsFromRatings, offers
from .ratings import labels_of, scores_of


def check_rated(contents: Contents, name: str) -> None:
    """Refuse a set in which no pair is rated.

    Args:
        contents: Samples of the set.
        name: What to call the set in the message.

    Raises:
        VideoAlignError: Where no pair has a label or a score.
    """
    for content in contents:
        if not (_labels(content).isnan().all() and scores_of(content.record, content.name).isnan().all()):
            return
    raise VideoAlignError(f"{name}: none of its {len(contents)} pairs has a label or a score; rate some first")


def ratings_in(contents: Contents) -> Iterator[tuple[Tensor, Tensor]]:
    """Labels (D,) and scores (2, D) of each pair of a set, NaN for none; unsound ones are dropped when read."""
    for content in contents:
        try:
            ratings = _labels(content), scores_of(content.record, content.name)
        except VideoAlignError:
            continue
        yield ratings


def check_targets(module: object, ratings: Iterable[tuple[Tensor, Tensor]], name: str) -> None:
    """Refuse a set from which a module's loss learns nothing, and tell of dimensions of which it learns nothing.

    Args:
        module: Module that trains. One that does not say what it learns from is not asked.
        ratings: Labels (D,) and scores (2, D) of the pairs that are used, as :func:`ratings_in` gives them.
        name: What to call the set in messages.

    Raises:
        VideoAlignError: Where the loss has no target in any dimension of any pair.
    """
    if not offers(module, LearnsFromRatings):
        return
    found, number = torch.zeros(len(DIMENSIONS), dtype=torch.bool), 0
    for labels, scores in ratings:
        found, number = found | module.targets(labels, scores), number + 1
        if found.all():
            return
    reads = "btt reads labels, bt labels that are no ties, and reg scores from 1 to 5"
    if not found.any():
        raise VideoAlignError(f"{name}: none of its {number} pairs has what this model.loss learns from: {reads}")
    lacking = ", ".join(name for name, some in zip(DIMENSIONS, found.tolist()) if not some)
    rank_zero_warn(
        f"none of the {number} pairs of {name} has a target for {lacking} that this model.loss learns from ({reads}): "
        "what is given as reward there stays as it began, and counts in Overall all the same"
    )


def _labels(content: Content) -> Tensor:
    return labels_of(content.record, content.name)[: len(DIMENSIONS)]  # the last one is Overall
