"""Sampling videos of prompts: what `videoalign generate` does, and every arm of a comparison."""

from typing import Any

from ..alignment.generation import Generate
from ..callbacks.write_parts import WriteParts
from ..datamodules.prompts import Prompts
from ..models.files import check_free
from ..models.locks import held
from .predicting import predicting


def generate(model: dict[str, Any], data: dict[str, Any], device: str, devices: int) -> None:
    """Sample videos and write them as a *videos* set; an interrupted run goes on.

    Args:
        model: Arguments of :class:`~videoalign.alignment.Generate`.
        data: Arguments of :class:`~videoalign.datamodules.prompts.Prompts`.
        device: Where to compute: ``auto``, ``cpu`` or ``gpu``.
        devices: Number of processes that share the videos.
    """
    with held(data["out"]):
        check_free(data["out"])
        prompts = Prompts(**data)
        trainer = predicting(device, [WriteParts()], True, devices)
        trainer.predict(Generate(**model), prompts, return_predictions=False)
