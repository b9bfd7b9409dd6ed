"""Folders and files that appear whole or not at all."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from .. import VideoAlignError
from .yaml_text import check_yaml


@contextlib.contextmanager
def new_folder(path: str | Path, replaces: str | None = None) -> Iterator[Path]:
    """A folder to fill; it takes its name when the block ends well, and vanishes when it does not.

    Args:
        path: must not exist yet, except as an empty folder. replaces: a folder that holds a file of this name is an
            earlier one of the same kind, and is replaced at the end.

    Raises:
        VideoAlignError: where something is there already.
    """
    path = Path(path)
    check_free(path, replaces)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        old = path.parent / f".{path.name}.old-{os.getpid()}"
        if path.exists():
            path.rename(old)
        partial.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_free(path: Path, replaces: str | None = None) -> None:
    """Refuse an output that :func:`new_folder` would refuse; for a look before long work."""
    if replaces and (path / replaces).is_file():
        return
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise VideoAlignError(f"output {path} exists already; name a new folder or remove it first")


def write_json(path: Path, value: Any) -> None:
    """:func:`write_text` of JSON. JSON has no NaN: what is undefined becomes null."""
    value = json.loads(json.dumps(value), parse_constant=lambda name: None)
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text through a temporary file, in a folder that is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def read_json(path: Path, what: str) -> Any:
    """Read JSON that must be there.

    Args:
        what: what the file is, for the message.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise VideoAlignError(f"{path.parent} is not {what}: it has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise VideoAlignError(f"{path}: {what} needs it, but it cannot be read ({error})") from None


def read_yaml(path: str | Path, option: str) -> Any:
    """What a YAML file of the user's holds.

    Args:
        path: The file.
        option: The option that names it, for the message.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        check_yaml(text, f"{option} {path}")
        return yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:  # an impossible date is a ValueError
        raise VideoAlignError(f"{option} {path} cannot be read ({str(error).splitlines()[0]})") from None
