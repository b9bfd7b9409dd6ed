"""Sets of unrated videos: from a table of files, or from sets of one generator each."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import NamedTuple

from .. import VideoAlignError
from .importing import look, look_at_images, merged_text, video_record
from .media import ImageFile, Images, Media, open_media
from .new_samples import NewSample, Progress, write_samples
from .ratings import prompt_key
from .sample_images import image_of
from .shards import ShardSet, ShardWriter
from .tables import read_table
from .uploads import claims_set

REQUIRED = ("path", "prompt", "source")


@claims_set
def import_videos(
    table: Path,
    videos: Path,
    out: str | Path,
    skip_bad_rows: bool = False,
    pool: Executor | None = None,
    progress: Progress = lambda what, done, of: None,
    seed: int = 0,
    held_out: float = 0.0,
) -> str:
    """Write the videos that a CSV names as a *videos* set.

    A row that says again what an earlier one says is merged with it, whatever spaces and capitals its prompt has.

    Args:
        table: CSV with ``path, prompt, source``, the source being the name of the model that made the video. A column
            ``image`` names the picture that a video begins with; an empty cell names none.
        videos: Folder or zip archive that its paths are relative to.
        out: Folder or address to write.
        skip_bad_rows: Leave invalid rows out; otherwise any of them stops the import.
        pool: Processes that check the videos.
        progress: Callback that is told the progress.
        seed: Seed of the order of the samples, see :func:`.importing.write_set`.
        held_out: Share of the videos that become the set ``val`` in ``out``, the others being ``train`` there.

    Returns:
        Summary of the set, as text.

    Raises:
        VideoAlignError: If rows are invalid and not left out; the message lists each with its reason.
    """
    media = open_media(videos)
    sound, merged, rejected = _sorted_rows(table, media)
    clips, bad = look(media, (row.path for row in sound), pool, progress)
    bad |= look_at_images((row.image for row in sound), pool, progress)
    rejected += [(row.line, bad[file]) for row in sound for file in (row.path, row.image) if file in bad]
    sound = [row for row in sound if row.path not in bad and row.image not in bad]
    reasons = [f"  line {line}: {reason}" for line, reason in sorted(rejected)]
    repeated = [merged_text(merged)] if merged else []
    report = "\n".join([*repeated, f"{len(rejected)} rows rejected", *reasons])
    if not sound or (rejected and not skip_bad_rows):
        remedy = "Mend them, or leave them out with --skip-bad-rows." if sound else "No row is sound."
        raise VideoAlignError(f"{table} was not imported.\n{report}\n{remedy}")
    samples = [
        NewSample(f"{line:06d}", (path,), (source,), video_record(prompt, source, path, clips[path]), image)
        for line, path, prompt, source, image in sound
    ]
    shares = write_samples(samples, [], media, out, "videos", seed, held_out, pool, progress)
    sources, prompts = Counter(row.source for row in sound), {row.prompt for row in sound}
    return "\n".join(filter(None, [_counts(sources, len(prompts)), report, shares]))


class _Row(NamedTuple):
    """A valid row: the number of its line, and what it names."""

    line: int
    path: str
    prompt: str
    source: str
    image: ImageFile | None


def _sorted_rows(table: Path, media: Media) -> tuple[list[_Row], list[int], list[tuple[int, str]]]:
    """Valid rows, lines that repeat an earlier row, and invalid lines with reasons."""
    sound, merged, rejected, images = [], [], [], Images(media, table)
    seen: dict[tuple[str, str], _Row] = {}
    for line, cells in read_table(table, REQUIRED, optional=("image",)):
        try:
            if isinstance(cells, str):
                raise VideoAlignError(cells)
            if empty := [name for name in REQUIRED if not cells[name].strip()]:
                raise VideoAlignError(f"there is no {' and no '.join(empty)}")
            prompt, source = cells["prompt"].strip(), cells["source"].strip()
            row = _Row(line, media.find(cells["path"]), prompt, source, images.find(cells))
            first = seen.setdefault((row.path, prompt_key(prompt)), row)
            if first is row:
                sound.append(row)
            elif (first.source, first.image) == (source, row.image):
                merged.append(line)
            else:
                other = "source" if first.source != source else "image"
                raise VideoAlignError(f"repeats line {first.line}: the same video and prompt, but another {other}")
        except VideoAlignError as error:
            rejected.append((line, str(error)))
    return sound, merged, rejected


@claims_set
def join(
    sets: Sequence[str | Path],
    out: str | Path,
    sources: Sequence[str] = (),
    progress: Progress = lambda what, done, of: None,
) -> str:
    """Write the videos of several *videos* sets as one, such as those of several runs of `videoalign generate`.

    Args:
        sets: Folders or addresses of the sets.
        out: Folder or address to write.
        sources: Names of the models, one for each set, in place of those in the records.
        progress: Callback that is told the progress.

    Returns:
        Summary of the set, as text.

    Raises:
        VideoAlignError: If a set holds no mp4 files, or its videos name no source.
    """
    shards = [ShardSet(path, "videos") for path in sets]
    if sources and len(sources) != len(shards):
        raise VideoAlignError(f"--sources names {len(sources)} models, of {len(shards)} sets")
    if frames := [one.name for one in shards if one.index.media != "mp4"]:
        raise VideoAlignError(f"{frames[0]} holds decoded frames; join the sets with mp4 files")
    counts, prompts, total = Counter(), set(), sum(one.index.samples for one in shards)
    with ShardWriter(out, "videos") as writer:
        for number, one in enumerate(shards):
            for content in one.contents():
                source = sources[number] if sources else content.record.get("source")
                if not source:
                    raise VideoAlignError(
                        f"{one.name}: video {content.key!r} names no source; name one for each set with --sources"
                    )
                key, record = f"{number}-{content.key}", {**content.record, "source": source}
                writer.write(key, {"": content.read("mp4")}, record, image_of(content))
                counts[source] += 1
                prompts.add(content.record.get("prompt"))
                progress("samples written", counts.total(), total)
    return _counts(counts, len(prompts))


def _counts(sources: Counter, prompts: int) -> str:
    by_source = ", ".join(f"{count} by {name}" for name, count in sources.items())
    return f"{sources.total()} videos of {prompts} prompts: {by_source}"
