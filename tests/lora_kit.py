"""What the tests of adapters share: random updates, files of them, and a pipeline with two experts."""

from pathlib import Path

import pytest
import torch

from videoalign.miniature.networks.pipelines import BUILDERS, make_generator
from videoalign.models.adapter_files import linear_layers
from videoalign.models.adapters import Update, settings_of, tensors_of
from videoalign.models.generator_folder import load_generator
from videoalign.models.lora_dialects import save_adapters, stating

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def skeleton(folder) -> torch.nn.Module:
    """The transformer of a pipeline without its weights."""
    return load_generator(folder, parts=()).structure["transformer"]


def random_updates(transformer, ends=ATTENTION, rank=3, alpha=6.0, seed=0) -> dict[str, Update]:
    """Updates of the layers whose names have one of these ends."""
    source = torch.Generator().manual_seed(seed)
    updates = {}
    for name in linear_layers(transformer):
        if name.endswith(tuple(ends)):
            module = transformer.get_submodule(name)
            a = torch.randn(rank, module.in_features, generator=source) * 0.3
            updates[name] = Update(a, torch.randn(module.out_features, rank, generator=source) * 0.3, alpha)
    return updates


def write_updates(path, updates, expert=None) -> Path:
    """A file in diffusers' own form, as an export writes it."""
    tensors = {f"transformer.{name}": tensor for name, tensor in tensors_of(updates).items()}
    save_adapters(path, tensors, stating(settings_of(updates), expert))
    return path


@pytest.fixture(scope="session")
def experts(tmp_path_factory) -> Path:
    """A miniature of Wan2.2-T2V-A14B, with two transformers. Read only."""
    folder = tmp_path_factory.mktemp("experts") / "a14b"
    make_generator(folder, next(name for name in BUILDERS if "a14b" in name and "i2v" not in name), hidden=48)
    return folder
