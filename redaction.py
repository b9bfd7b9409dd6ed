"""Addresses and error texts without credentials: what may be printed, logged and saved."""

import os
import re
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

HIDDEN = "***"
"""What stands in place of a credential."""
_LEAST = 8
"""Shortest value of an environment variable that is taken for a credential; a shorter one may be any word."""
_USER = re.compile(r"(?P<scheme>\b[a-z][a-z0-9+.-]*:/{1,2})[^/?#\s'\"]*@", re.I)
_QUERY = re.compile(r"(?P<address>\b[a-z][a-z0-9+.-]*:/{1,2}[^\s'\"<>?]*)\?[^\s'\"<>]*", re.I)
_NAMES = (
    r"(?:[\w-]*[_-])?(?:token|secret|password|passwd|signature|sig|credential|api[_-]?key|access[_-]?key(?:[_-]?id)?)|"
    r"awsaccesskeyid|googleaccessid"
)
_NAMED = re.compile(
    rf"(?P<name>\b(?:x-(?:amz|goog)-[\w-]+\s*[=:]|(?:{_NAMES})(?:['\"]?\s*=|['\"]\s*:))\s*['\"]?)[^\s&'\",;]+", re.I
)
_SCHEME = re.compile(r"\b(?P<name>Bearer|Basic|Credential=)\s*[\w.~+/=-]{8,}")
_SHAPES = re.compile(r"\b(?:(?:AKIA|ASIA)[A-Z0-9]{16}|hf_[A-Za-z0-9]{16,}|ya29\.[\w-]+)")
_SECRET = re.compile(r"secret|token|password|passwd|credential|api_?key|access_?key", re.I)


def redacted(text: str) -> str:
    """A text without the credentials that it may hold.

    Left out are names and passwords in addresses, queries of addresses, values that are called a token, a signature, a
    password or the like, and the values of environment variables with such names.

    Args:
        text: An address, an error's text, or anything else that is going to be shown.
    """
    text = _QUERY.sub(rf"\g<address>?{HIDDEN}", _USER.sub(rf"\g<scheme>{HIDDEN}@", text))
    text = _NAMED.sub(rf"\g<name>{HIDDEN}", _SCHEME.sub(rf"\g<name> {HIDDEN}", text))
    text = _SHAPES.sub(HIDDEN, text)
    for secret in _secrets():
        text = text.replace(secret, HIDDEN)
    return text


def redacted_tree(value: Any) -> Any:
    """A copy of a configuration whose addresses hold no credentials; other texts stay as they are.

    Args:
        value: Plain values, lists, dictionaries, and jsonargparse's namespaces.
    """
    if isinstance(value, dict):
        return {name: redacted_tree(one) for name, one in value.items()}
    if isinstance(value, list):
        return [redacted_tree(one) for one in value]
    if isinstance(value, Namespace):
        return type(value)(**{name: redacted_tree(one) for name, one in vars(value).items()})
    return redacted(value) if isinstance(value, str) and "://" in value else value


def _secrets() -> Iterator[str]:
    for name, value in os.environ.items():
        if len(value) >= _LEAST and _SECRET.search(name) and not os.path.exists(value):
            yield value
