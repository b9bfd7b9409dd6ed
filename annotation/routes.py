"""What the annotation server answers at each of its addresses."""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.responses import HTMLResponse, Response
from fastapi.templating import Jinja2Templates
from pydantic import BaseModel, ConfigDict, Field

from ..datamodules.contents import Content
from ..models.dimensions import DIMENSIONS
from .guideline import Part
from .overview import overview
from .people import Annotator
from .store import Store
from .video_ranges import ranged

HERE = Path(__file__).parent
PAGES = Jinja2Templates(directory=HERE / "templates")
WORDS = {"VQ": "Visual quality", "MQ": "Motion quality", "TA": "Text alignment", "Overall": "Overall"}
"""What the pages call each column."""


@dataclass(frozen=True)
class Site:
    """What all addresses share.

    Attributes:
        store: The round's file of votes.
        contents: The round's videos, by key.
        admin: Secret of the overview's link.
        guideline: The guideline for annotators.
    """

    store: Store
    contents: Mapping[str, Content]
    admin: str
    guideline: Sequence[Part]


async def _site(request: Request) -> Site:
    return request.app.state.site


TheSite = Annotated[Site, Depends(_site)]


def _person(token: str, site: TheSite) -> Annotator:
    """The person to whom the link of a request belongs."""
    if (annotator := site.store.who(token)) is None:
        raise HTTPException(404, "this link is not known, or was revoked")
    return annotator


Person = Annotated[Annotator, Depends(_person)]


class VoteIn(BaseModel):
    """A vote as the page sends it: choices as the screen shows them, whose left video is A."""

    model_config = ConfigDict(extra="forbid")  # what nobody asked for may hold what is no JSON, such as NaN
    ticket: str = Field(max_length=64)
    choices: dict[str, str] = Field(default_factory=dict, max_length=8)
    scores: dict[str, dict[str, int]] = Field(default_factory=dict, max_length=2)
    flags: list[str] = Field(default_factory=list, max_length=2)


rating_router = APIRouter(prefix="/a/{token}", redirect_slashes=False)
"""The page of one person, and what it asks for."""


@rating_router.get("/", response_class=HTMLResponse)
@rating_router.get("", response_class=HTMLResponse)
def page(request: Request, site: TheSite, annotator: Person) -> Response:
    """The page on which a person rates pairs."""
    protocol = site.store.protocol
    shown = {
        "annotator": annotator,
        "settings": json.dumps({"words": WORDS}),
        "columns": [(column, WORDS[column]) for column in protocol.columns],
        "dimensions": [(dimension, WORDS[dimension]) for dimension in DIMENSIONS],
        "scores": protocol.scores,
        "guideline": site.guideline,
    }
    return PAGES.TemplateResponse(request, "rate.html", shown)


@rating_router.get("/task")
def task(site: TheSite, annotator: Person) -> Any:
    """The pair on the person's screen, or the next one."""
    found = site.store.task(annotator)
    progress = site.store.progress(annotator)
    if found is None:
        return {"task": None, "progress": progress}
    rates = (site.contents[key].record.get("fps") or 24 for key in (found.left, found.right))
    fps = max(rates)  # steps of the faster one skip no frame of either
    shown = {"ticket": found.ticket, "prompt": found.prompt, "kind": found.kind, "fps": fps}
    return {"task": shown, "progress": progress}


@rating_router.get("/video/{ticket}/{side}")
def video(request: Request, ticket: str, side: str, site: TheSite, annotator: Person) -> Response:
    """One of the two videos on the person's screen."""
    found = site.store.shown(annotator)
    if found is None or found.ticket != ticket or side not in ("left", "right"):
        raise HTTPException(404, "there is no such video on your screen")
    key = found.left if side == "left" else found.right
    return ranged(site.contents[key], request.headers.get("range"))


@rating_router.post("/vote")
def vote(sent: VoteIn, site: TheSite, annotator: Person) -> Any:
    """Store a vote."""
    reference = site.store.vote(annotator, sent.ticket, sent.choices, sent.scores, sent.flags)
    return {"stored": True, "reference": reference}


@rating_router.post("/undo")
def undo(site: TheSite, annotator: Person) -> Any:
    """Take back the person's last vote."""
    return {"undone": site.store.undo(annotator)}


overview_router = APIRouter(prefix="/overview/{secret}", redirect_slashes=False)
"""The page for whoever runs the round."""


@overview_router.get("/", response_class=HTMLResponse)
@overview_router.get("", response_class=HTMLResponse)
def over(request: Request, secret: str, site: TheSite) -> Response:
    """Progress, agreement, people and disputed pairs."""
    if not secrets.compare_digest(secret.encode(), site.admin.encode()):
        raise HTTPException(404, "this link is not known")
    shown = {"found": overview(site.store.round()), "words": WORDS}
    return PAGES.TemplateResponse(request, "overview.html", shown)
