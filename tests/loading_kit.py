"""What the tests of loading share: sound pipelines of both families and a backbone, to be damaged."""

import shutil
from pathlib import Path

import pytest

from videoalign.miniature.networks.pipelines import make_generator
from videoalign.models.backbone import load_backbone
from videoalign.models.generator_folder import load_generator

NAN, LAYERS = float("nan"), ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory, backbone):
    """Pipelines of both families, a deeper and a wider one, and a backbone. Read only."""
    root = tmp_path_factory.mktemp("kit")
    for name, family, more in (
        ("wan", "wan", {}),
        ("ltx", "ltx", {}),
        ("deep", "wan", {"layers": 3}),
        ("wide", "wan", {"hidden": 128}),
    ):
        make_generator(root / name, family, **more)
    shutil.copytree(backbone, root / "qwen")
    return root


def weights_of(folder):
    return next(Path(folder).glob("*.safetensors"))


def load(folder, part):
    return load_generator(folder, parts=(part,)) if part else load_backbone(folder)


def spoil(kit, name, part, tmp_path):
    """A copy of a model in whose part something can be spoilt."""
    shutil.copytree(kit / name, tmp_path / name)
    return tmp_path / name, tmp_path / name / part


def flip(path, place=-3):
    """Change one byte, the exponent of a weight."""
    content = bytearray(path.read_bytes())
    content[place] ^= 0x40
    path.write_bytes(content)
