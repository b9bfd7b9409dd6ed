"""Classes by the names that YAML gives them, and what is wrong with a name that leads to none."""

import importlib
import inspect
import pkgutil
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from jsonargparse._typehints import get_all_subclass_paths

from .near_names import instead, meant


class NotFound(Exception):
    """A name leads to no class that fits; the text says why, a sentence without its subject."""


def find_class(name: str, bases: Sequence[type]) -> Any:
    """The class, or function that returns an object, of this name.

    Args:
        name: Import path, or the name alone of a subclass that is imported already.
        bases: Classes of which it must be a subclass.

    Raises:
        NotFound: Where there is none.
    """
    if "." not in name:
        return _imported(_by_short_name(name, bases))
    found = _imported(name)
    if inspect.isclass(found) and not any(derives(found, base) for base in bases):
        kind = bases[0].__name__
        short = instead(name, _paths(bases))
        raise NotFound(f"names {name}, which is no {kind}; {short}")
    if not callable(found):
        raise NotFound(f"names {name}, which is no class")
    if inspect.isclass(found) and len(bases) == 1 and (lacking := _lacking(found, bases[0])):
        raise NotFound(f"names {name}, which is no {bases[0].__name__}: it has no {', '.join(lacking)}")
    return found


def derives(cls: type, base: type) -> bool:
    """Whether a class may stand where another one is wanted; any may stand where a protocol is."""
    return getattr(base, "_is_protocol", False) or issubclass(cls, base)


def _lacking(cls: type, base: type) -> list[str]:
    """Methods that a protocol asks for and a class does not have. (What an object sets itself is not seen here.)"""
    wanted = [name for name, value in vars(base).items() if inspect.isfunction(value) and name != "__init__"]
    have = {name for one in cls.__mro__ for name in vars(one)}
    return [name for name in wanted if getattr(base, "_is_protocol", False) and name not in have]


def _paths(bases: Sequence[type]) -> dict[str, str]:
    """Import paths of known subclasses by their last names; the last one of equal names."""
    paths = [path for base in bases for path in get_all_subclass_paths(base)]
    return {path.rpartition(".")[2]: path for path in paths}


def _by_short_name(name: str, bases: Sequence[type]) -> str:
    paths = sorted({path for base in bases for path in get_all_subclass_paths(base)})
    found = [path for path in paths if path.rpartition(".")[2] == name]
    if len(found) > 1:
        raise NotFound(f"{name} is the name of {len(found)} classes; give the whole path: {' or '.join(found)}")
    if not found:
        if not paths:
            raise NotFound(f"is {name}, which is no import path; write PACKAGE.MODULE.{name}")
        known = [path.rpartition(".")[2] for path in paths]
        raise NotFound(f"names no {bases[0].__name__} {name}; {instead(name, dict.fromkeys(known))}")
    return found[0]


def _imported(path: str) -> Any:
    """What an import path leads to; the longest part of it that is a module is imported."""
    parts = path.split(".")
    here: Any = None
    for number, part in enumerate(parts):
        module = ".".join(parts[: number + 1])
        if here is not None and hasattr(here, part):
            here = getattr(here, part)
            continue
        if here is not None and not isinstance(here, ModuleType):
            raise NotFound(f"names {path}, but {'.'.join(parts[:number])} has no {part}")
        try:
            here = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
                raise NotFound(f"names {path}, but {module} cannot be imported: {error}") from None
            raise NotFound(f"names {path}, but {_lacks(here, '.'.join(parts[:number]), part)}") from None
        except Exception as error:  # anything may happen while a user's module is imported
            why = f"{type(error).__name__}: {error}"
            raise NotFound(f"names {path}, but {module} cannot be imported: {why}") from None
    return here


def _lacks(inside: ModuleType | None, name: str, part: str) -> str:
    """That a module has no such name, and a like one."""
    if inside is None:
        return f"there is no module {part}; install it, or add its folder to PYTHONPATH"
    names = {*dir(inside), *(module.name for module in pkgutil.iter_modules(getattr(inside, "__path__", [])))}
    question = meant(part, [one for one in names if not one.startswith("_")])
    return f"{name} has no {part}" + (f"; {question}" if question else "")
