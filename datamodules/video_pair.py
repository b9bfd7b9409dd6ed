"""One rated pair of videos, decoded."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class VideoPair:
    """A decoded pair of videos with its ratings.

    Attributes:
        key: Key of the sample.
        prompt: Text that both videos were generated from.
        videos: Frames of A and B, uint8 (T, 3, H, W).
        labels: Labels (4,) in VQ, MQ, TA and Overall; NaN where there is none.
        scores: Scores (2, 3) of A and B in VQ, MQ and TA; NaN where there is none.
        sources: Names of the models that made A and B; empty where unknown.
        image: Image that both begin with, uint8 (3, H, W), where the reward model is shown it.
    """

    key: str
    prompt: str
    videos: tuple[Tensor, Tensor]
    labels: Tensor
    scores: Tensor
    sources: tuple[str, str]
    image: Tensor | None = None

    def swapped(self) -> "VideoPair":
        """The same pair with A and B exchanged, labels and scores with them."""
        return VideoPair(
            self.key, self.prompt, self.videos[::-1], -self.labels, self.scores.flip(0), self.sources[::-1], self.image
        )
