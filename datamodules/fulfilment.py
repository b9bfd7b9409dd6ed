"""How an object is checked against a contract of :mod:`.contracts`."""

from collections.abc import Callable
from typing import Protocol, TypeVar

from .. import VideoAlignError

T = TypeVar("T")
OFFERED_BY: dict[type, str] = {}
"""Who offers each contract, as it stands in the message of :func:`require`."""


def offered_by(words: str) -> Callable[[type[T]], type[T]]:
    """Declare who offers a contract.

    Args:
        words: The partner that fulfils it and the classes to choose, as the object of "needs".
    """

    def declare(contract: type[T]) -> type[T]:
        OFFERED_BY[contract] = words
        return contract

    return declare


def missing(partner: object, contract: type) -> list[str]:
    """Names of a contract that an object lacks; a method's name ends in ``()``.

    ``isinstance`` with a runtime-checkable Protocol does not serve: since Python 3.12 it looks past ``__getattr__``,
    through which a torch module gives its submodules.
    """
    lacking = []
    for base in reversed(contract.__mro__):
        if Protocol not in base.__bases__:
            continue
        for name, member in vars(base).items():
            method = callable(member)
            if name.startswith("_") or not (method or isinstance(member, property)):
                continue
            if not hasattr(partner, name) or (method and not callable(getattr(partner, name))):
                lacking.append(f"{name}()" if method else name)
    return lacking


def offers(partner: object, contract: type) -> bool:
    """Whether an object has every attribute and method of a contract."""
    return partner is not None and not missing(partner, contract)


def require(partner: object, contract: type[T], who: str) -> T:
    """Return an object under the type of a contract, or refuse it.

    Args:
        partner: The module, DataModule or network that is asked; None where the Trainer has none.
        contract: The Protocol that it must fulfil.
        who: The class or the option of the configuration that asks, for the message.

    Raises:
        VideoAlignError: If the object lacks a part of the contract; names the part, the object's class and the classes
            to use instead.
    """
    if partner is None:
        raise VideoAlignError(f"{who} needs {OFFERED_BY[contract]}, but the Trainer was given none")
    if lacking := missing(partner, contract):
        kind = type(partner).__name__
        raise VideoAlignError(f"{who} needs {OFFERED_BY[contract]}; {kind} has no {', '.join(lacking)}")
    return partner
