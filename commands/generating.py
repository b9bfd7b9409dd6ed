"""Sampling videos of prompts: what `videoalign generate` does, and every arm of a comparison."""

from dataclasses import fields, is_dataclass
from typing import Any

import jsonargparse

from .. import VideoAlignError
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


def value_of(name: str, kind: Any, text: str) -> Any:
    """An option's value that a user writes as YAML: a mapping of fields, or a class with its arguments.

    Args:
        name: Name of the option, without the dashes.
        kind: Class of the value: a dataclass, or the base of the classes that may be named.
        text: What the user wrote.

    Raises:
        VideoAlignError: Where it describes no such value, or values that are not allowed.
    """
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{name}", type=kind)
    try:
        return parser.instantiate_classes(parser.parse_args([f"--{name}={text}"]))[name]
    except jsonargparse.ArgumentError as error:
        lines = [line.strip(" -") for line in str(error).splitlines() if line.strip(" -")]
        there = (
            [f.name for f in fields(kind)] if is_dataclass(kind) else sorted(k.__name__ for k in kind.__subclasses__())
        )
        what = "its keys are" if is_dataclass(kind) else "name one of"
        raise VideoAlignError(f"--{name} {text!r}: {what} {', '.join(there)} ({' '.join(lines)[:600]})") from None
