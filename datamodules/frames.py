"""Decoded frames on disk: sampled and resized once, without loss, so that training does not decode again."""

import hashlib
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
from .contents import RawSample, ShardError
from .parallel import in_order
from .sample_images import SampleImage, image_of, pixels
from .shards import SIDES, ShardSet, ShardWriter
from .video import decode, resized


def dump_frames(video: Tensor) -> bytes:
    """Frames, uint8 (T, 3, H, W), as safetensors: raw, because decompressing would cost more than reading."""
    return safetensors.torch.save({"frames": video.contiguous()})


def load_frames(content: bytes, name: str) -> Tensor:
    """The inverse of :func:`dump_frames`.

    The tensor shares the memory of ``content`` and must not be written to: safetensors' own reader would copy megabytes
    of it, which takes longer than to read them from disk.

    Args:
        content: Content of a safetensors file with the one tensor ``frames``.
        name: What to call the clip in messages.

    Raises:
        ShardError: If the content is no such file.
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


def load_image(content: bytes, sampling: FrameSampling, factor: int, name: str) -> Tensor:
    """Pixels of an image at the size of a clip's frames, uint8 (3, H, W).

    Args:
        content: Content of the image's file.
        sampling: What chooses the size: the frame sampling of a model, or the size of a clip.
        factor: Sides become multiples of this (patch x merge).
        name: What to call the image in messages.

    Raises:
        VideoAlignError: If it cannot be decoded, or is too large or too narrow.
    """
    whole = torch.from_numpy(pixels(content, name).copy()).permute(2, 0, 1)[None]  # (1, 3, H, W)
    return resized(whole, sampling, factor, name)[0]


class FrameReader:
    """Reads the frames of a sample's videos; decodes them unless the set holds decoded frames.

    Args:
        shards: The set.
        sampling: Frame sampling of the model.
        factor: Frame sides become multiples of this (patch x merge).
        images: Whether :meth:`image` reads the samples' images, which all of them must hold then.
        keep_gb: Memory for decoded videos, in GB. A video whose content was seen before is not decoded again; what does
            not fit is decoded every time.

    Raises:
        ShardError: If the set holds frames that were decoded for another sampling, or lacks images.
    """

    def __init__(
        self, shards: ShardSet, sampling: FrameSampling, factor: int, images: bool = False, keep_gb: float = 0.0
    ) -> None:
        self.images = images
        self._kept: dict[bytes, Tensor] = {}  # frames by the digest of the file
        self._limit, self._room = (round(keep_gb * 1e9),) * 2  # bytes: of all, and those that are left
        if images and (lacking := [content.key for content in shards.contents() if not content.image]):
            raise ShardError(
                f"{shards.name}: {len(lacking)} of {len(shards)} samples hold no image, the first of them "
                f"{lacking[0]!r}, and the reward model's template shows the image that a video begins with"
            )
        self.kind, self.media, self.sampling, self.factor = shards.index.kind, shards.index.media, sampling, factor
        stored, wanted = shards.index.frames, {**sampling.to_dict(), "factor": factor}
        if stored is not None and stored != wanted:
            different = [
                f"{name}: {stored.get(name)} stored, {wanted[name]} wanted"
                for name in wanted
                if stored.get(name) != wanted[name]
            ]
            raise ShardError(
                f"{shards.name} holds frames that were decoded for another model ({'; '.join(different)}). "
                "Encode the frames anew for this one, or use the set with the mp4 files."
            )

    def __call__(self, raw: RawSample) -> list[Tensor]:
        """Frames, uint8 (T, 3, H, W), of each video: A and B of a pair, or the one video."""
        return [self._frames(raw, f"{side}.{self.media}".lstrip(".")) for side in SIDES[self.kind]]

    def image(self, raw: RawSample) -> Tensor | None:
        """The sample's image, uint8 (3, H, W), resized as the frames are; None where images are not asked for."""
        image = image_of(raw) if self.images else None
        return load_image(image.content, self.sampling, self.factor, f"{raw.name}, {image.kind}") if image else None

    def _frames(self, raw: RawSample, member: str) -> Tensor:
        name, content = f"{raw.name}, {member}", raw.members[member]
        if self.media != "mp4":
            return load_frames(content, name)
        if not self._limit:
            return decode(content, self.sampling, self.factor, name)
        digest = hashlib.blake2b(content, digest_size=16).digest()
        if digest in self._kept:
            return self._kept[digest].clone()  # an augmentation may write to what it is given
        video = decode(content, self.sampling, self.factor, name)
        if video.nbytes <= self._room:
            self._kept[digest] = video.clone()
            self._room -= video.nbytes
        return video


def encode_frames(
    source: ShardSet, out: str | Path, sampling: FrameSampling, factor: int, pool: Executor | None = None
) -> Iterator[int]:
    """Copy a set, with decoded frames in place of mp4 files.

    Args:
        source: Set with mp4 files.
        out: Folder or address to write.
        sampling: Frame sampling of the model that will read the frames.
        factor: Frame sides become multiples of this (patch x merge).
        pool: Processes that decode; None decodes in this one.

    Yields:
        Number of samples written so far.
    """
    if source.index.media != "mp4":
        raise ShardError(f"{source.name} holds decoded frames already")
    reader = FrameReader(source, sampling, factor)
    kind = source.index.kind
    with ShardWriter(out, kind, "safetensors", {**sampling.to_dict(), "factor": factor}) as writer:
        work = in_order(pool, partial(_encoded, reader), source)
        for done, (key, videos, record, image) in enumerate(work, 1):
            writer.write(key, dict(zip(SIDES[kind], videos)), record, image)
            yield done
        for name in source.index.tables:
            writer.write_table(name, source.table(name))


def _encoded(reader: FrameReader, raw: RawSample) -> tuple[str, list[bytes], dict, SampleImage | None]:
    return raw.key, [dump_frames(video) for video in reader(raw)], raw.record(), image_of(raw)
