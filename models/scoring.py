"""Rewards of generated samples: what a reward gives is one finite number a sample under each of its names, or refused.

A failure never becomes a number: a reward that cannot rate a sample raises, and the message names both.

Legend: B samples, T frames, H, W pixels; C, F, H, W of latents are the autoencoder's.
"""

import contextlib
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import VideoAlignError
from .name_checks import check_names

NEEDS = ("videos", "latents")
"""What a reward may read."""


class ScoresVideos(Protocol):
    """Rates generated samples, in numbers that have names: a reward, or a held-out judge beside it.

    Any class with these members is a reward; it need not inherit from this one. In YAML a reward is given by its
    ``class_path`` and ``init_args``, so the types of its methods' arguments must be those that are written here. A
    reward that cannot rate a sample raises; no number stands for a failure. It should load its model when it is first
    asked, not when it is constructed: a configuration may be read where nothing is rated.

    A reward may also have an attribute ``features``: features (B, F) of the samples of its latest call, in which the
    diversity of a group is measured; and an attribute ``video_fps``: the frame rate that it takes the videos to have,
    which must be the one that they are sampled for.

    :func:`scored` is the one place that calls rewards: it refuses what is no reward.
    """

    @property
    def name(self) -> str:
        """A few words for messages that say who rates, such as the model's folder."""

    @property
    def needs(self) -> Literal["videos", "latents"]:
        """What is rated: decoded videos, or clean latents. A plain attribute of the class will do."""

    def check(self, prompts: Sequence[str]) -> None:
        """Refuse what this reward cannot rate, before the long work begins; what it needs may be loaded here.

        Args:
            prompts: Prompts of all samples that there will be.

        Raises:
            VideoAlignError: Where prompts or the reward's own settings do not fit.
        """

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Rate samples.

        Args:
            videos: Videos (B, T, 3, H, W), uint8; where :attr:`needs` says so, normalised latents (B, C, F, H, W).
            prompts: Prompt of each sample.

        Returns:
            A number per sample (B,) under each name; higher is better.
        """

    def place(self, device: torch.device | None) -> None:
        """Move the reward's models, if it has some; called between the phases of training.

        Args:
            device: Device that the run computes on; None releases the device's memory.
        """


def check_rewards(
    rewards: Mapping[str, ScoresVideos], prompts: Sequence[str], fps: float | None = None, key: str = "sampling.fps"
) -> None:
    """Refuse rewards that cannot rate what there will be, before the long work begins.

    Args:
        rewards: Rewards by name.
        prompts: Prompts of all samples that there will be.
        fps: Frame rate that the samples are meant for, in frames per second; None where it is not known.
        key: Key of that frame rate, for messages.

    Raises:
        VideoAlignError: Where a name cannot be one, a reward reads something else than samples, or videos of another
            frame rate, or refuses the prompts, or fails; names the reward.
    """
    for name, reward in rewards.items():
        who = _known(name, reward)
        with failing_as(f"{who} cannot say which frame rate videos have for it"):
            own = getattr(reward, "video_fps", None)
            other = reward.needs == "videos" and None not in (own, fps) and float(own) != fps
        if other:
            raise VideoAlignError(
                f"{who} takes videos to have {own:g} frames per second, and {key} is {fps:g}: set both to the rate at "
                "which the generator makes them"
            )
        with failing_as(f"{who} failed in check"):
            reward.check(prompts)


def _known(key: str, reward: ScoresVideos) -> str:
    """Who rates, in words; refuses what cannot be a name, and what reads something else than samples."""
    check_names("rewards", [key], "/")
    with failing_as(f"reward {key} cannot say its name, or what it needs"):
        who, needs = f"reward {key} ({reward.name})", reward.needs
    if needs not in NEEDS:
        raise VideoAlignError(f"{who} needs {needs!r}; what a reward can read is {' or '.join(NEEDS)}")
    return who


@contextlib.contextmanager
def failing_as(what: str) -> Iterator[None]:
    """Turn whatever code of a user's own raises in a block into a message that says whose it is.

    Args:
        what: Who failed, and in what, as the first words of the message.

    Raises:
        VideoAlignError: What went wrong, and in which file and line; errors of this package pass as they are.
    """
    dtype = torch.get_default_dtype()
    try:
        yield
    except VideoAlignError:
        raise
    except (Exception, SystemExit) as error:  # a library that exits would end a run as if it were finished
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = next(iter(str(error).splitlines()), "")
        raise VideoAlignError(
            f"{what}: {type(error).__name__}: {text[:300]} ({place.filename}, line {place.lineno})"
        ) from error
    finally:
        torch.set_default_dtype(dtype)  # of the training, which is nothing of the reward's


def scored(
    rewards: Mapping[str, ScoresVideos],
    videos: Tensor | None,
    latents: Tensor | None,
    prompts: Sequence[str],
    names: Sequence[str],
) -> dict[str, Tensor]:
    """Rate samples with every reward.

    Args:
        rewards: Rewards by name; a name holds no ``/``.
        videos: Decoded videos (B, T, 3, H, W), uint8; None where no reward reads them.
        latents: Normalised latents (B, C, F, H, W); None where no reward reads them.
        prompts: Prompt of each sample.
        names: Name of each sample, for messages.

    Returns:
        Rewards (B,), fp32 on the CPU, under ``REWARD/NAME`` with the names of the mapping and those that the reward
        gives.

    Raises:
        VideoAlignError: Where a reward fails, reads what is not there, or gives anything but one finite number a sample
            under each of its names; names the reward and the samples.
    """
    found: dict[str, Tensor] = {}
    for key, reward in rewards.items():
        who = _known(key, reward)
        given = _samples(who, reward, {"videos": videos, "latents": latents})
        if not len(given) == len(prompts) == len(names):
            raise VideoAlignError(f"{who}: {len(given)} samples, {len(prompts)} prompts and {len(names)} names")
        rated = _asked(who, reward, given, prompts, names)
        found |= {f"{key}/{name}": values for name, values in sound(who, rated, names).items()}
    return found


class Rated(NamedTuple):
    """What rewards say of n samples."""

    scores: dict[str, Tensor]
    """Rewards (n,) under ``REWARD/NAME``, float64 on the CPU."""
    features: dict[str, Tensor]
    """Features (n, F) by the name of the reward, of those that have some."""


def rated_latents(
    rewards: Mapping[str, ScoresVideos],
    decode: Callable[[Tensor, Sequence[str]], Tensor],
    latents: Tensor,
    prompts: Sequence[str],
    names: Sequence[str],
    size: int,
    device: torch.device,
) -> Rated:
    """Rate latents, some at a time; they are decoded only where a reward reads videos.

    Args:
        rewards: Rewards by name.
        decode: Gives videos (B, T, 3, H, W) of latents (B, C, F, H, W) with names.
        latents: Latents (n, C, F, H, W), on any device.
        prompts: Prompt of each sample.
        names: Name of each sample, for messages.
        size: Number of samples that are decoded at once.
        device: Device that the run computes on.

    Raises:
        VideoAlignError: As :func:`scored` does.
    """
    shown = "videos" in needed(rewards)
    scores: dict[str, list[Tensor]] = {}
    features: dict[str, list[Tensor]] = {}
    for first in range(0, len(latents), size):
        some = slice(first, first + size)
        x = latents[some].to(device)
        videos = decode(x, names[some]) if shown else None
        rated = {n: v.double() for n, v in scored(rewards, videos, x, prompts[some], names[some]).items()}
        seen = {key: value for key, one in rewards.items() if (value := _features(key, one, names[some])) is not None}
        for kept, more, kind in ((scores, rated, "rewards"), (features, seen, "features")):
            if first and _shapes({name: parts[0] for name, parts in kept.items()}) != _shapes(more):
                raise VideoAlignError(
                    f"of {_listed(names[some])} there are {kind} {_shapes(more)}, of samples before "
                    f"{_shapes({name: parts[0] for name, parts in kept.items()})}; a reward gives the same every time"
                )
            for name, value in more.items():
                kept.setdefault(name, []).append(value)
    return Rated(*({name: torch.cat(parts) for name, parts in of.items()} for of in (scores, features)))


def _shapes(values: Mapping[str, Tensor]) -> str:
    """Names and widths of what is known of each sample, in words."""
    return ", ".join(f"{n} {tuple(v.shape[1:])}".removesuffix(" ()") for n, v in sorted(values.items())) or "none"


def _features(key: str, reward: ScoresVideos, names: Sequence[str]) -> Tensor | None:
    """Features (B, F) of the latest samples, fp32 on the CPU, where the reward has some."""
    with failing_as(f"reward {key} ({reward.name}) failed in features"):
        found = getattr(reward, "features", None)
    if found is None:
        return None
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(names) or not found.isfinite().all():
        kind = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise VideoAlignError(
            f"reward {key} ({reward.name}) has features that are {kind} for {len(names)} samples ({_listed(names)}); "
            f"they must be a finite tensor of shape ({len(names)}, F), or None"
        )
    return found.detach().to("cpu", torch.float32)


@contextlib.contextmanager
def placed(rewards: Mapping[str, ScoresVideos], device: torch.device, release: bool) -> Iterator[None]:
    """Rewards on the device that the run computes on, for a ``with`` block.

    Args:
        rewards: Rewards by name.
        device: Device that the run computes on.
        release: Whether they leave it afterwards.
    """
    _place(rewards, device)
    yield
    if release:
        _place(rewards, None)


def _place(rewards: Mapping[str, ScoresVideos], device: torch.device | None) -> None:
    for key, reward in rewards.items():
        with failing_as(f"reward {key} ({reward.name}) failed in place"):
            reward.place(device)


def needed(rewards: Mapping[str, ScoresVideos]) -> set[str]:
    """What rewards read: ``videos``, ``latents`` or both. Where no reward reads videos, none need be decoded."""
    return {reward.needs for reward in rewards.values()}


def sound(who: str, rated: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """What a reward has given, if it is one finite number a sample under each name.

    Args:
        who: Who rated, as the first words of a message.
        rated: What the reward gave.
        names: Name of each sample, for messages.

    Returns:
        Rewards (B,), fp32 on the CPU, by name.

    Raises:
        VideoAlignError: Where it is anything else.
    """
    if not isinstance(rated, Mapping) or not rated:
        kind = "an empty dictionary" if isinstance(rated, Mapping) else f"a {type(rated).__name__}"
        raise VideoAlignError(f"{who} gave {kind} for {_listed(names)}, but rewards are tensors (B,) by name")
    if wrong := [n for n in rated if not isinstance(n, str) or not n or "/" in n or not n.isprintable()]:
        raise VideoAlignError(f"{who} calls a reward {wrong[0]!r}; a name is a printable text without slashes")
    numbers = {}
    for name, values in rated.items():
        plain = isinstance(values, Tensor) and values.layout == torch.strided and values.device.type != "meta"
        if not plain or values.is_complex() or values.shape != (len(names),):
            where = "" if plain or not isinstance(values, Tensor) else f" ({values.layout}, on {values.device})"
            kind = (
                f"{values.dtype} {tuple(values.shape)}{where}" if isinstance(values, Tensor) else type(values).__name__
            )
            raise VideoAlignError(
                f"{who} gave {kind} under {name} for {len(names)} samples ({_listed(names)}); it must be a tensor of "
                f"shape ({len(names)},)"
            )
        numbers[name] = values.detach().to("cpu", torch.float32)
        if bad := [sample for sample, fine in zip(names, numbers[name].isfinite().tolist()) if not fine]:
            raise VideoAlignError(
                f"{who} gave NaN or infinity under {name} for {_listed(bad)}; look at these samples and at this reward"
            )
    return numbers


def as_rewards(rated: Any, count: int, name: str = "score") -> dict[str, Tensor]:
    """Numbers of any kind, such as lists and arrays, as tensors by name.

    Args:
        rated: Numbers by name, or numbers alone.
        count: Number of samples B; a single number is right for one sample alone.
        name: Name of numbers that come without one.

    Returns:
        fp32 tensors by name; whether each is (B,), :func:`sound` tells.

    Raises:
        VideoAlignError: Where something is no number.
    """
    named = rated if isinstance(rated, Mapping) else {name: rated}
    tensors = {}
    for key, values in named.items():
        try:
            tensors[key] = torch.as_tensor(values).to("cpu", torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise VideoAlignError(f"{key} is no list of numbers ({str(error).splitlines()[0]})") from None
        if count == 1 and tensors[key].ndim == 0:
            tensors[key] = tensors[key][None]
    return tensors


def _samples(who: str, reward: ScoresVideos, there: Mapping[str, Tensor | None]) -> Tensor:
    """What a reward reads of the samples."""
    if (given := there[reward.needs]) is None:
        other = " or ".join(name for name, value in there.items() if value is not None)
        raise VideoAlignError(f"{who} reads {reward.needs}, but there are only {other}")
    return given


def _asked(who: str, reward: ScoresVideos, given: Tensor, prompts: Sequence[str], names: Sequence[str]) -> Any:
    with (
        failing_as(f"{who} failed on {_listed(names)}"),
        torch.no_grad(),
        torch.autocast(given.device.type, enabled=False),
    ):
        try:
            # copies: what one reward writes to its input must reach neither the training nor other rewards
            return reward(given.clone(), list(prompts))
        except VideoAlignError as error:
            raise VideoAlignError(f"{who} cannot rate {_listed(names)}: {error}") from error


def _listed(names: Sequence[str]) -> str:
    """The first names of samples, and how many more there are."""
    first, more = ", ".join(names[:4]), len(names) - 4
    return f"{first} and {more} more" if more > 0 else first
