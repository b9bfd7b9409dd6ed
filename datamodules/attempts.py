"""Requests to a store that are repeated where that may help, and a message for those that fail for good."""

import errno
import os
import random
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from .. import VideoAlignError, stopping
from ..redaction import redacted

T = TypeVar("T")

ATTEMPTS = 8
"""Largest number of attempts of a request; the environment variable VIDEOALIGN_STORE_ATTEMPTS replaces it."""
TIMEOUT = 60.0
"""Seconds that an attempt may take, with a second more for every :data:`RATE` bytes; the environment variable
VIDEOALIGN_STORE_TIMEOUT replaces it."""
RATE = 1e6
"""Bytes per second below which a connection counts as hanging."""
PAUSE, LONGEST_PAUSE = 0.5, 20.0
"""Seconds before the second attempt, which double before each further one, and their limit; a random part of up to a
half is taken off, so that many processes do not come back at once."""
AGAIN = (408, 425, 429)
"""Statuses below 500 that ask to try again."""
AGAIN_CODES = {"RequestTimeout", "Throttling", "ThrottlingException", "SlowDown", "InternalError"}
"""Error codes of S3 that ask to try again, whatever their status is."""
TRANSIENT = (
    "ClientError",
    "HTTPClientError",
    "IncompleteReadError",
    "ResponseParserError",
    "FlexibleChecksumError",
    "HttpError",
    "HTTPException",
    "TransportError",
)
"""Classes of the libraries' errors in which a connection failed."""


class StoreError(OSError):
    """A store that does not give or take a file; the message names the address.

    It is an OSError, because the surroundings are its cause: it ends the command with status 2, and is never counted as
    an unusable sample.

    Attributes:
        missing: Whether the store says that there is no such file.
    """

    missing = False


def limit(name: str, default: float, least: float) -> float:
    """A number from an environment variable.

    Args:
        name: Name of the variable.
        default: Value where it is not set.
        least: Least value that it may have.

    Raises:
        VideoAlignError: If its value is no such number.
    """
    text = os.environ.get(name, "")
    try:
        value = float(text) if text.strip() else default
    except ValueError:
        value = least - 1
    if not least <= value < float("inf"):
        raise VideoAlignError(f"environment variable {name} must be a number from {least:g} on, got {text!r}")
    return value


def timeout(size: int = 0) -> float:
    """Seconds that an attempt to move ``size`` bytes may take."""
    return limit("VIDEOALIGN_STORE_TIMEOUT", TIMEOUT, 0.1) + size / RATE


def attempted(once: Callable[[], T], address: str, remedy: str) -> T:
    """Call a function until it succeeds, fails in a way that another attempt does not mend, or has failed too often.

    Args:
        once: Function that makes a request.
        address: Address of the file, without credentials.
        remedy: What the user can do where access is refused.

    Raises:
        StoreError: If it has failed for good.
    """
    most, began = int(limit("VIDEOALIGN_STORE_ATTEMPTS", ATTEMPTS, 1)), time.monotonic()
    for number in range(1, most + 1):
        try:
            return once()
        except StoreError:
            raise
        except Exception as error:
            status, code = status_of(error)
            if not _again(error, status, code):
                if why := _refused(error, status, code, remedy):
                    refusal = StoreError(f"{address}: {why}")
                    refusal.missing = status == 404
                    raise refusal from None
                raise
            why = _why(error, status, code)
            if number == most or stopping.asked() is not None:
                tried = f"{number} attempts in {time.monotonic() - began:.0f} s failed, the last one with"
                raise StoreError(f"{address}: {tried} {why}; look whether the store can be reached") from None
            if number > 1:
                text = f"videoalign: note: {address}: {why}; attempt {number + 1} of {most}"
                print(text, file=sys.stderr, flush=True)
            pause(number)
    raise AssertionError("unreachable: the last attempt returns or raises")


def pause(number: int) -> None:
    """Wait after an attempt.

    Args:
        number: Number of the attempt, from 1.
    """
    time.sleep(min(PAUSE * 2 ** (number - 1), LONGEST_PAUSE) * random.uniform(0.5, 1.0))


def status_of(error: BaseException) -> tuple[int | None, str]:
    """HTTP status of an error of any of the libraries, and the store's error code; None and "" where there is none."""
    for one in _chain(error):
        response = getattr(one, "response", None)
        if isinstance(response, dict):  # botocore
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return _number(status), str(response.get("Error", {}).get("Code", ""))
        # aiohttp (whose errors about a body that was cut off call themselves 400, too), gcsfs
        if _named(one, "ClientResponseError", "HttpError"):
            return _number(getattr(one, "status", None) or getattr(one, "code", None)), ""
    for one in _chain(error):
        if isinstance(one, FileNotFoundError | PermissionError):
            return 404 if isinstance(one, FileNotFoundError) else 403, ""
    return None, ""


def _number(value: Any) -> int | None:
    text = str(value)
    return int(text) if text.isdigit() and 100 <= int(text) < 600 else None


def _chain(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    for _ in range(10):
        if current is None:
            return
        yield current
        current = current.__cause__


def _named(error: BaseException, *parts: str) -> bool:
    return any(part in base.__name__ for base in type(error).__mro__ for part in parts)


def _again(error: Exception, status: int | None, code: str) -> bool:
    if code in AGAIN_CODES:
        return True
    if status is not None:
        return status >= 500 or status in AGAIN
    if any(isinstance(one, socket.gaierror) and one.errno == socket.EAI_NONAME for one in _chain(error)):
        return False
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        return False  # of this machine's disk
    return isinstance(error, OSError) or any(base.__name__ in TRANSIENT for base in type(error).__mro__)


def _refused(error: Exception, status: int | None, code: str, remedy: str) -> str | None:
    """Why no further attempt is made; None for a fault of the program."""
    said = f"HTTP {status}{f' {code}' if code and code != str(status) else ''}" if status else ""
    if status == 404:
        return f"there is no such file ({said}); look whether the address is right, and the set copied whole"
    if status in (401, 403):
        return f"access was refused ({said}); {remedy}"
    if status:
        return f"the store refused the request ({said}: {_words(error)})"
    if _named(error, "Credential", "Token", "Profile", "RefreshError", "SSO"):
        return f"there are no usable credentials ({_words(error)}); {remedy}"
    if any(isinstance(one, socket.gaierror) for one in _chain(error)):
        return f"the server's name is unknown ({_words(error)}); look whether the address is right"
    if isinstance(error, OSError) or _named(error, "BotoCoreError", "InvalidURL", "InvalidUrl"):
        return _words(error)
    return None


def _why(error: Exception, status: int | None, code: str) -> str:
    if status:
        return f"HTTP {status}{f' {code}' if code and code != str(status) else ''}"
    if isinstance(error, TimeoutError) or _named(error, "Timeout"):
        return f"no answer in time ({type(error).__name__})"
    return _words(error)


def _words(error: BaseException) -> str:
    line = next(iter(str(error).strip().splitlines()), "")
    text = redacted(line)[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
