"""The text encoder in a pass of its own: all prompts of a run are embedded, then it is freed."""

from collections.abc import Sequence

import lightning as L
import torch

from ..bars import Bar
from ..datamodules.contracts import HasPrompts, require
from ..models.family import PROMPTS_AT_ONCE, Encoded


def embed_first(module: L.LightningModule, further: Sequence[str], truncate: bool = False) -> dict[str, Encoded]:
    """Embed the prompts of a run and free the text encoder. Call it in ``setup``, before the module is on its device.

    Args:
        module: Module with a ``generator``, whose DataModule knows the prompts.
        further: Prompts besides those of the DataModule, such as the negative one.
        truncate: Whether prompts that are too long are cut; otherwise they are refused.

    Returns:
        Encoded prompts by their text, in the main memory.

    Raises:
        VideoAlignError: Where the DataModule knows no prompts, or one of them is too long.
    """
    trainer, generator = module.trainer, module.generator
    known = require(trainer.datamodule, HasPrompts, f"{type(module).__name__} with memory.text_first")
    prompts = list(dict.fromkeys([*known.all_prompts(), *further]))
    read = [name for name in generator.further_parts.get("text_encoder", ()) if name != "image_encoder"]
    for part in ("text_encoder", *read):
        generator.require(part).to(trainer.strategy.root_device)
    found: dict[str, Encoded] = {}
    bar = Bar("prompts", len(prompts)) if trainer.is_global_zero else None
    with trainer.precision_plugin.forward_context():
        for first in range(0, len(prompts), PROMPTS_AT_ONCE):
            some = prompts[first : first + PROMPTS_AT_ONCE]
            encoded = generator.encode_prompts(some, truncate)
            found |= {p: {name: part.cpu() for name, part in e.items()} for p, e in zip(some, encoded)}
            if bar:
                bar.update(len(some))
    if bar:
        bar.close()
    for part in ("text_encoder", *read):  # not the encoder of images, which come with each batch
        setattr(generator, part, None)
        setattr(generator.pipeline, part, None)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found
