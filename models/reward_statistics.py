"""Mean and standard deviation of a model's rewards on held-out data: what makes its three dimensions comparable."""

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path

from .. import VideoAlignError
from .dimensions import DIMENSIONS


@dataclass
class Statistics:
    """Mean and standard deviation of raw rewards over a validation set, per dimension."""

    mean: list[float] = field(default_factory=lambda: [0.0] * len(DIMENSIONS))
    std: list[float] = field(default_factory=lambda: [1.0] * len(DIMENSIONS))

    def _sound(self) -> bool:
        numbers = (*self.mean, *self.std)
        finite = all(isinstance(x, int | float) and math.isfinite(x) for x in numbers)
        return finite and len(self.mean) == len(self.std) == len(DIMENSIONS) and min(self.std) > 0

    def check(self, where: str) -> "Statistics":
        """Refuse numbers that nothing can be normalised with; returns itself."""
        try:
            sound = self._sound()
        except TypeError:  # a null in a record
            sound = False
        if not sound:
            raise VideoAlignError(
                f"{where}: means {self.mean} and deviations {self.std} cannot normalise rewards; they must be finite, deviations positive"
            )
        return self

    def exported(self, folder: str | Path) -> "Statistics":
        """What a folder is written with: itself, or zeros and ones with a warning where there is nothing to normalise with.

        A mean of 0 and a deviation of 1 do not show by themselves that nobody measured them.

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
            "note: %s has no statistics of its rewards, because %s, so rewards stay raw and dimensions cannot be weighed against "
            "each other; train or validate with held-out pairs (data.val) to have them",
            folder,
            why,
        )
        return Statistics()
