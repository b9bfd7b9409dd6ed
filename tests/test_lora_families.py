"""Adapters of every family: plain diffusers loads what is exported, and reads other tools' names where it can."""

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

from helpers import FEW_TOKENS, call
from lora_kit import random_updates, skeleton, write_updates
from videoalign.miniature.networks.pipelines import BUILDERS, make_generator
from videoalign.models.adapters import apply_loras, read_updates
from videoalign.models.generator_folder import load_generator

READ = {"wan": ("comfyui", "musubi"), "ltx": ("comfyui",), "hunyuan": ()}
"""Names of other tools that diffusers reads, by the beginning of a family's name."""


@pytest.fixture(params=BUILDERS)
def family(request, tmp_path):
    make_generator(tmp_path / "generator", request.param, hidden=48, layers=1, max_tokens=FEW_TOKENS)
    return request.param, tmp_path / "generator"


def deltas(transformer):
    """Updates that a transformer applies, by layer."""
    modules = {name: m for name, m in transformer.named_modules() if isinstance(m, BaseTunerLayer)}
    return {name: m.get_delta_weight(m.active_adapters[0]) for name, m in modules.items()}


def same(found, updates):
    assert found.keys() == updates.keys()
    for layer, update in updates.items():
        torch.testing.assert_close(found[layer], update.scale * update.b @ update.a, rtol=1e-5, atol=1e-5)


def test_adapters_of_every_family_are_loaded_by_diffusers_and_written_for_other_tools(family, tmp_path, capfd):
    name, folder = family
    updates = random_updates(skeleton(folder), alpha=7.0)
    second = "a14b" in name
    file = write_updates(tmp_path / "own.safetensors", updates, "low" if second else None)
    ours = load_generator(folder, parts=("transformer",))
    apply_loras(ours, str(file))
    same(deltas(ours.other if second else ours.transformer), updates)
    assert not (second and deltas(ours.transformer))
    kind, pipeline = type(ours.transformer), type(ours.pipeline)
    plain = kind.from_pretrained(folder, subfolder="transformer")
    plain.load_lora_adapter(str(tmp_path), weight_name=file.name)
    same(deltas(plain), updates)
    read = next(dialects for beginning, dialects in READ.items() if name.startswith(beginning))
    for to in ("comfyui", "musubi"):
        out = tmp_path / f"{to}.safetensors"
        status = call("convert-lora", file, "--to", to, "--generator", folder, "--out", out)
        message = capfd.readouterr().err
        if to not in read:
            assert status == 2 and "--to diffusers" in message and not out.exists()
            continue
        assert status == 0, message
        prefix = "diffusion_model." if to == "comfyui" else "lora_unet_"
        assert all(key.startswith(prefix) for key in load_file(out))
        plain = kind.from_pretrained(folder, subfolder="transformer")
        plain.load_lora_adapter(pipeline.lora_state_dict(str(out)))
        found = {layer: delta for layer, delta in deltas(plain).items() if delta.any()}
        same(found, updates)
        back, stated = read_updates(skeleton(folder), out)
        same({layer: update.scale * update.b @ update.a for layer, update in back.items()}, updates)
        assert stated.expert == ("low" if second else None)
