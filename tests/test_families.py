"""Every generator family: loading, conventions of the flow, samples as plain diffusers', training, and refusals."""

import pytest
import torch

from families_kit import BEGINNING, EXPERTS, FAMILIES, PROMPTS, SHAPES, encoded, euler, forward_of_truth, nothing
from families_kit import plain, plainly, without_ftfy
from helpers import randn
from videoalign.models.generator_folder import load_generator

pytestmark = pytest.mark.parametrize("name", FAMILIES)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_samples_are_those_of_plain_diffusers(name, guidance, miniatures, of_family, monkeypatch):
    without_ftfy(monkeypatch)
    generator, noise = of_family(name), randn(2, *SHAPES[name])
    condition, null = generator.condition(encoded(generator)), nothing(generator)
    low = guidance - 1 if name in EXPERTS and guidance > 1 else None
    found = generator.sample(condition, noise, 3, guidance, null if guidance > 1 else None, cfg_scale_2=low)
    want = plainly(plain(miniatures[name], name), name, noise, guidance=guidance)
    assert torch.equal(found, want), (found - want).abs().max()
