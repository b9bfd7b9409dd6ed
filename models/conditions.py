"""Batches of what samples are conditioned on: prompts are padded as the transformer takes them."""

from collections.abc import Mapping, Sequence

import torch

from .. import VideoAlignError
from .family import Condition, Encoded


def padded(encoded: Sequence[Encoded], shapes: Mapping[str, tuple[int, int]], device: torch.device) -> Condition:
    """Prompts of a batch, padded with zeros, with their masks.

    Args:
        encoded: Encoded prompt of each sample.
        shapes: Largest length and width (L, E) of each part, by name.
        device: Where the batch is put.

    Raises:
        VideoAlignError: Where a part is missing, longer, or of another width.
    """
    batch: Condition = {}
    for name, (most, width) in shapes.items():
        parts = [one[name] for one in encoded if name in one]
        if len(parts) < len(encoded):
            raise VideoAlignError(f"encoded prompts have no part {name}: they were made with another text encoder")
        if wrong := [tuple(e.shape) for e in parts if e.ndim != 2 or e.shape[1] != width or len(e) > most]:
            raise VideoAlignError(
                f"prompt embeddings{f' ({name})' * (name != 'prompt')} of shape {wrong[0]}, but this generator takes "
                f"at most {most} x {width}: they were made with another text encoder"
            )
        rows = torch.zeros(len(parts), most, width, dtype=parts[0].dtype, device=device)
        mask = torch.zeros(len(parts), most, dtype=torch.long, device=device)
        for row, keep, e in zip(rows, mask, parts):
            row[: len(e)], keep[: len(e)] = e, 1
        batch |= {name: rows, f"{name}_mask": mask}
    return batch


def check_negative(where: str, negative: str, *scales: float | None) -> None:
    """Refuse a negative prompt that nothing reads.

    Args:
        where: What stands before the name in the message, such as ``sampling.``.
        negative: Negative prompt of classifier-free guidance.
        scales: Scales of classifier-free guidance; None where there is none.

    Raises:
        VideoAlignError: Where there is a negative prompt, and no scale above 1.
    """
    if negative and max(scale or 1 for scale in scales) <= 1:
        raise VideoAlignError(
            f"{where}negative: classifier-free guidance alone reads a negative prompt, and at {where}cfg_scale 1 there "
            f"is none; raise {where}cfg_scale (5, say), or leave {where}negative out"
        )
