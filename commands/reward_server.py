"""A web application that rates samples: `videoalign serve-reward`."""

import asyncio
import contextlib
import hmac
import json
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from torch import Tensor

from .. import VideoAlignError
from ..models.reward_messages import CHECK, INFO, MEDIA, SCORE, Samples, parsed
from ..models.scoring import ScoresVideos
from .reward_queue import RewardQueue

JSON = "application/json"
"""Content type of prompts and answers."""
LOOK = 1.0
"""Seconds between two looks whether a client still waits."""
SENT_WITHIN = 120.0
"""Seconds within which a request's body must have come."""
LARGEST_CHECK = 1 << 26
"""Largest number of bytes of a list of prompts."""


@dataclass
class Desk:
    """What the requests of a server share.

    Attributes:
        reward: The reward.
        queue: Where samples wait for it.
        fps: Frame rate at which it reads videos; None where it reads none, or has no rate of its own.
        token: Secret that clients must send; empty where there is none.
        waiting: Largest number of requests that wait or are rated at a time.
        largest: Largest number of bytes of a request.
        present: Number of requests that wait or are rated.
        answers: Number of answers of :data:`SCORE` by status.
    """

    reward: ScoresVideos
    queue: RewardQueue
    fps: float | None
    token: str
    waiting: int
    largest: int
    present: int = 0
    answers: Counter[int] = field(default_factory=Counter)


def reward_app(
    reward: ScoresVideos,
    batch_size: int = 8,
    waiting: int = 64,
    largest: int = 1 << 30,
    fps: float | None = None,
    token: str = "",
) -> FastAPI:
    """The web application of a reward server.

    Args:
        reward: The reward that it serves, loaded.
        batch_size: Largest number of samples of several requests that are rated at once, at least 1.
        waiting: Largest number of requests that wait or are rated at a time; further ones are answered with 503.
        largest: Largest number of bytes of a request.
        fps: Frame rate at which the reward reads videos, to tell clients; None where it has none.
        token: Secret that clients must send as ``Authorization: Bearer``; empty for none.
    """
    # a redirection to or from a slash would be built of the Host header
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.desk = Desk(reward, RewardQueue(reward, batch_size), fps, token, waiting, largest)
    known = [Depends(_known)]
    app.get("/health")(_health)
    app.get(INFO, dependencies=known)(_info)
    app.get("/metrics", dependencies=known)(_metrics)
    app.post(CHECK, dependencies=known)(_check)
    app.post(SCORE, dependencies=known)(_score)
    app.add_exception_handler(HTTPException, _refused)
    return app


async def _desk(request: Request) -> Desk:
    return request.app.state.desk


AtDesk = Annotated[Desk, Depends(_desk)]


async def _known(request: Request, desk: AtDesk) -> None:
    """Refuse clients without the token."""
    sent = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
    if desk.token and not hmac.compare_digest(sent, desk.token.encode()):
        raise HTTPException(401, "this server wants its token, as Authorization: Bearer TOKEN")


async def _refused(request: Request, error: HTTPException) -> Response:
    return _told(str(error.detail), error.status_code, error.headers)


def _told(text: str, status: int, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": text.encode(errors="replace").decode()}, status, dict(headers or {}))


# --- pages ------------------------------------------------------------------------------------------------------------


async def _health() -> dict[str, str]:
    return {"status": "ok"}


async def _info(desk: AtDesk) -> dict[str, Any]:
    reward = desk.reward
    return {"name": reward.name, "needs": reward.needs, "fps": desk.fps, "largest": desk.largest}


async def _metrics(desk: AtDesk) -> Response:
    """Numbers in the text format of Prometheus."""
    counts = desk.queue.counts
    lines = [
        "# HELP videoalign_requests_total Requests to rate samples, by the status of the answer.",
        "# TYPE videoalign_requests_total counter",
        *(f'videoalign_requests_total{{status="{status}"}} {n}' for status, n in sorted(desk.answers.items())),
        "# HELP videoalign_requests_waiting Requests that wait or are rated now.",
        "# TYPE videoalign_requests_waiting gauge",
        f"videoalign_requests_waiting {desk.present}",
    ]
    for name, text in (
        ("samples", "Samples that were rated."),
        ("batches", "Batches in which they were rated."),
        ("failures", "Requests that the reward could not rate."),
        ("seconds", "Seconds that rating took."),
    ):
        full = f"videoalign_{name}_total"
        lines += [f"# HELP {full} {text}", f"# TYPE {full} counter", f"{full} {counts[name]:g}"]
    return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")


async def _check(request: Request, desk: AtDesk) -> Response:
    """Whether the reward rates these prompts."""
    body = await _body(request, JSON, LARGEST_CHECK)
    try:
        prompts = parsed(body).get("prompts")
        if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
            raise VideoAlignError("prompts must be a list of texts")
        await asyncio.to_thread(desk.queue.check, prompts)
    except VideoAlignError as error:
        return _told(str(error), 422)
    return JSONResponse({"prompts": len(prompts)})


async def _score(request: Request, desk: AtDesk) -> Response:
    """Rewards of samples."""
    if desk.present >= desk.waiting:
        await _drained(request)  # a client that is still sending would not see the answer
        answer = _told(f"{desk.waiting} requests wait already; ask again a little later", 503, {"Retry-After": "1"})
    else:
        desk.present += 1
        try:
            answer = await _rated(request, desk)
        except HTTPException as error:
            answer = await _refused(request, error)
        finally:
            desk.present -= 1
    desk.answers[answer.status_code] += 1
    return answer


async def _rated(request: Request, desk: Desk) -> Response:
    body = await _body(request, MEDIA, desk.largest)
    try:
        samples = await asyncio.to_thread(Samples.load, body)
        if samples.kind != desk.reward.needs:
            raise VideoAlignError(f"{desk.reward.name} reads {desk.reward.needs}, not {samples.kind}")
    except VideoAlignError as error:
        return _told(str(error), 400)
    del body
    rewards = desk.queue.put(samples)
    try:
        found = await _waited(request, rewards)
    except VideoAlignError as error:  # its cause says whether the samples were refused, or the reward failed
        return _told(str(error), 422 if isinstance(error.__cause__, VideoAlignError) else 500)
    except HTTPException:
        raise
    except Exception as error:
        return _told(f"{desk.reward.name} failed: {type(error).__name__}: {str(error)[:300]}", 500)
    finally:
        rewards.cancel()  # nobody waits any more; if it is rated already, nothing happens
    return Response(json.dumps({"rewards": {name: v.tolist() for name, v in found.items()}}), 200, media_type=JSON)


async def _waited(request: Request, rewards: "Future[dict[str, Tensor]]") -> dict[str, Tensor]:
    """Rewards, unless the client leaves before they are there."""
    coming = asyncio.wrap_future(rewards)
    while not (await asyncio.wait({coming}, timeout=LOOK))[0]:
        if await request.is_disconnected():
            raise HTTPException(499, "the client has left")
    return coming.result()


# --- bodies -----------------------------------------------------------------------------------------------------------


async def _body(request: Request, kind: str, most: int) -> bytes:
    """The body of a request, which must state its kind and length."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != kind:
        await _drained(request)
        raise HTTPException(415, f"the body must be {kind}")
    length = request.headers.get("content-length", "")
    if not length.isdigit():
        raise HTTPException(411, "the request must state the length of its body (Content-Length)")
    if int(length) > most:
        await _drained(request)
        raise HTTPException(413, f"the body has {length} bytes, more than {most}")
    try:
        async with asyncio.timeout(SENT_WITHIN):
            return await request.body()
    except TimeoutError:
        raise HTTPException(408, f"the body did not come within {SENT_WITHIN:g} s") from None
    except ClientDisconnect:
        raise HTTPException(499, "the client has left") from None


async def _drained(request: Request) -> None:
    """Read a body and forget it, so that a client which is still sending gets to read the answer."""
    with contextlib.suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(SENT_WITHIN):
            async for _ in request.stream():
                pass
