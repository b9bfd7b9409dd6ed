"""The annotation page: a small web server for one round.

Every person has a secret link; nothing else opens anything. A link shows the pair on the person's screen and plays its two videos, and
takes a vote that bears the pair's ticket. Sources, keys and file names never reach the browser. Only names of the host that the server
was told are served, so that no other site can make a browser read it under a name of its own (DNS rebinding).
"""

import json
import re
import secrets
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from fastapi.templating import Jinja2Templates
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException as AnyHTTPException

from ..datamodules.shards import Content, ShardSet, sha256
from ..models.dimensions import DIMENSIONS
from .guideline import GUIDELINE, Part
from .overview import overview
from .store import Annotator, RefusedVote, StorageError, Store, VideoAlignError

HERE = Path(__file__).parent
CHUNK = 1 << 18
"""Bytes of a video that are read at once."""
LARGEST = 1 << 14
"""Bytes of a post."""
WORDS = {"VQ": "Visual quality", "MQ": "Motion quality", "TA": "Text alignment", "Overall": "Overall"}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; form-action 'self'; base-uri 'none'",
    "Referrer-Policy": "no-referrer",  # the link is the secret
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class VoteIn(BaseModel):
    """What the page sends: choices as the screen shows it, its left video being A."""

    model_config = ConfigDict(extra="forbid")  # what nobody asked for may hold what is no JSON, such as NaN
    ticket: str = Field(max_length=64)
    choices: dict[str, str] = Field(default_factory=dict, max_length=8)
    scores: dict[str, dict[str, int]] = Field(default_factory=dict, max_length=2)
    flags: list[str] = Field(default_factory=list, max_length=2)


def make_app(
    store: Store,
    videos: ShardSet,
    admin: str,
    guideline: Sequence[Part] = GUIDELINE,
    hosts: Collection[str] | None = None,
) -> FastAPI:
    """The server.

    Args:
        store: The round's file.
        videos: The round's *videos* set.
        admin: Secret of the overview's link.
        guideline: What annotators are told.
        hosts: Names under which the server may be addressed; None leaves that to who runs the application.

    Raises:
        VideoAlignError: where the videos are not those of the round.
    """
    if store.fact("data") != sha256(videos.path / "index.json"):
        raise VideoAlignError(f"--videos {videos.path} is not the set that {store.path} was begun with")
    contents = {content.key: content for content in videos.contents()}
    protocol = store.protocol
    # a redirection to or from a slash would be built of the Host header
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.mount("/static", StaticFiles(directory=HERE / "static"))
    pages = Jinja2Templates(directory=HERE / "templates")

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable) -> Response:
        """Posts come from our own pages alone; answers say so to browsers."""
        if hosts is not None and (named := host_of(request.headers.getlist("host"))) not in hosts:
            return _told(f"this server is not called {named[:80]!r}; who runs it allows names with --allow-host", 400)
        if request.method not in ("GET", "HEAD"):
            if not _own(request):
                return _told("this came from another site", 403)
            size = request.headers.get("content-length", "")
            if not re.fullmatch("[0-9]{1,9}", size) or int(size) > LARGEST:
                return _told(f"a vote is at most {LARGEST} bytes long, and says how long it is", 413)
        response = await call_next(request)
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    @app.exception_handler(RefusedVote)
    async def refused(request: Request, error: RefusedVote) -> Response:
        return _told(str(error), 409)

    @app.exception_handler(RequestValidationError)
    async def no_vote(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]  # what was sent is not sent back: it need not be a text, nor JSON
        return _told(f"this is no vote: {'.'.join(map(str, first['loc'][1:]))[:80] or 'body'}: {first['msg']}", 422)

    @app.exception_handler(StorageError)
    async def broken(request: Request, error: StorageError) -> Response:
        print(error, file=sys.stderr)  # where the file is concerns nobody else
        return _told(f"nothing was stored: {error.reason}", 503)

    @app.exception_handler(AnyHTTPException)
    async def refused_page(request: Request, error: AnyHTTPException) -> Response:
        if "text/html" in request.headers.get("accept", ""):  # somebody opened a link
            return PlainTextResponse(f"{error.detail}\n", error.status_code)
        return _told(str(error.detail), error.status_code)

    def known(token: str) -> Annotator:
        if (annotator := store.who(token)) is None:
            raise HTTPException(404, "this link is not known, or was revoked")
        return annotator

    Known = Annotated[Annotator, Depends(known)]

    @app.get("/a/{token}/", response_class=HTMLResponse)
    @app.get("/a/{token}", response_class=HTMLResponse)
    def page(request: Request, token: str, annotator: Known) -> Response:
        settings = {"words": WORDS}
        return pages.TemplateResponse(
            request,
            "rate.html",
            {
                "annotator": annotator,
                "settings": json.dumps(settings),
                "columns": [(c, WORDS[c]) for c in protocol.columns],
                "dimensions": [(d, WORDS[d]) for d in DIMENSIONS],
                "scores": protocol.scores,
                "guideline": guideline,
            },
        )

    @app.get("/a/{token}/task")
    def task(annotator: Known) -> Any:
        found = store.task(annotator)
        progress = store.progress(annotator)
        if found is None:
            return {"task": None, "progress": progress}
        fps = max(
            contents[key].record.get("fps") or 24 for key in (found.left, found.right)
        )  # no frame of either is skipped
        return {
            "task": {"ticket": found.ticket, "prompt": found.prompt, "kind": found.kind, "fps": fps},
            "progress": progress,
        }

    @app.get("/a/{token}/video/{ticket}/{side}")
    def video(request: Request, ticket: str, side: str, annotator: Known) -> Response:
        found = store.shown(annotator)
        if found is None or found.ticket != ticket or side not in ("left", "right"):
            raise HTTPException(404, "there is no such video on your screen")
        return _ranged(contents[found.left if side == "left" else found.right], request.headers.get("range"))

    @app.post("/a/{token}/vote")
    def vote(annotator: Known, sent: VoteIn) -> Any:
        reference = store.vote(annotator, sent.ticket, sent.choices, sent.scores, sent.flags)
        return {"stored": True, "reference": reference}

    @app.post("/a/{token}/undo")
    def undo(annotator: Known) -> Any:
        return {"undone": store.undo(annotator)}

    @app.get("/overview/{secret}/", response_class=HTMLResponse)
    @app.get("/overview/{secret}", response_class=HTMLResponse)
    def over(request: Request, secret: str) -> Response:
        if not secrets.compare_digest(secret.encode(), admin.encode()):
            raise HTTPException(404, "this link is not known")
        return pages.TemplateResponse(request, "overview.html", {"found": overview(store.round()), "words": WORDS})

    return app


def _told(text: str, status: int) -> JSONResponse:
    """A sentence for the page; what cannot be written as a text, such as half of a surrogate pair, becomes a question mark."""
    return JSONResponse({"error": text.encode(errors="replace").decode()}, status)


def host_of(headers: Sequence[str]) -> str:
    """The name in a request's Host header, without port, in small letters; empty where there is not exactly one."""
    match = (
        re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:/@\s]+?)\.?(?::[0-9]{0,5})?", headers[0].strip())
        if len(headers) == 1
        else None
    )
    return match[1].lower() if match else ""


def _own(request: Request) -> bool:
    """Whether a post comes from a page of this server, as far as browsers tell; others must at least send JSON, which no foreign
    form can without being asked first."""
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    if site is None and origin:  # an old browser; behind a proxy that names another host it cannot tell
        site = "same-origin" if urlsplit(origin).netloc == request.headers.get("host") else "cross-site"
    if site not in (None, "same-origin"):
        return False
    return request.headers.get("content-type", "").split(";")[0] == "application/json"


def _ranged(content: Content, wanted: str | None) -> Response:
    """A video, or the part of it that a browser asks for (RFC 9110, section 14)."""
    start, size = content.spans["mp4"].start, content.spans["mp4"].size
    headers = {"Accept-Ranges": "bytes", "Cache-Control": "private, max-age=3600"}  # its address holds the ticket
    first, last, status = 0, size - 1, 200
    match = re.fullmatch(r"bytes=(\d{0,15})-(\d{0,15})", (wanted or "").strip())
    begin, end = ((int(number) if number else None) for number in match.groups()) if match else (None, None)
    if (begin, end) != (None, None) and (begin is None or end is None or begin <= end):  # what is no range is ignored
        first, last = (max(size - end, 0), last) if begin is None else (begin, min(last if end is None else end, last))
        if first > last:
            return Response(status_code=416, headers={"Content-Range": f"bytes */{size}"})
        headers["Content-Range"], status = f"bytes {first}-{last}/{size}", 206

    def body() -> Iterator[bytes]:
        with open(content.path, "rb") as file:
            file.seek(start + first)
            left = last - first + 1
            while left > 0 and (part := file.read(min(CHUNK, left))):
                left -= len(part)
                yield part

    headers["Content-Length"] = str(last - first + 1)
    return StreamingResponse(body(), status, headers, "video/mp4")
