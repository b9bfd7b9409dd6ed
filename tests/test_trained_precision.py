"""What trains is fp32 and what is frozen has the chosen dtype; what is drawn follows the run's seed."""

import itertools

import pytest
import torch

from videoalign import VideoAlignError
from videoalign.miniature.networks.qwen import make_qwen
from videoalign.models import LoRA, VideoReward
from videoalign.models.lora import add_lora
from videoalign.models.precision import train_in_float32
from videoalign.models.reward_statistics import Statistics

ROWS = "backbone.language_model.embed_tokens.rows"
PROMPTS = ["a red circle moves left to right", "a blue square"]


@pytest.fixture(scope="module")
def backbones(backbone, tmp_path_factory):
    root = tmp_path_factory.mktemp("backbones")
    for family in ("qwen2_5_vl", "qwen3_vl"):
        make_qwen(root / family, family, corpus=PROMPTS, hidden=32, layers=2, vision_layers=2)
    return {"qwen2_vl": backbone, **{family: root / family for family in ("qwen2_5_vl", "qwen3_vl")}}


@pytest.fixture
def build(backbone, sampling):
    def make(folder=None, seed=0, **settings):
        torch.manual_seed(seed)
        return VideoReward(
            folder or backbone, "plain", sampling, **{"dtype": "bfloat16", "lora": LoRA(rank=2)} | settings
        )

    return make


def batch_of(network):
    videos = torch.randint(0, 256, (2, 4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return network.processor(list(videos), PROMPTS)


WAYS = [*itertools.product(("lora", "full", "frozen"), ("full", "lora", "frozen"), (True, False))]


@pytest.mark.parametrize(("language", "vision", "merger"), WAYS)
def test_what_trains_is_fp32_and_computes_beside_what_is_frozen(language, vision, merger, build):
    """This holds in autocast and outside; every trained parameter gets a gradient."""
    network = build(language=language, vision=vision, train_merger=merger)
    trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    full = [f"backbone.{part}." for part, how in (("language_model", language), ("visual", vision)) if how == "full"]
    frozen = {p.dtype for n, p in network.named_parameters() if n not in trained and not n.startswith(tuple(full))}
    assert frozen <= {torch.bfloat16}
    for mixed in (False, True):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            rewards = network(**batch_of(network))
        assert rewards.dtype == torch.float32
        assert rewards.isfinite().all()
        rewards.sum().backward()
        assert not [n for n, p in trained.items() if p.grad is None or p.grad.dtype != torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_of_one_input_keep_it_once(dtype):
    """Queries, keys and values read one tensor. Under autocast nothing but its copies in memory differs from peft."""
    torch.manual_seed(0)
    layers = torch.nn.ModuleDict({name: torch.nn.Linear(64, 64, dtype=dtype) for name in "qkv"}).requires_grad_(False)
    add_lora(torch.nn.ModuleDict({"part": layers}), LoRA(rank=4), ["part"])
    trained = [p.requires_grad_(True) for n, p in layers.named_parameters() if ".lora_" in n]
    for parameter in trained:
        parameter.data = torch.randn(parameter.shape) / 8
    x = torch.randn(512, 64).bfloat16()

    def step():
        kept = {}
        layers.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
            out = sum(layer(x) for layer in layers.values())
        out.float().square().sum().backward()
        return [out, *(p.grad for p in trained)], sum(t.shape == x.shape for t in kept.values())

    with torch.autocast("cpu", torch.bfloat16):
        before, copies = step()
        train_in_float32(layers)
        after, once = step()
    assert (copies, once) == (3, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    if dtype is torch.bfloat16:  # outside of autocast adapters compute in their own fp32
        assert step()[0][0].dtype is torch.bfloat16


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize(("vision", "merger"), [("full", False), ("lora", True), ("frozen", True)])
def test_other_families_compute_too(family, vision, merger, build, backbones):
    network = build(backbones[family], vision=vision, train_merger=merger)
    network(**batch_of(network)).sum().backward()
    assert {p.grad.dtype for p in network.parameters() if p.requires_grad} == {torch.float32}


def test_a_bf16_folder_trains_and_its_trained_tensors_come_back_bit_for_bit(build, tmp_path):
    """20 steps of 1e-5 move nearly every entry; in bf16 they would move 4 % of the vision tower's."""
    build().save_pretrained(tmp_path / "first")
    network = VideoReward.from_pretrained(tmp_path / "first").train()
    trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-5, weight_decay=0.0)
    batch = batch_of(network)
    for _ in range(20):
        optimizer.zero_grad()
        rewards = network(**batch)
        (rewards[0] - rewards[1]).sum().backward()
        optimizer.step()
    for part in ("visual.", "lora_"):
        moved = [(p != before[n]).float().flatten() for n, p in trained.items() if part in n and p.grad.abs().sum() > 0]
        assert torch.cat(moved).mean() > 0.95
    network.save_pretrained(tmp_path / "second")
    again = VideoReward.from_pretrained(tmp_path / "second")
    found = dict(again.named_parameters())
    assert all(torch.equal(found[n], p) and found[n].dtype == torch.float32 for n, p in trained.items())
    with torch.no_grad():
        assert torch.equal(again(**batch), network.eval()(**batch))


def test_a_backbone_of_its_own_comes_back_where_a_part_is_fp32_as_a_whole(build, tmp_path):
    network = build(vision="full", train_merger=False)
    merger = next(p for n, p in network.named_parameters() if "visual.merger" in n)
    assert merger.dtype == torch.float32
    assert not merger.requires_grad
    network.save_pretrained(tmp_path / "reward", backbone=True)
    again = dict(VideoReward.from_pretrained(tmp_path / "reward").named_parameters())
    assert all(torch.equal(again[n], p) for n, p in network.named_parameters())


def test_only_what_trains_is_cast():
    layers = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)).bfloat16()
    layers[0].requires_grad_(False)
    train_in_float32(layers)
    assert [p.dtype for p in layers.parameters()] == [torch.bfloat16] * 2 + [torch.float32] * 2


# --- seeds ----------------------------------------------------------------------------------------


def drawn(network):
    return network.head.weight.detach().clone(), dict(network.named_parameters())[ROWS].detach().clone()


def alike(a, b):
    return torch.corrcoef(torch.stack([(a - a.mean()).flatten(), (b - b.mean()).flatten()]))[0, 1].abs()


def test_head_and_token_rows_follow_the_seed(build):
    first, same, other = (drawn(build(seed=seed, dtype="float32")) for seed in (1, 1, 2))
    for a, b, c in zip(first, same, other):
        assert torch.equal(a, b)
        assert (a != c).all()
        assert alike(a, c) < 0.5
    centre = first[1].mean(0)
    assert alike(first[0], first[1] - centre) < 0.5  # not the same numbers twice


@pytest.mark.parametrize("seed", [3, 4])
def test_a_loaded_folder_does_not_depend_on_the_seed(seed, build, tmp_path):
    network = build(seed=0, dtype="float32")
    network.save_pretrained(tmp_path / "reward")
    torch.manual_seed(seed)
    again = dict(VideoReward.from_pretrained(tmp_path / "reward").named_parameters())
    assert all(torch.equal(again[n], p) for n, p in network.named_parameters())


@pytest.mark.parametrize("alpha", [0, -1, float("nan"), float("inf")])
def test_adapters_that_would_do_nothing_are_refused(alpha):
    with pytest.raises(VideoAlignError, match=r"lora\.alpha must be positive and finite"):
        LoRA(alpha=alpha)


@pytest.mark.parametrize("numbers", [([None] * 3, [1.0] * 3), ([0.0] * 3, None), ("abc", [1.0] * 3), ([0.0], [1.0])])
def test_statistics_that_are_no_numbers_are_refused(numbers):
    with pytest.raises(VideoAlignError, match="cannot normalise"):
        Statistics(*numbers).check("reward.json")
