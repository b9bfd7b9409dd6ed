"""Which requests the annotation server lets in, and the headers of its answers.

Requests must name a host that the server was told, so that no other site can make a browser read it under a name of its
own (DNS rebinding). Posts must be small, and come from a page of this server.
"""

import re
from collections.abc import Awaitable, Callable, Collection, Sequence
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

LARGEST = 1 << 14
"""Largest number of bytes of a post."""
SECURITY_POLICY = (
    "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; form-action 'self'; base-uri 'none'"
)
HEADERS = {
    "Content-Security-Policy": SECURITY_POLICY,
    "Referrer-Policy": "no-referrer",  # the link is the secret
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
"""Headers of all answers that do not set them otherwise."""


class Guard:
    """Middleware that refuses requests from other sites.

    Args:
        hosts: Names under which the server may be addressed; None allows all.
    """

    def __init__(self, hosts: Collection[str] | None) -> None:
        self.hosts = hosts

    async def __call__(self, request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        """Answer a request that is refused; let all others be answered."""
        named = host_of(request.headers.getlist("host"))
        if self.hosts is not None and named not in self.hosts:
            return told(f"this server is not called {named[:80]!r}; who runs it allows names with --allow-host", 400)
        if request.method not in ("GET", "HEAD"):
            if not _is_own(request):
                return told("this came from another site", 403)
            size = request.headers.get("content-length", "")
            if not re.fullmatch("[0-9]{1,9}", size) or int(size) > LARGEST:
                return told(f"a vote is at most {LARGEST} bytes long, and says how long it is", 413)
        response = await call_next(request)
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response


def host_of(headers: Sequence[str]) -> str:
    """The name of the host that a request addresses, in small letters.

    Args:
        headers: All Host headers of the request.

    Returns:
        The name without port; empty where there is not exactly one header, or it holds no name.
    """
    if len(headers) != 1:
        return ""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:/@\s]+?)\.?(?::[0-9]{0,5})?", headers[0].strip())
    return match[1].lower() if match else ""


def told(text: str, status: int) -> JSONResponse:
    """A sentence for the page; what UTF-8 cannot hold, such as half of a surrogate pair, becomes a question mark."""
    return JSONResponse({"error": text.encode(errors="replace").decode()}, status)


def _is_own(request: Request) -> bool:
    """Whether a post comes from a page of this server, as far as the browser tells.

    Browsers that do not tell must at least send JSON, which no form of another site can without being asked first.
    """
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    if site is None and origin:  # an old browser; behind a proxy that names another host it cannot tell
        site = "same-origin" if urlsplit(origin).netloc == request.headers.get("host") else "cross-site"
    if site not in (None, "same-origin"):
        return False
    return request.headers.get("content-type", "").split(";")[0] == "application/json"
