"""Symmetries of the miniature world: a pair of clips that is mirrored, turned or shifted is rated as it was before.

A reward model that is trained on them cannot know a clip by heart, and sees each direction of movement as often as the
others. They are no symmetries of real videos, in which up is not down.
"""

import random

import torch
from torch import Tensor

from ... import VideoAlignError
from .sprites import BY_PROMPT, DIRECTIONS, Scene

_DIRECTION = {step: words for words, step in DIRECTIONS.items()}
_TURNED = {"bar": "pole", "pole": "bar"}


class Symmetries:
    """Changes a pair of clips at random, and the prompt with them: an ``augment`` of VideoPairs.

    Both clips are mirrored and turned alike, and shifted each by itself: where a clip lies in its frame says nothing of
    its quality.

    Mirrored and turned clips are exactly what the changed prompt could have given, but for the ground, which is lighter
    below by 12 of 255 levels. A shift is no exact symmetry: where a sprite touches the edge, it is cut or
    lengthened.

    Args:
        flip: Mirror left and right, and up and down, each in half of the pairs; directions change with them.
        transpose: Exchange x and y in half of the pairs; directions change with them, and a bar becomes a pole.
        shift: Largest shift along each axis, in pixels; edges are repeated. 0 shifts nothing.
    """

    def __init__(self, flip: bool = True, transpose: bool = True, shift: int = 3) -> None:
        if shift < 0:
            raise VideoAlignError(f"shift of Symmetries must not be negative, got {shift}")
        self.flip, self.transpose, self.shift = flip, transpose, shift

    def __call__(
        self, videos: tuple[Tensor, Tensor], prompt: str, rng: random.Random
    ) -> tuple[tuple[Tensor, Tensor], str]:
        """Change a pair.

        Args:
            videos: Frames of both clips, uint8 (T, 3, H, W).
            prompt: Prompt of the miniature world.
            rng: Draws the change; as many numbers for one setting as for another.

        Returns:
            Frames of both clips in new tensors, and the prompt that fits them.

        Raises:
            VideoAlignError: Where the prompt is none of the miniature world's.
        """
        if prompt not in BY_PROMPT:
            raise VideoAlignError(
                f"prompt {prompt!r} is none of the miniature world, whose symmetries are no others' (data.augment)"
            )
        heads, places = [rng.random() < 0.5 for _ in range(3)], [rng.random() for _ in range(4)]
        mirrors, turned = [self.flip and head for head in heads[:2]], self.transpose and heads[2]
        shifts = [int(place * (2 * self.shift + 1)) - self.shift for place in places]
        scene = transformed(BY_PROMPT[prompt], mirrors[0], mirrors[1], turned)
        moved = (_moved(video, mirrors, turned, own) for video, own in zip(videos, (shifts[:2], shifts[2:])))
        return tuple(moved), scene.prompt


def transformed(scene: Scene, right: bool = False, down: bool = False, turned: bool = False) -> Scene:
    """What a clip of a scene shows when it is mirrored, and then turned.

    Args:
        scene: What it shows before.
        right: Whether left and right are exchanged.
        down: Whether up and down are exchanged.
        turned: Whether x and y are exchanged.
    """
    x, y = DIRECTIONS[scene.direction]
    step = (-x if right else x), (-y if down else y)
    shape = _TURNED.get(scene.shape, scene.shape) if turned else scene.shape
    return Scene(scene.colour, shape, _DIRECTION[step[::-1] if turned else step])


def _moved(video: Tensor, mirrors: list[bool], turned: bool, shifts: list[int]) -> Tensor:
    """Frames (T, 3, H, W), shifted by (x, y) pixels, mirrored along (x, y) and turned, in one copy."""
    columns, rows = (
        (torch.arange(side) - shift).clamp(0, side - 1) for side, shift in zip((video.shape[3], video.shape[2]), shifts)
    )
    columns, rows = (place.flip(0) if mirror else place for place, mirror in zip((columns, rows), mirrors))
    return video[:, :, rows, columns[:, None]] if turned else video[:, :, rows[:, None], columns]
