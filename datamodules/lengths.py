"""How long videos are to a model, known from records and indexes before anything is decoded."""

from collections.abc import Sequence

from .. import VideoAlignError
from ..models.processor import RewardProcessor
from .contents import Content
from .set_index import SHAPE, SIDES
from .shards import ShardSet


def length_of(content: Content, extension: str, processor: RewardProcessor, side: str = "") -> float:
    """Number of pixels that a model will see of a video; bytes of its file where the record does not tell.

    Args:
        content: The sample.
        extension: Extension of the video in it.
        processor: Frame sampling and patch size of the model.
        side: A or B, of a pair.
    """

    try:
        told = [content.record[name][side] if side else content.record[name] for name in SHAPE]
        (fps, count, height, width), sampling = map(float, told), processor.sampling
        frames = len(sampling.indices(int(count), fps))
        height, width = sampling.size(int(height), int(width), processor.factor)
    except (KeyError, TypeError, ValueError, ArithmeticError, VideoAlignError):
        return content.spans[extension].size
    return frames * height * width


def lengths_of(shards: ShardSet, contents: Sequence[Content], processor: RewardProcessor) -> list[float]:
    """Length of each sample, of pairs that of the longer video, to which the other one is padded.

    Args:
        shards: The set.
        contents: Samples of it.
        processor: Frame sampling and patch size of the model.
    """
    media, sides = shards.index.media, SIDES[shards.index.kind]
    return [max(length_of(c, f"{s}.{media}".lstrip("."), processor, s.upper()) for s in sides) for c in contents]
