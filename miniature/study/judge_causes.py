"""Cell (k) as data: judges that differ from the loop's own in one respect, and where their accuracies stand."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .paper_claims import KINDS, Found, Value

CLIPS_OF_PROMPT = (4, 8, 16, 48, 96)
"""Clips of each prompt that the same number of ratings is spread over, ascending; the pool has as many as the last."""
PAIRS = 900
"""Ratings of generated clips, and as many of rendered ones, whatever the number of clips."""
STEPS = 500
"""Most steps of a training over the number of clips: seven times over all pairs, 2 minutes on one core."""


@dataclass(frozen=True)
class Cause:
    """One respect in which a judge differs from the loop's own.

    Attributes:
        text: What differs.
        settings: Settings that override those of the loop's own judge.
        clips: Rated clips of each prompt; None for all.
        rendered: Whether rendered pairs are in the mix.
        captions: Settings that override those of the caption pre-training; none if it is the loop's own.
        patch: Side of the vision patches in pixels; None for the loop's own.
    """

    text: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    clips: int | None = None
    rendered: bool = True
    captions: Mapping[str, Any] = field(default_factory=dict)
    patch: int | None = None

    @property
    def own_pairs(self) -> bool:
        """Whether the judge is trained on other pairs than the loop's own."""
        return self.clips is not None or not self.rendered

    @property
    def own_backbone(self) -> bool:
        """Whether the judge starts from another backbone than the loop's own."""
        return bool(self.captions) or self.patch is not None


CAUSES: Mapping[str, Cause] = {
    "small-patches": Cause("patches of 8 pixels, so that a picture is four tokens, not one", patch=8),
    "placeless": Cause("captions do not say where the sprite is", captions={"data.init_args.places": False}),
    "undetailed": Cause("captions are whole sentences from the start", captions={"data.init_args.detailed": 0}),
    "few-clips": Cause("16 clips of each prompt, each pair rated more often", clips=16),
    "unrendered": Cause("no rendered pairs in the mix", rendered=False),
    "unaugmented": Cause("no mirrors and no shifts", {"data.init_args.augment": "null"}),
    "unmirrored": Cause("shifts alone, no mirrors", {"data.init_args.augment.init_args.flip": False}),
    "turned": Cause("x and y exchanged too, with their prompts", {"data.init_args.augment.init_args.transpose": True}),
}
"""Rows of the table of causes."""


def accuracy_of(name: str | None, dimension: str) -> Value:
    """Accuracy of a judge on generated clips of unseen prompts, without ties.

    Args:
        name: Key of :data:`CAUSES`, or ``clips-N``; None for the loop's own judge.
        dimension: The dimension.
    """

    def of(found: Found) -> float:
        rows = found["reward models"][f"judge-{name}"] if name else found["judges"]["reward"]
        return rows["generated"][dimension][KINDS[0]]

    return of
