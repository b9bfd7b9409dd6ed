"""What `videoalign compare` and `videoalign bench` ask of whoever rates videos."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import VideoAlignError
from ..callbacks.prompt_sampler import Sampling
from ..datamodules.contracts import missing
from ..datamodules.shards import ShardSet
from ..models.dimensions import DIMENSIONS
from ..models.finite import by_name, require_finite
from ..models.registry import Registry
from ..models.scoring import failing_as


class Judge(Protocol):
    """Rates videos of prompts, in numbers that have names.

    Any class with these three methods and a ``name`` is a judge; it need not inherit from this one. In YAML a judge is
    given by its ``class_path`` and ``init_args``, so the types of its methods' arguments must be those that are written
    here. A judge that cannot rate a video raises; no number stands for a failure. It should load its model when
    it is first asked, not when it is constructed: a configuration may be read where nothing is rated.
    """

    @property
    def name(self) -> str:
        """A few words for messages that say who rates, such as the model's folder."""

    def check(self, prompts: Sequence[str], sampling: Sampling) -> None:
        """Refuse what this judge cannot rate, before the long work of a comparison begins.

        Args:
            prompts: Prompts of all videos that there will be.
            sampling: Size and length of the videos.

        Raises:
            VideoAlignError: Where prompts, sizes or the judge's own settings do not fit.
        """

    def rate_set(self, videos: ShardSet, keys: Sequence[str], folder: Path) -> dict[str, Tensor]:
        """Rate videos of a set; a second call does not repeat what an interrupted one has kept in ``folder``.

        Args:
            videos: Set of kind *videos* that holds them.
            keys: Keys of the videos.
            folder: Folder that this judge alone may write into, for what it has computed.

        Returns:
            A number per video (N,), in the order of ``keys``, under each name. A comparison and a benchmark need the
            names VQ, MQ and TA; higher is better.
        """


JUDGES: Registry[Any] = Registry(
    "videoalign.judges", "judge", {}, callable, "a class, or a function that gives a judge"
)
"""Judges that installed packages offer; a reward model is no entry, because every command takes its folder."""


def named(name: str, args: Mapping[str, Any] | None = None) -> Judge:
    """Construct a judge by its name.

    In YAML, ``class_path: videoalign.commands.judge.named`` with ``init_args: {name: NAME, args: {...}}`` gives a judge
    that an installed package offers.

    Args:
        name: Name of the entry point, or import path of the class (``package.module:Name``).
        args: Arguments of the class, by name.

    Raises:
        VideoAlignError: If there is no such judge, it does not take these arguments, or it lacks a method of a judge.
    """
    kind = JUDGES.find(name)
    try:
        judge = kind(**(args or {}))
    except TypeError as error:
        raise VideoAlignError(f"judge {name!r} cannot be constructed with {dict(args or {})} ({error})") from error
    if lacking := missing(judge, Judge):
        raise VideoAlignError(f"judge {name!r} is a {type(judge).__name__}, which has no {', '.join(lacking)}")
    return judge


def ratings_of(judge: Judge, videos: ShardSet, keys: Sequence[str], folder: Path, name: str) -> Tensor:
    """Ratings of videos, of which none may be missing or not finite.

    Args:
        judge: Who rates.
        videos: Set of kind *videos* that holds them.
        keys: Keys of the videos.
        folder: Folder for what the judge has computed.
        name: What to call the judge in messages.

    Returns:
        Ratings (N, D) in the order of ``keys``.

    Raises:
        VideoAlignError: If a dimension has not one finite number per video.
    """
    with failing_as(f"{name} ({judge.name}) failed on {videos.path}"):
        rated = judge.rate_set(videos, keys, folder)
    given = {d: v for d, v in rated.items() if isinstance(v, Tensor)} if isinstance(rated, Mapping) else {}
    if wrong := [d for d in DIMENSIONS if d not in given or given[d].shape != (len(keys),)]:
        raise VideoAlignError(
            f"{name} ({judge.name}) does not give one number per video of {videos.path} under the names "
            f"{', '.join(wrong)}; a comparison or benchmark needs {', '.join(DIMENSIONS)}"
        )
    ratings = torch.stack([given[d] for d in DIMENSIONS], 1)
    require_finite(
        f"ratings of {videos.path} by {name}", by_name(keys, ratings), "look at the videos and at this judge"
    )
    return ratings
