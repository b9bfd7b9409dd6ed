"""What the tests of VideoReward share: random videos and networks on miniature backbones."""

import pytest
import torch
from torch.nn.functional import logsigmoid

from videoalign.miniature.networks.qwen import make_qwen
from videoalign.models import VideoReward

PROMPTS = [
    "a red circle moves left to right",
    "a blue square",
    "a yellow circle moves downwards and it is very, very slow",
]
SIZES = [(4, 3, 32, 48), (2, 3, 16, 64), (6, 3, 32, 32)]
FROZEN = {"language": "frozen", "vision": "frozen", "train_merger": False}
ROWS, BASE = "backbone.language_model.embed_tokens.rows", "backbone.language_model.embed_tokens.base.weight"


def clips(sizes=SIZES, seed=0):
    """Random videos, uint8."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, size, dtype=torch.uint8, generator=generator) for size in sizes]


@pytest.fixture(scope="session")
def backbone_2_5(tmp_path_factory):
    """Folder of a miniature Qwen2.5-VL; see ``backbone``."""
    folder = tmp_path_factory.mktemp("backbones") / "qwen2_5_vl"
    make_qwen(folder, "qwen2_5_vl", corpus=PROMPTS, hidden=32, layers=2, vision_layers=2)
    return folder


@pytest.fixture
def build(backbone, sampling):
    """Makes networks on the miniature backbone; adapters, which start as nothing, are given random weights."""

    def make(folder=None, **settings):
        torch.manual_seed(0)
        network = VideoReward(folder or backbone, **{"template": "plain", "sampling": sampling} | settings)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
        return network.eval()

    return make


def rewards(network, videos, prompts, grad=False):
    with torch.set_grad_enabled(grad):
        return network(**network.processor(videos, prompts))


def clip_and_prompts(*prompts, seed=0):
    """The same clip for each prompt."""
    return clips(SIZES[:1], seed) * len(prompts), prompts


def train(network, steps=2):
    """Train on a batch, by AdamW with weight decay."""
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    network.train()
    for _ in range(steps):
        optimizer.zero_grad()
        (-logsigmoid(rewards(network, clips(), PROMPTS, grad=True))).mean().backward()
        optimizer.step()
