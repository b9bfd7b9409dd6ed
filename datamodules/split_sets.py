"""`videoalign shards split` and `shards overlap`: sets that share no prompt and no video, and what two sets share."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from .. import VideoAlignError
from ..models.files import new_folder
from .addresses import is_address
from .benchmark import PAIRS
from .contents import Content
from .ratings import prompt_key, prompt_of, share_table, sources_of
from .sample_images import image_of
from .shards import SIDES, ShardSet, ShardWriter
from .splitting import By, Item, deal
from .uploads import claims_set

SHOWN = 10
"""Largest number of prompts or videos in common that are printed."""


def content_id(size: int, crc32c: int) -> str:
    """What tells a video from all others without reading it: its size and its checksum."""
    return f"{size}-{crc32c & 0xFFFFFFFF:08x}"


def videos_in(content: Content, shards: ShardSet) -> tuple[str, ...]:
    """What tells a sample's videos from all others; for latents, which hold no videos, their paths or keys.

    Args:
        content: Sample of the set.
        shards: The set.

    Raises:
        VideoAlignError: If the set has no checksums.
    """
    index = shards.index
    if index.kind == "latents":
        if (index.latents or {}).get("of") == "videos":
            return (str(content.record.get("path") or content.key),)
        named = content.record.get("paths") or content.record.get("keys")
        both = tuple(str(named.get(side) or "") for side in "AB") if isinstance(named, dict) else ()
        return both if all(both) else ()
    spans = [content.spans[f"{side}.{index.media}".lstrip(".")] for side in SIDES[index.kind]]
    if any(span.crc32c < 0 for span in spans):
        raise VideoAlignError(
            f"{shards.name} is a set of an earlier release, without checksums, so that equal videos cannot be found: "
            f"`videoalign shards index {shards.name}` adds them"
        )
    return tuple(content_id(span.size, span.crc32c) for span in spans)


def items_of(shards: ShardSet) -> list[Item]:
    """What decides about each sample of a set, from its tables of contents alone."""
    items = []
    for content in shards.contents():
        record, name = content.record, content.name
        single = "source" in record or shards.index.kind == "videos"
        sources = (str(record.get("source") or ""),) if single else sources_of(record, name)
        items.append(Item(prompt_key(prompt_of(record, name)), videos_in(content, shards), sources))
    return items


@dataclass
class Portion:
    """What a share has got.

    Attributes:
        samples: Number of its samples.
        prompts: Prompts, as :func:`.ratings.prompt_key` spells them.
        sources: Names of the models that made its videos.
        labels: Label words of its rated pairs, by column.
    """

    samples: int = 0
    prompts: set[str] = field(default_factory=set)
    sources: set[str] = field(default_factory=set)
    labels: list[dict[str, str]] = field(default_factory=list)

    def add(self, item: Item) -> None:
        """Count a sample."""
        self.samples += 1
        self.prompts.add(item.prompt)
        self.sources.update(filter(None, item.sources))


class Shares(Mapping[str, Portion]):
    """All shares of a split, by name.

    Args:
        asked: Size of each share, by name.
        items: All samples.
        dealt: Name of the share by sample; None for those that are left out.
    """

    def __init__(self, asked: Mapping[str, float], items: Sequence[Item], dealt: Sequence[str | None]) -> None:
        self.asked, self.portions = dict(asked), {name: Portion() for name in asked}
        self.left_out: list[str] = []
        for item, name in zip(items, dealt):
            if name is not None:
                self.portions[name].add(item)

    def __getitem__(self, name: str) -> Portion:
        return self.portions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.portions)

    def __len__(self) -> int:
        return len(self.portions)

    def text(self) -> str:
        """A line per share with its counts, and the shares of its labels."""
        total = sum(portion.samples for portion in self.values())
        width = max(8, *map(len, self))
        lines = [f"{'share':{width}} {'asked':>8} {'got':>8} {'samples':>8} {'prompts':>8} {'sources':>8}"]
        for name, portion in self.items():
            counts = (portion.samples, len(portion.prompts), len(portion.sources))
            parts = f"{self.asked[name]:8.1%} {portion.samples / total:8.1%} "
            lines.append(f"{name:{width}} {parts}" + " ".join(f"{count:8}" for count in counts))
        for name, portion in self.items():
            if portion.labels:
                lines += [f"{name}: {len(portion.labels)} rated pairs", share_table(portion.labels)]
        names = list(self)
        both = {p for i, a in enumerate(names) for b in names[i + 1 :] for p in self[a].prompts & self[b].prompts}
        if both:
            lines.append(f"{len(both)} prompts occur in more than one share; no video does")
        return "\n".join([*lines, *self.left_out])


class Compared(NamedTuple):
    """A row of a table of rated pairs.

    Attributes:
        a: Number of the sample that is A.
        b: Number of the sample that is B.
        cells: Cells by column.
    """

    a: int
    b: int
    cells: dict[str, str]


@contextlib.contextmanager
def written(
    out: str | Path, shares: Mapping[str, float], open_writer: Callable[[str], ShardWriter]
) -> Iterator[dict[str, ShardWriter]]:
    """Give a writer for each share; they appear as folders of ``out`` when all are whole: in a store one by one.

    Args:
        out: Folder or address to write.
        shares: Shares by name.
        open_writer: Opens the writer of a folder.

    Yields:
        Writers by the share's name.
    """
    with contextlib.ExitStack() as stack:
        place = str(out).rstrip("/") if is_address(out) else stack.enter_context(new_folder(out))
        yield {name: stack.enter_context(open_writer(f"{place}/{name}")) for name in shares}


def write_rows(
    rows: Sequence[Compared], dealt: Sequence[str | None], writers: Mapping[str, ShardWriter], shares: Shares
) -> None:
    """Write each share's rated pairs; those whose videos lie in different shares are left out, and counted.

    Args:
        rows: All rated pairs.
        dealt: Name of the share by sample.
        writers: Writers by the share's name.
        shares: Report that gets the labels and the count.
    """
    of_share: dict[str, list[dict[str, str]]] = {name: [] for name in writers}
    for row in rows:
        if dealt[row.a] == dealt[row.b] and (share := dealt[row.a]) is not None:
            of_share[share].append(row.cells)
    for name, cells in of_share.items():
        shares[name].labels += cells
        if cells:
            writers[name].write_table(PAIRS, cells)
        else:
            shares.left_out.append(f"{name} holds no rated pair, so it has no {PAIRS}")
    if apart := len(rows) - sum(map(len, of_share.values())):
        shares.left_out.append(f"{apart} rated pairs compare models of different shares, and were left out")


@claims_set
def split(
    folder: str | Path,
    out: str | Path,
    by: By,
    shares: Mapping[str, float],
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda what, done, of: None,
) -> str:
    """Copy the samples of a set to several sets, byte by byte, so that no group of samples is in two of them.

    Args:
        folder: Folder or address of the set, of any kind.
        out: Folder or address to write, with a folder for each share.
        by: What the samples of a group have in common, see :mod:`.splitting`.
        shares: Size of each share by name; they add up to 1.
        seed: Seed of the choice.
        progress: Callback that is told the progress.

    Returns:
        Counts and label shares of each share, as text.

    Raises:
        VideoAlignError: If the set is damaged, lacks what it is grouped by, or has fewer groups than shares.
    """
    shards = ShardSet(folder)
    index, contents, items = shards.index, shards.contents(), items_of(shards)
    rows = _rows_of(shards) if PAIRS in index.tables else []
    dealt = deal(items, [(row.a, row.b) for row in rows], by, shares, seed)
    report = Shares(shares, items, dealt)
    if apart := dealt.count(None):
        report.left_out.append(f"{apart} pairs compare models of different shares, and were left out")

    def open_writer(path: str) -> ShardWriter:
        writer = ShardWriter(path, index.kind, index.media, index.frames)
        writer.index.dimensions, writer.index.latents = index.dimensions, index.latents
        return writer

    with written(out, shares, open_writer) as writers:
        for number, (content, share) in enumerate(zip(contents, dealt)):
            if share is not None:
                raw = content.raw()  # compared with its checksums
                media = {s: raw.members[f"{s}.{index.media}".lstrip(".")] for s in SIDES[index.kind]}
                writers[share].write(content.key, media, content.record, image_of(raw))
                if isinstance(labels := content.record.get("labels"), dict):
                    report[share].labels.append(labels)
            progress("samples copied", number + 1, len(contents))
        share_of = dict(zip(contents.keys(), dealt))
        for table in index.tables.keys() - {PAIRS}:
            _share_table(table, shards, writers, share_of)
        if rows:
            write_rows(rows, dealt, writers, report)
    return report.text()


def _share_table(
    name: str, shards: ShardSet, writers: Mapping[str, ShardWriter], share_of: Mapping[str, str | None]
) -> None:
    """Give each share a further file of a set: of a table that names samples the rows of its own, else all of it.

    Args:
        name: Name of the file.
        shards: The set.
        writers: Writers by share.
        share_of: Share by key of a sample; None for samples that are in none.

    Raises:
        VideoAlignError: If the file is not the one that was written, or names samples that the set lacks.
    """
    rows = shards.table(name) if name.endswith(".csv") else []
    if not rows or "key" not in rows[0]:
        for writer in writers.values():
            writer.write_file(name, shards.file(name))
            if writer.index.tables[name] != shards.index.tables[name]:
                raise VideoAlignError(f"{name} of {shards.name} is not the file that was written (another sha256)")
        return
    if absent := [row["key"] for row in rows if row["key"] not in share_of]:
        raise VideoAlignError(
            f"{name} of {shards.name} names {len(absent)} samples that the set lacks, such as {absent[0]!r}"
        )
    for share, writer in writers.items():
        if own := [row for row in rows if share_of[row["key"]] == share]:
            writer.write_table(name, own)


def _rows_of(shards: ShardSet) -> list[Compared]:
    numbers = {key: number for number, key in enumerate(shards.contents().keys())}
    rows = shards.table(PAIRS)
    if absent := [row.get(end) for row in rows for end in ("key_A", "key_B") if row.get(end) not in numbers]:
        raise VideoAlignError(
            f"{PAIRS} of {shards.name} names {len(absent)} videos that the set lacks, such as {absent[0]!r}"
        )
    return [Compared(numbers[row["key_A"]], numbers[row["key_B"]], row) for row in rows]


def overlap(one: str | Path, other: str | Path) -> tuple[str, bool]:
    """Find the prompts and videos that two sets share, from their tables of contents alone.

    Args:
        one: Folder or address of a set, such as one to train on.
        other: Folder or address of another set, such as a benchmark.

    Returns:
        Counts and the first few of them as text, and whether there is any.

    Raises:
        VideoAlignError: If a set is damaged, or has no checksums.
    """
    sets = [ShardSet(one), ShardSet(other)]
    both = [items_of(shards) for shards in sets]
    lines, found = [], False
    what: dict[str, Callable[[Item], tuple[str, ...]]] = {"prompts": lambda item: (item.prompt,)}
    media = [(s.index.media if s.index.kind != "latents" else "latents", s.index.frames) for s in sets]
    if media[0] == media[1] and media[0][0] != "latents":
        what["videos"] = lambda item: item.videos
    else:
        lines.append("videos are not compared: only files of one format have checksums that can be equal")
    for name, of in what.items():
        mine, theirs = ([set(of(item)) for item in items] for items in both)
        common = set().union(*mine) & set().union(*theirs)
        found |= bool(common)
        touched = (f"{sum(bool(n & common) for n in names)} of {len(names)} samples" for names in (mine, theirs))
        where = " and ".join(f"{counts} of {shards.name}" for counts, shards in zip(touched, sets))
        lines.append(f"{len(common)} {name} in both" + (f": {where}" if common else ""))
        if name == "prompts":
            lines += [f"  {text[:100]}" for text in sorted(common)[:SHOWN]]
            lines += [f"  ... and {len(common) - SHOWN} more"] if len(common) > SHOWN else []
    return "\n".join(lines), found
