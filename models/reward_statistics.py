"""Mean and standard deviation of a model's rewards on held-out data, which make its three dimensions comparable."""

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path

from .. import VideoAlignError
from .dimensions import DIMENSIONS


@dataclass
class Statistics:
    """Mean and standard deviation of raw rewards over a held-out set, per dimension."""

    mean: list[float] = field(default_factory=lambda: [0.0] * len(DIMENSIONS))
    """Means of the rewards VQ, MQ and TA; zeros where they were never measured."""
    std: list[float] = field(default_factory=lambda: [1.0] * len(DIMENSIONS))
    """Standard deviations of the rewards VQ, MQ and TA, above 0; ones where they were never measured."""

    def _sound(self) -> bool:
        numbers = (*self.mean, *self.std)
        finite = all(isinstance(x, int | float) and math.isfinite(x) for x in numbers)
        return finite and len(self.mean) == len(self.std) == len(DIMENSIONS) and min(self.std) > 0

    def check(self, where: str) -> "Statistics":
        """Refuse numbers that cannot normalise rewards, and return the statistics otherwise.

        Args:
            where: File that holds the numbers, for the message.

        Raises:
            VideoAlignError: Where a number is missing or not finite, or a deviation is not positive.
        """
        try:
            sound = self._sound()
        except TypeError:  # a null in a record
            sound = False
        if not sound:
            raise VideoAlignError(
                f"{where}: means {self.mean} and deviations {self.std} cannot normalise rewards; they must be finite, "
                "deviations positive"
            )
        return self

    def exported(self, folder: str | Path) -> "Statistics":
        """The statistics to write into a folder: these, or zeros and ones with a warning if these cannot normalise.

        The warning is needed because means of 0 and deviations of 1 do not show that they were never measured.

        Args:
            folder: Folder that is written, for the warning.
        """
        if self != Statistics() and self._sound():
            return self
        why = (
            "nothing was validated"
            if self == Statistics()
            else f"deviations {self.std} on the validation set are unusable"
        )
        logging.getLogger(__name__).warning(
            "note: %s has no statistics of its rewards, because %s, so rewards stay raw and dimensions cannot be "
            "weighed against each other; train or validate with held-out pairs (data.val) to have them",
            folder,
            why,
        )
        return Statistics()
