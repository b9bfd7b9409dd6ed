"""Where commands compute."""

from typing import TYPE_CHECKING

from .. import VideoAlignError

if TYPE_CHECKING:  # what only names devices does without
    import lightning as L

DEVICES = ("auto", "cpu", "gpu", "cuda")
"""What ``--device`` takes."""


def supported(trainer: "L.Trainer") -> "L.Trainer":
    """The trainer, unless it would compute on a GPU of Apple.

    Raises:
        VideoAlignError: If it would.
    """
    if trainer.strategy.root_device.type == "mps":
        raise VideoAlignError(
            "Apple's GPUs have no float64, in which times and accuracies are computed here: compute on the CPU "
            "(trainer.accelerator: cpu, or device cpu)"
        )
    return trainer
