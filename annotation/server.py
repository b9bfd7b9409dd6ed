"""The annotation server: a small web application for one round.

Every person has a secret link; nothing else opens anything. A link shows the pair on the person's screen, plays its two
videos, and takes a vote that bears the pair's ticket. Sources, keys and file names never reach the browser.

:mod:`.routes` answers requests, after :mod:`.request_guard` has let them in.
"""

import sys
from collections.abc import Collection, Sequence

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.middleware.base import BaseHTTPMiddleware

from ..datamodules.shards import ShardSet
from .guideline import GUIDELINE, Part
from .request_guard import Guard, told
from .routes import HERE, Site, overview_router, rating_router
from .shown import shown_by
from .store import Store
from .vote_file import StorageError
from .voting import FastVote, RefusedVote


def make_app(
    store: Store,
    videos: ShardSet,
    admin: str,
    guideline: Sequence[Part] = GUIDELINE,
    hosts: Collection[str] | None = None,
    refuse_fast: bool = False,
) -> FastAPI:
    """The web application of a round.

    Args:
        store: The round's file of votes.
        videos: The round's *videos* set.
        admin: Secret of the overview's link.
        guideline: The guideline for annotators.
        hosts: Names under which the server may be addressed; None leaves that to whoever runs the application.
        refuse_fast: Whether votes before one full play of all videos are refused.

    Raises:
        VideoAlignError: The videos are not those of the round.
    """
    shown = shown_by(store, videos)
    # a redirection to or from a slash would be built of the Host header
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.site = Site(store, shown, admin, guideline, refuse_fast)
    app.mount("/static", StaticFiles(directory=HERE / "static"))
    app.include_router(rating_router)
    app.include_router(overview_router)
    app.add_middleware(BaseHTTPMiddleware, dispatch=Guard(hosts))
    app.add_exception_handler(RefusedVote, _refused_vote)
    app.add_exception_handler(FastVote, _fast_vote)
    app.add_exception_handler(RequestValidationError, _no_vote)
    app.add_exception_handler(StorageError, _nothing_stored)
    app.add_exception_handler(HTTPException, _refused_page)
    return app


async def _refused_vote(request: Request, error: RefusedVote) -> Response:
    return told(str(error), 409)


async def _fast_vote(request: Request, error: FastVote) -> Response:
    """Answer so that the page keeps what was chosen: the same vote is good a little later."""
    return told(str(error), 425)


async def _no_vote(request: Request, error: RequestValidationError) -> Response:
    """Say what is wrong, but do not send back what was sent: it need not be a text, nor JSON."""
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"][1:]))[:80] or "body"
    return told(f"this is no vote: {place}: {first['msg']}", 422)


async def _nothing_stored(request: Request, error: StorageError) -> Response:
    """Say why the file cannot be used; where the file is, only who runs the server may know."""
    print(error, file=sys.stderr)
    return told(f"nothing was stored: {error.reason}", 503)


async def _refused_page(request: Request, error: HTTPException) -> Response:
    """Answer in plain text where somebody opened a link, and in JSON where the page asked."""
    if "text/html" in request.headers.get("accept", ""):
        return PlainTextResponse(f"{error.detail}\n", error.status_code)
    return told(str(error.detail), error.status_code)
