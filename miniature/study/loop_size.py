"""How much the loop trains and samples, and the record that keeps results of two sizes out of one folder."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ... import VideoAlignError
from ...models.files import read_json, write_json
from ..world.rendered_sets import WorldSize


@dataclass(frozen=True, kw_only=True)
class LoopSize:
    """How long everything is trained and how much is sampled; the defaults are the demo's."""

    world: WorldSize = field(default_factory=WorldSize)
    """Numbers of rendered samples."""
    captions: int = 600
    """Steps of caption pre-training."""
    starts: int = 3
    """Random weights that it begins from at most, until it describes held-out clips well."""
    reward: int = 350
    """Steps of the reward model."""
    generated: int = 400
    """Further steps of the reward model on pairs of generated clips."""
    autoencoder: int = 400
    """Steps of the autoencoder."""
    generator: int = 1000
    """Steps of the generator."""
    noisy: int = 300
    """Steps of the reward on noisy latents."""
    align: int = 120
    """Steps of each alignment algorithm."""
    samples: int = 96
    """Videos per prompt among which annotators rate pairs."""
    rated: int = 4000
    """Pairs of generated videos that they rate for training; half as many rendered ones are shuffled in."""
    fresh: int = 8
    """Videos per prompt that the generator is aligned on."""
    judged: int = 8
    """Noises per prompt in a comparison."""
    benchmark: int = 32
    """Videos per unseen prompt in the benchmark of generated videos."""
    benchmark_pairs: int = 900
    """Pairs of these that annotators rate."""
    calibrated: int = 160
    """Renders per flaw that the oracle is calibrated on."""
    checked: int = 400
    """Renders of known quality that the oracle is checked on."""


STUDY = LoopSize(generated=600, samples=192, rated=8000)
"""A study's: more clips of the generator for its judge, and more steps on them. Twice these steps order text alignment
by .01 and motion quality by .02 better (one seed), and take four minutes more of each seed."""


def begin(out: Path, decides: dict[str, Any]) -> None:
    """Refuse a folder that was begun with another size or seed: its results would not belong to the new ones.

    Args:
        out: Folder of all results.
        decides: Everything that decides the results; kept in the folder's ``size.json``.

    Raises:
        VideoAlignError: What differs.
    """
    record, decides = out / "size.json", json.loads(json.dumps(decides))
    if not record.exists():
        write_json(record, decides)
    elif (found := read_json(record, "a folder of results")) != decides:
        keys = [key for key in {**found, **decides} if found.get(key) != decides.get(key)]
        other = ", ".join(f"{key} {found.get(key)}, here {decides.get(key)}" for key in keys)
        raise VideoAlignError(f"{out} was begun otherwise ({record}: {other}); name another --out")
