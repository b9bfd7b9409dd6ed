"""Which sample belongs to which share: groups that may not be cut, dealt out as evenly as they allow, by a seed.

Samples that have something in common make a group: a prompt or a video (``prompt``), a video (``video``), or the model
that made them (``source``). The parts of a graph that hang together are found first, so that two prompts whose pairs
share one video are one group. Nothing here reads a file or needs torch.
"""

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from .. import VideoAlignError

By = Literal["prompt", "source", "video"]
WAYS: tuple[By, ...] = get_args(By)


@dataclass(frozen=True)
class Item:
    """What is known of a sample.

    Attributes:
        prompt: Prompt, as :func:`.ratings.prompt_key` spells it.
        videos: What tells each of its videos from all others; empty where that is unknown.
        sources: Names of the models that made the videos, in their order.
    """

    prompt: str
    videos: tuple[str, ...]
    sources: tuple[str, ...]


class _Joined:
    """Disjoint sets of things: a forest in which every thing points towards the root of its set."""

    def __init__(self) -> None:
        self.parent: dict[Hashable, Hashable] = {}

    def root(self, thing: Hashable) -> Hashable:
        above = self.parent.setdefault(thing, thing)
        while above != thing:  # each step halves the way for those who come later
            self.parent[thing] = self.parent[above]
            thing, above = above, self.parent[above]
        return thing

    def join(self, things: Iterable[Hashable]) -> None:
        first, *others = (self.root(thing) for thing in things)
        for other in others:
            self.parent[self.root(other)] = self.root(first)


def deal(
    items: Sequence[Item], links: Iterable[tuple[int, int]], by: By, shares: Mapping[str, float], seed: int
) -> list[str | None]:
    """Give every sample to a share, the same one whatever their order.

    Args:
        items: All samples.
        links: Numbers of two samples that are compared with each other, and so stay together; not by ``source``.
        by: What a group has in common.
        shares: Size of each share by name; they add up to 1.
        seed: Seed by which groups of one size are put in order.

    Returns:
        Name of the share by sample; None by ``source`` for a pair whose two models went to different shares.

    Raises:
        VideoAlignError: If a sample lacks what it is grouped by, or there are fewer groups than shares.
    """
    if by == "source":
        return _by_source(items, shares, seed)
    joined = _Joined()
    for number, item in enumerate(items):
        of_prompt = [("prompt", item.prompt)] if by == "prompt" else []
        joined.join([number, *of_prompt, *(("video", video) for video in item.videos)])
    for link in links:
        joined.join(link)
    if by == "video" and (without := sum(not item.videos for item in items)):
        raise VideoAlignError(
            f"{without} of {len(items)} samples do not say which videos they are of, so that no split by video is "
            "possible; split by prompt, or split the videos' set before it is encoded"
        )
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for number in range(len(items)):
        groups[joined.root(number)].append(number)
    names = [min("\n".join((items[n].prompt, *items[n].videos)) for n in group) for group in groups.values()]
    sizes = [float(len(group)) for group in groups.values()]
    dealt: list[str | None] = [None] * len(items)
    for share, group in zip(_shares_of(names, sizes, by, shares, seed), groups.values()):
        for number in group:
            dealt[number] = share
    return dealt


def _by_source(items: Sequence[Item], shares: Mapping[str, float], seed: int) -> list[str | None]:
    if without := sum(not all(item.sources) or not item.sources for item in items):
        raise VideoAlignError(
            f"{without} of {len(items)} samples do not name the models that made their videos, so that no split by "
            "source is possible"
        )
    joined, sizes = _Joined(), defaultdict(float)
    for item in items:
        for source, video in zip(item.sources, item.videos):  # one file under two names
            joined.join([("source", source), ("video", video)])
    for item in items:
        for source in item.sources:
            sizes[joined.root(("source", source))] += 1 / len(item.sources)
    roots = {source: joined.root(("source", source)) for item in items for source in item.sources}
    names = [min(source for source, root in roots.items() if root == group) for group in sizes]
    share_of = dict(zip(sizes, _shares_of(names, list(sizes.values()), "source", shares, seed)))
    dealt: list[str | None] = []
    for item in items:
        ends = {share_of[roots[source]] for source in item.sources}
        dealt.append(ends.pop() if len(ends) == 1 else None)
    if empty := [name for name in shares if name not in dealt]:
        raise VideoAlignError(
            f"no pair is left for {', '.join(empty)}: {dealt.count(None)} of {len(items)} pairs compare models of "
            "different shares; try another --seed or other --shares, or split by prompt"
        )
    return dealt


def _shares_of(
    names: Sequence[str], sizes: Sequence[float], by: By, shares: Mapping[str, float], seed: int
) -> list[str]:
    """The share of each group.

    The largest group comes first, and each goes where the filled part of the share is least with it: the rule by which
    jobs of known length are given to machines of unequal speed. Every share so gets groups of all sizes.
    """
    if len(names) < len(shares):
        hang = {"prompt": "prompts or videos", "video": "videos", "source": "sources"}[by]
        raise VideoAlignError(
            f"by {by} there {'is 1 group' if len(names) == 1 else f'are {len(names)} groups'} of samples that have "
            f"{hang} in common, too few for {len(shares)} shares ({', '.join(shares)})"
        )

    def place(number: int) -> tuple[float, bytes]:
        return -sizes[number], hashlib.sha256(f"{seed}\n{names[number]}".encode(errors="surrogatepass")).digest()

    order = sorted(range(len(names)), key=place)
    filled, members = dict.fromkeys(shares, 0.0), {name: [] for name in shares}
    for number in order:
        least = min(shares, key=lambda name: ((filled[name] + sizes[number]) / shares[name], -shares[name]))
        filled[least] += sizes[number]
        members[least].append(number)
    for name in shares:  # a share that is smaller than all groups gets the smallest one
        if not members[name]:
            members[name].append(members[max(members, key=lambda other: len(members[other]))].pop())
    result = [""] * len(names)
    for name, numbers in members.items():
        for number in numbers:
            result[number] = name
    return result
