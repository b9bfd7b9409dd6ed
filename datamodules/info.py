"""Summary of a set, as `videoalign shards info` prints it."""

import math
from collections import Counter

from .benchmark import PAIRS, Benchmark
from .ratings import COLUMNS, labels_in, prompt_of, share_table
from .shards import ShardSet


def info(folder: str) -> str:
    """Kind, counts, sizes, label shares and sources of a set, as text.

    Args:
        folder: Folder or address of the set.
    """
    shards = ShardSet(folder)
    index = shards.index
    size = sum(shard.bytes for shard in index.shards)
    settings = index.latents or index.frames or {}
    media = {"mp4": "mp4 files"}.get(index.media, "tensors" if index.kind == "latents" else "decoded frames")
    media += f" ({', '.join(f'{k} {v}' for k, v in settings.items())})" if settings else ""
    lines = [f"{shards.name}: {index.samples} {index.kind} as {media}, {len(index.shards)} shards, {size / 1e6:.1f} MB"]
    records, prompts, frames, images = [], set(), [], []
    for content in shards.contents():
        images += [content.image_id] if content.image else []
        records.append(content.record)
        prompts.add(prompt_of(content.record, content.name))
        if index.kind == "pairs":
            labels_in(content.record, content.name)
    sources: Counter[str] = Counter()
    for record in records:
        ends = "AB" if isinstance(record.get("sources"), dict) else [None]
        for end in ends:
            if end is None:
                source, count = record.get("source"), record.get("num_frames")
            else:
                source, count = record["sources"].get(end), record.get("num_frames", {}).get(end)
            sources[source or "unknown"] += 1
            frames.append(count or math.nan)
    lines.append(f"{len(prompts)} prompts; {min(frames):.0f} to {max(frames):.0f} frames a video")
    if images:
        of = "every sample" if len(images) == len(records) else f"{len(images)} of {len(records)} samples"
        lines.append(f"{of} with the image that its videos begin with, {len(set(images))} different ones")
    lines += [f"  {name:24} {count:8} videos" for name, count in sources.most_common()]
    if index.kind == "pairs":
        lines.append(share_table([{c: record["labels"].get(c, "") for c in COLUMNS} for record in records]))
    elif PAIRS in index.tables:
        rows = Benchmark(folder).rows
        lines += [f"{len(rows)} rated pairs in {PAIRS}", share_table(rows)]
    return "\n".join(lines)
