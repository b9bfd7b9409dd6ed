"""A reward without a meaning, for trying training on a generator's own samples without any judge."""

from collections.abc import Sequence

from torch import Tensor


def brightness(videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """How bright videos are, from 0 to 1, (B,) under the name ``bright``.

    Args:
        videos: Videos (B, T, 3, H, W), uint8.
        prompts: Prompts, which do not matter.
    """
    return {"bright": videos.float().flatten(1).mean(1) / 255}
