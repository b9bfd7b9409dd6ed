"""Miniature video generators: random weights in diffusers' own format, for laptops, tests and the demo.

They are ordinary pipeline folders of the real architectures: the code that loads them is the code that loads real ones.
"""

from pathlib import Path

import torch

from ... import VideoAlignError
from ...models.files import new_folder
from .hunyuan_pipelines import HUNYUAN
from .ltx2_pipelines import LTX2
from .ltx_pipelines import LTX
from .pipeline_shape import CORPUS, Shape
from .wan_pipelines import WAN

BUILDERS = {**WAN, **LTX, **LTX2, **HUNYUAN}
"""Functions that make a pipeline of a size, by family."""


def make_generator(
    folder: str | Path,
    family: str = "wan",
    corpus: list[str] | None = None,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    vocabulary: int = 400,
    max_tokens: int | None = None,
    shift: float | None = None,
    seed: int = 0,
) -> None:
    """Write a small random pipeline: text encoder, autoencoder, transformer and scheduler, and whatever its kind adds.

    One latent of its autoencoder stands for 4 frames and 8 x 8 pixels, or 16 x 16 in the families ``wan22-5b``,
    ``wan22-5b-i2v``, ``hunyuan15`` and ``hunyuan15-i2v``.

    Args:
        folder: Folder to write.
        family: Architecture of the pipeline, one of :data:`BUILDERS`.
        corpus: Texts whose words the tokenizer should know.
        hidden: Width of the transformer.
        layers: Depth of the transformer.
        heads: Attention heads of the transformer.
        vocabulary: Number of tokens.
        max_tokens: Number of tokens that prompts are padded to; the family's own if not given.
        shift: Shift of the sampler's time steps; that of the family's folders on the hub if not given.
        seed: Seed of the weights; the same seed writes the same bytes.
    """
    if family not in BUILDERS:
        raise VideoAlignError(f"family {family!r} is unknown; choose one of {', '.join(BUILDERS)}")
    if hidden % heads or (hidden // heads) % 2 or hidden // heads < 12:
        raise VideoAlignError(f"hidden is {hidden}: it must be {heads} heads of an even size, 12 at least")
    shape = Shape((corpus or CORPUS) * 4, hidden, layers, heads, vocabulary, max_tokens, shift)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = BUILDERS[family](shape)
    with new_folder(folder) as out:
        pipeline.save_pretrained(out)
