"""What the annotation server answers at each of its addresses."""

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.responses import FileResponse, HTMLResponse, Response
from fastapi.templating import Jinja2Templates
from pydantic import BaseModel, ConfigDict, Field

from ..models.dimensions import DIMENSIONS
from .answers import LETTERS
from .guideline import Part
from .overview import dispute, overview
from .people import Annotator
from .prompt_images import MEDIA
from .shown import Shown
from .store import Store
from .video_ranges import length_of, ranged
from .voting import Viewing

HERE = Path(__file__).parent
PAGES = Jinja2Templates(directory=HERE / "templates")
WORDS = {"VQ": "Visual quality", "MQ": "Motion quality", "TA": "Text alignment", "Overall": "Overall"}
"""What the pages call each column."""
PLACES = ("left", "right", "third", "fourth", "fifth", "sixth")
"""Names of the videos on a screen in their addresses."""
CHOICES = {
    "pairs": (("A", "A is better"), ("same", "the same"), ("B", "B is better")),
    "single": tuple((str(score), str(score)) for score in range(1, 6)),
    "ranking": (),
}
"""The buttons of a column by kind of round, and what is written on them."""


@dataclass(frozen=True)
class Site:
    """What all addresses share.

    Attributes:
        store: The round's file of votes.
        shown: The round's videos as people see them, and their images.
        admin: Secret of the overview's link.
        guideline: The guideline for annotators.
        refuses_fast: Whether votes before one full play are refused.
        lengths: Length in seconds of each video that was on a screen, by key.
    """

    store: Store
    shown: Shown
    admin: str
    guideline: Sequence[Part]
    refuses_fast: bool = False
    lengths: dict[str, float] = field(default_factory=dict)

    def viewing(self, keys: Sequence[str], played: Sequence[float]) -> Viewing:
        """How much of the videos on a screen was played, beside their lengths.

        Args:
            keys: Keys of the videos, from left to right.
            played: Seconds of each that were played, as the page says.
        """
        for key in keys:
            if key not in self.lengths:
                self.lengths[key] = length_of(self.shown.contents[key])
        return Viewing(played, [self.lengths[key] for key in keys], self.refuses_fast)


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
    """A vote as the page sends it: choices as the screen shows them, whose left video is A.

    ``watched`` are the seconds of each video that were played, from left to right.
    """

    model_config = ConfigDict(extra="forbid")  # what nobody asked for may hold what is no JSON, such as NaN
    ticket: str = Field(max_length=64)
    choices: dict[str, str] = Field(default_factory=dict, max_length=8)
    scores: dict[str, dict[str, int]] = Field(default_factory=dict, max_length=2)
    flags: list[str] = Field(default_factory=list, max_length=2)
    watched: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(default_factory=list, max_length=6)


rating_router = APIRouter(prefix="/a/{token}", redirect_slashes=False)
"""The page of one person, and what it asks for."""


@rating_router.get("/", response_class=HTMLResponse)
@rating_router.get("", response_class=HTMLResponse)
def page(request: Request, site: TheSite, annotator: Person) -> Response:
    """The page on which a person rates pairs."""
    protocol = site.store.protocol
    shown = {
        "annotator": annotator,
        "settings": json.dumps({"words": WORDS, "kind": protocol.kind}),
        "kind": protocol.kind,
        "places": [*zip(PLACES, LETTERS)][: protocol.most],
        "choices": CHOICES[protocol.kind],
        "protocol": protocol,
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
    rates = (site.shown.contents[key].record.get("fps") or 24 for key in found.keys)
    shown = {
        "ticket": found.ticket,
        "prompt": found.prompt,
        "kind": found.kind,
        "fps": max(rates),  # steps of the fastest one skip no frame of any
        "videos": len(found.keys),
        "image": found.left in site.shown.images,
    }
    return {"task": shown, "progress": progress}


@rating_router.get("/video/{ticket}/{side}")
def video(request: Request, ticket: str, side: str, site: TheSite, annotator: Person) -> Response:
    """One of the videos on the person's screen."""
    found = site.store.shown(annotator)
    keys = dict(zip(PLACES, found.keys)) if found else {}
    if found is None or found.ticket != ticket or side not in keys:
        raise HTTPException(404, "there is no such video on your screen")
    return ranged(site.shown.contents[keys[side]], request.headers.get("range"))


@rating_router.get("/image/{ticket}")
def image(ticket: str, site: TheSite, annotator: Person) -> Response:
    """The image that the videos on the person's screen were made of."""
    found = site.store.shown(annotator)
    if found is None or found.ticket != ticket or found.left not in site.shown.images:
        raise HTTPException(404, "there is no such image on your screen")
    return _image(site, found.left)


def _image(site: Site, key: str) -> Response:
    path = site.shown.images[key]
    return FileResponse(path, media_type=MEDIA[path.suffix.lstrip(".")])


@rating_router.post("/vote")
def vote(sent: VoteIn, site: TheSite, annotator: Person) -> Any:
    """Store a vote."""
    found = site.store.shown(annotator)
    viewing = site.viewing(found.keys, sent.watched) if found and found.ticket == sent.ticket else None
    reference = site.store.vote(annotator, sent.ticket, sent.choices, sent.scores, sent.flags, viewing)
    return {"stored": True, "reference": reference}


@rating_router.post("/undo")
def undo(site: TheSite, annotator: Person) -> Any:
    """Take back the person's last vote."""
    return {"undone": site.store.undo(annotator)}


def _organizer(secret: str, site: TheSite) -> None:
    """Refuse who does not have the overview's link."""
    if not secrets.compare_digest(secret.encode(), site.admin.encode()):
        raise HTTPException(404, "this link is not known")


overview_router = APIRouter(prefix="/overview/{secret}", redirect_slashes=False, dependencies=[Depends(_organizer)])
"""The pages for whoever runs the round."""


@overview_router.get("/", response_class=HTMLResponse)
@overview_router.get("", response_class=HTMLResponse)
def over(request: Request, secret: str, site: TheSite) -> Response:
    """Progress, agreement, people and disputed pairs."""
    shown = {"found": overview(site.store.round()), "words": WORDS, "here": f"/overview/{secret}"}
    return PAGES.TemplateResponse(request, "overview.html", shown)


@overview_router.get("/pair/{number}", response_class=HTMLResponse)
def disputed(request: Request, secret: str, number: int, site: TheSite) -> Response:
    """One pair (or video, or ranking) with all of its votes."""
    if (found := dispute(site.store.round(), number)) is None:
        raise HTTPException(404, "there is no such pair in this round")
    image = found["videos"][0]["key"] if found["videos"][0]["key"] in site.shown.images else None
    shown = {"found": found, "words": WORDS, "here": f"/overview/{secret}", "image": image}
    return PAGES.TemplateResponse(request, "dispute.html", shown)


@overview_router.get("/video/{key}")
def video_of(request: Request, key: str, site: TheSite) -> Response:
    """A video of the round, as people see it."""
    if key not in site.shown.contents:
        raise HTTPException(404, "there is no such video in this round")
    return ranged(site.shown.contents[key], request.headers.get("range"))


@overview_router.get("/image/{key}")
def image_of(key: str, site: TheSite) -> Response:
    """The image that a video was made of."""
    if key not in site.shown.images:
        raise HTTPException(404, "there is no such image in this round")
    return _image(site, key)
