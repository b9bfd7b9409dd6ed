"""Addresses of sets: local folders, ``s3://``, ``gs://``, ``https://`` and ``hf://``, and lists of them in braces."""

import importlib.util
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit

from .. import VideoAlignError
from ..redaction import redacted

if TYPE_CHECKING:
    from fsspec.asyn import AsyncFileSystem

_ADDRESS = re.compile(r"(?P<scheme>[a-zA-Z][a-zA-Z0-9+.-]+)://(?P<rest>.*)", re.S)
_FILE = re.compile(r"\Afile://(localhost(?=/))?", re.I)
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?\}")
_HUB = re.compile(
    r"(?P<kind>datasets/|spaces/|)(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[^/]+))?(?:/(?P<path>.*))?", re.S
)
THREADS = 16
"""Requests that a process makes at once."""


@dataclass(frozen=True)
class Scheme:
    """What begins an address.

    Attributes:
        package: Package that talks to the store.
        install: What to give to pip for it.
        filesystem: Makes fsspec's file system, without caches and retries of its own.
        remedy: What to do where access is refused.
        writes: Whether sets can be written there.
        lists: Whether files of a folder can be listed.
    """

    package: str
    install: str
    filesystem: "Callable[[], AsyncFileSystem]"
    remedy: str
    writes: bool = False
    lists: bool = False


def _s3() -> "AsyncFileSystem":
    from s3fs import S3FileSystem

    config = {"connect_timeout": 10, "read_timeout": 60, "max_pool_connections": 2 * THREADS}
    fs = S3FileSystem(
        skip_instance_cache=True,
        use_listings_cache=False,
        config_kwargs={**config, "retries": {"total_max_attempts": 1}},
    )
    fs.retries = 1  # ours are counted
    return fs


def _gs() -> "AsyncFileSystem":
    import logging

    from gcsfs import GCSFileSystem

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints tracebacks of attempts that are repeated
    return GCSFileSystem(skip_instance_cache=True, use_listings_cache=False)


def _https(headers: dict[str, str] | None = None) -> "AsyncFileSystem":
    import aiohttp
    from fsspec.implementations.http import HTTPFileSystem

    # trust_env: proxies of the environment, and passwords in ~/.netrc
    client = {"trust_env": True, "timeout": aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60)}
    # ranges are of the file's own bytes, not of compressed ones
    headers = {"Accept-Encoding": "identity", **(headers or {})}
    return HTTPFileSystem(skip_instance_cache=True, use_listings_cache=False, client_kwargs=client, headers=headers)


def _hub() -> "AsyncFileSystem":
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.utils import build_hf_headers

    if is_offline_mode():
        raise VideoAlignError("HF_HUB_OFFLINE is set, so no set is read from hf://; unset it, or name a local copy")
    return _https(build_hf_headers())


_WEB = "give name and password in ~/.netrc, or a token in the address (it is not shown)"
SCHEMES = {
    "s3": Scheme("s3fs", "videoalign[s3]", _s3, "give credentials in the AWS way (AWS_ACCESS_KEY_ID and "
                 "AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or a role) and look whether they may read the bucket; a public "
                 "bucket is read without any by FSSPEC_S3_ANON=true", writes=True, lists=True),
    "gs": Scheme("gcsfs", "videoalign[gs]", _gs, "give credentials in Google's way (`gcloud auth application-default "
                 "login`, or GOOGLE_APPLICATION_CREDENTIALS) and look whether they may read the bucket; a public "
                 "bucket is read without any by FSSPEC_GS_TOKEN=anon", writes=True, lists=True),
    "https": Scheme("aiohttp", "aiohttp", _https, _WEB),
    "http": Scheme("aiohttp", "aiohttp", _https, _WEB),
    "hf": Scheme("aiohttp", "aiohttp", _hub, "log in with `hf auth login` (or set HF_TOKEN), and accept the data set's "
                 "terms on its page"),
}  # fmt: skip
"""Schemes by name. Local folders have none."""


def is_address(path: str | Path) -> bool:
    """Whether a path leads to a store; ``file://`` is a local folder."""
    found = _ADDRESS.fullmatch(str(path))
    return bool(found) and found["scheme"].lower() != "file"


def scheme_of(address: str) -> str:
    """Name of an address's scheme.

    Raises:
        VideoAlignError: If there is no such scheme, or its package is not installed.
    """
    name = _ADDRESS.fullmatch(address)["scheme"].lower()
    if name not in SCHEMES:
        known = ", ".join(f"{one}://" for one in SCHEMES)
        raise VideoAlignError(
            f"{shown(address)}: sets are read from local folders and from {known}, not from {name}://"
        )
    scheme = SCHEMES[name]
    if importlib.util.find_spec(scheme.package) is None:
        raise VideoAlignError(
            f"{shown(address)} needs the package {scheme.package}, which is not installed: pip install "
            f"'{scheme.install}'"
        )
    return name


def url_of(address: str, file: str) -> str:
    """Address of a file of a set, as fsspec takes it.

    Args:
        address: Address of the set. A query of ``https://`` (a token) belongs to each of its files.
        file: Name of the file.
    """
    found = _ADDRESS.fullmatch(address)
    scheme, rest = found["scheme"].lower(), found["rest"]
    if scheme == "hf":
        return _hub_url(address, rest, file)
    if scheme in ("http", "https"):
        parts = urlsplit(f"{scheme}://{rest}")
        return parts._replace(path=f"{parts.path.rstrip('/')}/{quote(file)}").geturl()
    return f"{scheme}://{rest.rstrip('/')}/{file}"


def _hub_url(address: str, rest: str, file: str) -> str:
    from huggingface_hub import hf_hub_url

    found = _HUB.fullmatch(rest)
    if not found:
        raise VideoAlignError(
            f"{redacted(address)} is no address on the hub; it is hf://datasets/OWNER/NAME/FOLDER, with @REVISION "
            "behind the name if it is not main"
        )
    path = "/".join(part for part in ((found["path"] or "").strip("/"), file) if part)
    kind = found["kind"].rstrip("s/") or None
    return hf_hub_url(found["repo"], path, repo_type=kind, revision=found["revision"])


def shown(path: str | Path) -> str:
    """A path or address as it is shown: without credentials, and without a slash at its end."""
    text = redacted(str(path)).removesuffix("?***")
    return text.rstrip("/") or text


def short_name(path: str | Path) -> str:
    """The last part of a path or address, by which results of several sets are told apart."""
    return shown(path).rpartition("/")[2] if is_address(path) else Path(path).resolve().name


MOST_SETS = 10_000
"""Largest number of sets that one path names."""


def expanded(path: str | Path) -> list[str | Path]:
    """The sets that a path with braces names, such as ``s3://bucket/set-{0..3}`` or ``/data/{cats,dogs}``.

    Args:
        path: Path or address; a Path names one set.

    Returns:
        One path for each set, in order.
    """
    text = str(path)
    if isinstance(path, Path) or "{" not in text or (not is_address(text) and Path(text).exists()):
        found = [text]
    else:
        from braceexpand import UnbalancedBracesError, braceexpand

        try:  # braceexpand makes all numbers of a range before it gives the first one
            ranges = ((int(first), int(last), int(step or 0) or 1) for first, last, step in _RANGE.findall(text))
            many = any(abs(last - first) // step >= MOST_SETS for first, last, step in ranges)
            found = [] if many else list(itertools.islice(braceexpand(text), MOST_SETS + 1))
        except UnbalancedBracesError:
            raise VideoAlignError(f"{redacted(text)}: a brace is not closed") from None
        if many or len(found) > MOST_SETS:
            raise VideoAlignError(f"{redacted(text)}: the braces name more than {MOST_SETS} sets")
    return [one if is_address(one) else _folder(one) for one in found]


def _folder(path: str) -> Path:
    """A local folder that may be written as an address: ``file:///my%20set``, as browsers and file managers copy it."""
    plain = _FILE.sub("", path)
    return Path(plain if plain == path or Path(plain).exists() else unquote(plain))
