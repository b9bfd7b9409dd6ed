"""Sampling videos of prompts: what `videoalign generate` does, and every arm of a comparison."""

from typing import Any

import jsonargparse

from .. import VideoAlignError
from ..alignment.generation import Generate
from ..callbacks.write_parts import WriteParts
from ..datamodules.prompts import Prompts
from ..models.files import check_free
from ..models.locks import held
from ..models.memory import Memory
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


def memory_of(text: str) -> Memory:
    """The options of memory and speed that a user writes as YAML.

    Args:
        text: A mapping of the fields of :class:`~videoalign.models.memory.Memory`.

    Raises:
        VideoAlignError: Where it is no such mapping, or its values are not allowed.
    """
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--memory", type=Memory)
    try:
        return parser.instantiate_classes(parser.parse_args([f"--memory={text}"])).memory
    except jsonargparse.ArgumentError as error:
        lines = [line.strip(" -") for line in str(error).splitlines() if line.strip(" -")]
        raise VideoAlignError(f"--memory {text!r}: {' '.join(lines)[:600]}") from None
