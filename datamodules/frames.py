"""Decoded frames on disk: sampled and resized once, without loss, so that training does not decode again."""

import json
import math
import warnings
from collections.abc import Iterator
from concurrent.futures import Executor
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ..models.frame_sampling import FrameSampling
from .parallel import in_order
from .shards import SIDES, RawSample, ShardError, ShardSet, ShardWriter
from .video import decode


def dump_frames(video: Tensor) -> bytes:
    """uint8 (T, 3, H, W) as safetensors: raw, because decompressing would cost more than reading."""
    return safetensors.torch.save({"frames": video.contiguous()})


def load_frames(content: bytes, name: str) -> Tensor:
    """The inverse of :func:`dump_frames`.

    The tensor lies in ``content`` itself: safetensors' own reader would copy megabytes of it, which takes longer than to
    read them from disk. It must not be written to.

    Args:
        content: a safetensors file with the one tensor ``frames``.
        name: of the clip, for messages.

    Raises:
        ShardError: where the content is not that.
    """
    try:
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        header.pop("__metadata__", None)
        ((tensor, entry),) = header.items()
        kind, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ShardError(f"{name} holds no decoded frames ({error})") from None
    if tensor != "frames" or kind != "U8" or len(shape) != 4 or shape[1] != 3:
        raise ShardError(f"{name} holds {tensor}, {kind} of shape {shape}, not frames, uint8 (T, 3, H, W)")
    if (
        not all(type(n) is int and n > 0 for n in shape)
        or (first, last) != (0, math.prod(shape))
        or len(content) != start + last
    ):
        raise ShardError(f"{name} holds no decoded frames (it was cut short, or is longer than it says)")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(content, dtype=torch.uint8, offset=start).view(shape)


class FrameReader:
    """Frames of a sample's videos, decoded now or read where they were decoded before.

    Args:
        shards: the set. sampling, factor: what the model takes.

    Raises:
        ShardError: where the set's frames were made for another sampling.
    """

    def __init__(self, shards: ShardSet, sampling: FrameSampling, factor: int) -> None:
        self.kind, self.media, self.sampling, self.factor = shards.index.kind, shards.index.media, sampling, factor
        stored, wanted = shards.index.frames, {**sampling.to_dict(), "factor": factor}
        if stored is not None and stored != wanted:
            different = [
                f"{name}: {stored.get(name)} stored, {wanted[name]} wanted"
                for name in wanted
                if stored.get(name) != wanted[name]
            ]
            raise ShardError(
                f"{shards.path} holds frames that were decoded for another model ({'; '.join(different)}). "
                "Encode the frames anew for this one, or use the set with the mp4 files."
            )

    def __call__(self, raw: RawSample) -> list[Tensor]:
        """uint8 (T, 3, H, W) per video: A and B of a pair, or the one video."""
        videos = []
        for side in SIDES[self.kind]:
            member = f"{side}.{self.media}".lstrip(".")
            name, content = f"{raw.name}, {member}", raw.members[member]
            videos.append(
                decode(content, self.sampling, self.factor, name) if self.media == "mp4" else load_frames(content, name)
            )
        return videos


def encode_frames(
    source: ShardSet, out: str | Path, sampling: FrameSampling, factor: int, pool: Executor | None = None
) -> Iterator[int]:
    """Write ``source`` again with decoded frames in place of mp4 files; yields the count of samples done.

    Args:
        source: a set with mp4 files. out: folder to make. sampling, factor: of the model that will read it.
        pool: processes to decode in.
    """
    if source.index.media != "mp4":
        raise ShardError(f"{source.path} holds decoded frames already")
    reader = FrameReader(source, sampling, factor)
    kind = source.index.kind
    with ShardWriter(out, kind, "safetensors", {**sampling.to_dict(), "factor": factor}) as writer:
        work = in_order(pool, partial(_encoded, reader), source)
        for done, (key, videos, record) in enumerate(work, 1):
            writer.write(key, dict(zip(SIDES[kind], videos)), record)
            yield done
        for name in source.index.tables:
            writer.write_table(name, source.table(name))


def _encoded(reader: FrameReader, raw: RawSample) -> tuple[str, list[bytes], dict]:
    return raw.key, [dump_frames(video) for video in reader(raw)], raw.record()
