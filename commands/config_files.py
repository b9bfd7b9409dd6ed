"""The configuration files that a command line names: found, looked at, and in the right company."""

import re
from collections.abc import Iterator
from importlib.resources import as_file, files
from pathlib import Path

from .. import VideoAlignError
from ..models.yaml_text import read_config
from .near_names import meant

FOLDER = Path(__file__).parents[1] / "experiments"
"""The shipped experiments."""
_CONFIG = re.compile(r"config(?:-(\d+))?\.yaml")


def configs_in(folder: Path) -> list[Path]:
    """The configurations that runs have left in a folder, in their order: one that goes on there writes another.

    Args:
        folder: Folder of a run.
    """
    numbered = {int(m[1] or 1): path for path in folder.glob("config*.yaml") if (m := _CONFIG.fullmatch(path.name))}
    return [numbered[number] for number in sorted(numbered)]


def packaged(path: str) -> str:
    """A path like ``experiments/...yaml`` that is not in the current folder, found in the installed package."""
    if not Path(path).exists() and path.startswith("experiments/"):
        with as_file(files("videoalign") / path) as inside:
            if inside.exists():
                return str(inside)
    return path


def configured(args: list[str]) -> list[str]:
    """Arguments with the configuration files that they name found and looked at.

    Args:
        args: Arguments as on the command line.

    Raises:
        VideoAlignError: If a file is not there, or holds no settings.
    """
    result = []
    for before, arg in zip(["", *args], args):
        option, equals, path = arg.partition("=")
        if before in ("-c", "--config"):
            arg = _read(arg)
        elif equals and option in ("-c", "--config"):
            arg = f"{option}={_read(path)}"
        result.append(arg)
    return result


def _read(path: str) -> str:
    found = packaged(path)
    if not Path(found).exists():
        shipped = [f"experiments/{file.relative_to(FOLDER).as_posix()}" for file in FOLDER.rglob("*.yaml")]
        if question := meant(path, shipped):
            raise VideoAlignError(f"--config {path} cannot be read: No such file or directory; {question}")
    read_config(found)
    return found


def _named(args: list[str]) -> Iterator[Path]:
    """The files that a command line names, in order."""
    for before, arg in zip(["", *args], args):
        option, equals, path = arg.partition("=")
        if before in ("-c", "--config"):
            yield Path(arg)
        elif equals and option in ("-c", "--config"):
            yield Path(path)


def put_behind(args: list[str]) -> str:
    """A sentence that names the files which a shipped one is put behind, if they are missing; else an empty text.

    Args:
        args: Arguments as on the command line; the files that they name can be read.
    """
    given = list(_named(args))
    for path in given:
        if not path.resolve().is_relative_to(FOLDER.resolve()):
            continue
        with open(path, encoding="utf-8") as file:
            whole = re.findall(r"--config (\S+)", file.readline())
        own = f"experiments/{path.resolve().relative_to(FOLDER.resolve()).as_posix()}"
        before = whole[: whole.index(own)] if own in whole and own != "experiments/miniature.yaml" else []
        if lacking := [one for one in before if Path(one).name not in {other.name for other in given}]:
            return f". {own} is put behind {' and '.join(lacking)}: its first line is the whole command"
    return ""
